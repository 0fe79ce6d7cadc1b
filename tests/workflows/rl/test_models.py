"""Rewards by models: the reward model's score and the judge's grade, of the reply alone, once for equal answers, kept in the journal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.data.rows import Prompt
from gristmill.generation.api import Completion
from gristmill.generation.settings import Calls
from gristmill.judge.programs import Verifier
from gristmill.judge.reward import load_scorer
from gristmill.runs.journal import Journal
from gristmill.workflows.rl.models import JudgePart, RewardModelPart
from gristmill.workflows.rl.recipe import Judge, RewardModel, Rewards
from gristmill.workflows.rl.rewards import Rewarder

PROMPTS = [
    Prompt("a", "", (Message("user", "Name a bird."),), "file", truth={"kind": "exact", "value": "owl"}),
    Prompt("b", "", (Message("user", "Greet me."),), "file"),
]
ONCE = Calls(retries=0)


def answer(text: str) -> Completion:
    return Completion(text, 3, (), "stop", (1, 2, 3))


def test_a_reward_model_in_process_scores_the_reply_behind_the_thinking(reward_folder: Path, tmp_path: Path) -> None:
    with Journal(tmp_path / "calls.jsonl") as journal:
        part = RewardModelPart(RewardModel(folder=reward_folder), ONCE, journal, device="cpu")
        found = part.rewards([*PROMPTS, PROMPTS[0]], [answer("owl"), answer("Hello."), answer("<think>well</think>owl")])
    scorer = load_scorer(reward_folder, device="cpu")
    talks = [(*PROMPTS[0].messages, Message("assistant", "owl")), (*PROMPTS[1].messages, Message("assistant", "Hello."))]
    expected = [scorer.total(rating) for rating in scorer.score(talks)]
    assert found[0] == pytest.approx(expected[0], abs=1e-5) and found[1] == pytest.approx(expected[1], abs=1e-5)
    assert found[2] == pytest.approx(found[0], abs=1e-5) and expected[0] != expected[1]


def test_an_answer_beyond_the_reward_models_context_is_left_out(reward_folder: Path, tmp_path: Path) -> None:
    with Journal(tmp_path / "calls.jsonl") as journal:
        part = RewardModelPart(RewardModel(folder=reward_folder, weight=0.5), ONCE, journal, device="cpu")
        rewarder = Rewarder(Rewards(verifier=0), Verifier(), 10, [part])
        fits, long = rewarder.rewards(PROMPTS, [answer("owl"), answer("word " * 300)])
    assert fits.total == pytest.approx(0.5 * fits.parts["reward_model"]) and fits.right == 1 and not fits.is_masked
    assert long.is_masked and "context is too short" in long.error


def test_a_reward_model_behind_an_endpoint_is_asked_once_a_different_answer(
    serve: Callable[..., Any], chat: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    attributes = "helpfulness:3,correctness:2,coherence:1,complexity:0,verbosity:0"
    server = serve(lambda path, body: (200, chat(attributes)))
    settings = RewardModel(base_url=server.url + "/v1", model="reward", weights="nemotron4-340b")
    for _ in range(2):  # the second time from the journal
        with Journal(tmp_path / "calls.jsonl") as journal:
            part = RewardModelPart(settings, ONCE, journal, device="cpu")
            one, two, three = part.rewards([*PROMPTS, PROMPTS[0]], [answer("owl"), answer("Hi."), answer("owl")])
        assert one == two == three and isinstance(one, float) and len(server.seen) == 2


def test_a_judge_grades_with_the_known_answer_beside_it(
    serve: Callable[..., Any], chat: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    def grade(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        asked = body["messages"][0]["content"]
        if "Hello" in asked:
            return 200, chat("I would rather not say.")
        return 200, chat("Fine. Rating: [[10]]" if "owl" in asked.split("Answer to grade:")[1] else "It says [[9]]. Rating: [[1]]")

    server = serve(grade)
    settings = Judge(base_url=server.url + "/v1", model="judge", weight=2.0)
    with Journal(tmp_path / "calls.jsonl") as journal:
        part = JudgePart(settings, ONCE, journal, device="cpu")
        prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1]]
        given = [answer("<think>[[10]]</think>owl"), answer("Rating: [[10]]"), answer("Hello.")]
        right, wrong, silent = Rewarder(Rewards(verifier=0), Verifier(), 10, [part]).rewards(prompts, given)
    assert right.total == 2.0 and wrong.total == 0 and silent.is_masked and "no grade" in silent.error
    first, second, third = sorted((body["messages"][0]["content"] for body in server.seen), key=lambda text: "Greet" in text)
    assert "Reference answer:\nowl" in first and "Reference answer:\nowl" in second and "Reference" not in third
    assert "think" not in first + second, "what is thought is not judged"


def test_a_judge_in_a_folder_is_asked_in_process(tiny_base: Path, tmp_path: Path) -> None:
    with Journal(tmp_path / "calls.jsonl") as journal:
        part = JudgePart(Judge(folder=tiny_base, max_tokens=4), ONCE, journal, device="cpu")
        with pytest.raises(
            InputError, match=r"rewards.judge fails on every answer .the judge's reply holds no grade|the call of the judge failed"
        ):
            part.rewards([PROMPTS[1]], [answer("Hello.")])
        assert len(journal) == 1


def test_calls_that_fail_for_all_end_the_step_and_are_made_again(
    serve: Callable[..., Any], chat: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    answers: list[tuple[int, Any]] = [(400, {"error": {"message": "no"}})]
    server = serve(lambda path, body: answers[-1])
    settings = Judge(base_url=server.url + "/v1", model="judge")
    with Journal(tmp_path / "calls.jsonl") as journal:
        part = JudgePart(settings, ONCE, journal, device="cpu")
        with pytest.raises(InputError, match="rewards.judge fails on every answer .the call of the judge failed"):
            part.rewards([PROMPTS[1]], [answer("Hello.")])
        answers.append((200, chat("[[4]]")))
        assert part.rewards([PROMPTS[1]], [answer("Hello.")]) == [pytest.approx(3 / 9)]
