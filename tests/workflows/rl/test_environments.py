"""Environments: verifiers' modules by the shape of what they return, NeMo-Gym's rows and server, and what takes several turns."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from gristmill.core.config import check
from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.generation.api import Completion
from gristmill.runs.journal import Journal
from gristmill.workflows.rl import environments, loop
from gristmill.workflows.rl.environments import Tasks, open_environment
from gristmill.workflows.rl.prompts import find_prompts
from gristmill.workflows.rl.recipe import Environment, RlRecipe

# The package's classes by their shape: `funcs`, `weights`, `class_objects`, `rubrics`, `dataset`, `get_dataset`.
MODULE = """
class Rubric:
    def __init__(self, funcs, weights=None, class_objects=None):
        self.funcs, self.weights, self.class_objects = funcs, weights or [1.0] * len(funcs), class_objects or {}

class Group:
    def __init__(self, rubrics): self.rubrics = rubrics

class Parser:
    def parse_answer(self, completion): return completion[-1]["content"].split()[-1]

class Environment:
    system_prompt, parser, max_turns = "Be brief.", Parser(), 1
    def __init__(self, rubric, dataset, eval_dataset=None, **more):
        self.rubric, self.dataset, self.eval_dataset = rubric, dataset, eval_dataset
        self.__dict__ |= more
    def get_eval_dataset(self): return self.dataset  # the package's falls back so

async def right(completion, answer, parser): return float(parser.parse_answer(completion) == answer)
def short(completion, info, state, **kwargs): return -len(completion[-1]["content"]) / info["scale"] * (state["answer"] == kwargs["answer"])
def watched(completion): raise RuntimeError("its weight is 0")
def by_group(completions): return [0.0 for _ in completions]
def broken(completion, answer): return 1.0 if answer != "10" else 1 / 0

def load_environment(size=3, **more):
    rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1), "info": '{"scale": 10}', "task": "sums"} for i in range(size)]
    rubric = Group([Rubric([right, watched], [2.0, 0.0], {"parser": Parser()}), Rubric([short])])
    if more.pop("group", False): rubric = Rubric([by_group])
    if more.pop("broken", False): rubric = Rubric([broken])
    return Environment(rubric, rows, **more)
"""

FP32 = {"training": {"precision": "fp32"}, "engine": {"precision": "fp32"}}


def module(folder: Path) -> Path:
    (folder / "sums_env.py").write_text(MODULE)
    return folder / "sums_env.py"


def opened(stack: ExitStack, **settings: Any) -> Tasks:
    return open_environment(Environment.model_validate(settings), stack, 4)


def test_a_verifiers_module_gives_prompts_and_rewards(tmp_path: Path) -> None:
    with ExitStack() as stack:
        tasks = opened(
            stack, verifiers=module(tmp_path), args={"size": 2, "eval_dataset": [{"prompt": [{"role": "user", "content": "9?"}]}]}
        )
        assert [[m.content for m in p.messages] for p in tasks.prompts] == [
            ["Be brief.", "What is 0 + 1?"],
            ["Be brief.", "What is 1 + 1?"],
        ]
        assert [p.messages[-1].content for p in tasks.evaluation] == ["9?"] and tasks.prompts[0].task == "sums"
        answers = [Completion(text, 1, (), "stop") for text in ("It is 1", "It is 3")]
        assert list(tasks.rewards(tasks.prompts, answers)) == pytest.approx([2 - 0.7, -0.7])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"group": True}, "by_group values whole groups"),
        ({"max_turns": 5}, "tools or several turns"),
        ({"tools": ["search"]}, "tools or several turns"),
        ({"size": 0}, "no rows to train on"),
        ({"size": "many"}, "TypeError"),
    ],
)
def test_a_module_that_cannot_be_used_is_one_sentence(tmp_path: Path, args: dict[str, Any], words: str) -> None:
    with ExitStack() as stack, pytest.raises(InputError, match=words):
        opened(stack, verifiers=module(tmp_path), args=args)


def gym_rows(folder: Path, *more: Any) -> Path:
    params = [
        {"input": "Say bee."},
        {"input": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": [{"text": "Hi"}]}]},
    ]
    rows = [{"responses_create_params": p, "expected": i} for i, p in enumerate([*params, *more])]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def test_nemo_gyms_server_verifies_each_different_answer_once(
    serve: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments, "PAUSE", 0.01)
    failures = [503]

    def verify(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        assert path == "/verify" and body["response"]["output"][0]["content"][0]["type"] == "output_text"
        text = body["response"]["output"][0]["content"][0]["text"]
        if text == "odd":
            return 200, {"reward": "much"}
        return (failures.pop(), {}) if failures else (200, {"reward": float(body["expected"]), "text": text})

    server = serve(verify)
    with ExitStack() as stack:
        tasks = opened(stack, nemo_gym=gym_rows(tmp_path), url=server.url + "/")
        assert [m.role for m in tasks.prompts[1].messages] == ["system", "user"] and tasks.prompts[1].messages[-1].content == "Hi"
        tasks.journal = stack.enter_context(Journal(tmp_path / "calls.jsonl"))
        prompts = [tasks.prompts[i] for i in (0, 1, 1, 1)]
        answers = [Completion(text, 1, (), "stop") for text in ("a", "b", "b", "odd")]
        first = tasks.rewards(prompts, answers)
        assert first[:3] == [0.0, 1.0, 1.0] and "status 200" in str(first[3])
        asked = len(server.seen)
        assert asked == 4, "two, one again after 503, and one that says no number"
        assert tasks.rewards(prompts[:3], answers[:3]) == first[:3] and len(server.seen) == asked
        server.server.shutdown()
        server.server.server_close()
        with pytest.raises(InputError, match=r"environment.url fails on every answer .*: start the server"):
            tasks.rewards(prompts[:1], [Completion("new", 1, (), "stop")])


def test_a_run_on_nemo_gyms_rows_asks_for_the_evaluation_too(serve: Callable[..., Any], tiny_base: Path, tmp_path: Path) -> None:
    server = serve(lambda path, body: (200, {"reward": len(body["response"]["output"][0]["content"][0]["text"]) % 3 / 2}))
    environment = {"nemo_gym": str(gym_rows(tmp_path)), "url": server.url}
    values = {"model": str(tiny_base), "environment": environment, "steps": 1, "prompts": 1, "samples": 4, "max_tokens": 16, "threads": 1}
    results = loop.run(check(RlRecipe, values | FP32), tmp_path / "run", Progress(quiet=True))
    assert [stage["greedy"]["overall"]["n"] for stage in results["stages"]] == [1, 1]
    journal = (tmp_path / "run/01-rl/judgements.jsonl").read_text().splitlines()
    assert 1 <= len(journal) <= 6 and all("reward" in json.loads(line) for line in journal)
    assert (tmp_path / "run/00-base/judgements.jsonl").read_text().count("reward") >= 1, "what the evaluation was told is kept too"


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"input": []}, "Row 3 of .* has no responses_create_params.input"),
        ({"input": "x", "tools": [{"name": "search"}]}, "Row 3 of .* has tools"),
        ({"input": [{"role": "user", "content": [{"image": "x"}]}]}, "Row 3 of .* a message that is no text"),
    ],
)
def test_rows_that_cannot_be_asked_are_named(tmp_path: Path, params: dict[str, Any], words: str) -> None:
    with ExitStack() as stack, pytest.raises(InputError, match=words):
        opened(stack, nemo_gym=gym_rows(tmp_path, params), url="http://127.0.0.1:1")


def test_a_fifth_of_the_rows_is_held_out_where_there_is_no_evaluation(tmp_path: Path) -> None:
    recipe = check(RlRecipe, {"model": "m", "environment": {"verifiers": str(module(tmp_path)), "args": {"size": 10}}})
    with ExitStack() as stack:
        assert recipe.environment is not None
        prompts, evaluation = find_prompts(recipe, open_environment(recipe.environment, stack, 1))
    assert len(prompts) == 8 and len(evaluation) == 2 and not {p.id for p in prompts} & {p.id for p in evaluation}


def test_one_row_is_too_few(tmp_path: Path) -> None:
    recipe = check(RlRecipe, {"model": "m", "environment": {"verifiers": str(module(tmp_path)), "args": {"size": 1}}})
    with ExitStack() as stack, pytest.raises(InputError, match="0 prompts to train on and 1 to evaluate with"):
        assert recipe.environment is not None
        find_prompts(recipe, open_environment(recipe.environment, stack, 1))


def test_what_cannot_be_judged_is_no_wrong_answer_of_the_evaluation(tiny_base: Path, tmp_path: Path) -> None:
    environment = {"verifiers": str(module(tmp_path)), "args": {"size": 10, "broken": True}}
    values = {"model": str(tiny_base), "environment": environment, "steps": 1, "prompts": 1, "samples": 4, "max_tokens": 16, "threads": 1}
    with pytest.raises(InputError, match="could not judge [1-9] of [1-9] answers of the evaluation"):
        loop.run(check(RlRecipe, values | FP32), tmp_path / "run", Progress(quiet=True))


def test_a_run_on_an_environment(tiny_base: Path, tmp_path: Path) -> None:
    environment = {"verifiers": str(module(tmp_path)), "args": {"size": 5}, "passing": -100}
    values = {"model": str(tiny_base), "environment": environment, "steps": 1, "prompts": 2, "samples": 4, "max_tokens": 16, "threads": 1}
    results = loop.run(check(RlRecipe, values | FP32), tmp_path / "run", Progress(quiet=True))
    assert results["stages"][0]["greedy"]["overall"] == {"mean": 1.0, "ci95": [pytest.approx(0.2065, abs=1e-3), 1.0], "n": 1}
    metrics = json.loads((tmp_path / "run/01-rl/train/metrics.jsonl").read_text())
    assert metrics["reward_environment"] < 0 and metrics["reward_total"] <= 0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"environment": {"verifiers": "a.py", "nemo_gym": "b.jsonl"}}, "either verifiers or nemo_gym"),
        ({"environment": {"nemo_gym": "b.jsonl"}}, "go together"),
        ({"environment": {"verifiers": "a.py"}, "world": "miniature"}, "one of them alone"),
    ],
)
def test_recipes_that_name_two_or_half_an_environment(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        check(RlRecipe, values)
