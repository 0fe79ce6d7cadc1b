"""How prompts are written, with a fake model that says what the test wants."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gristmill.core.config import check
from gristmill.data.chat import Conversation, Message
from gristmill.data.rows import Demonstration, Prompt, read_rows
from gristmill.generation.api import Completion, Request
from gristmill.generation.cached import BatchingClient, CachedClient
from gristmill.runs import artifacts
from gristmill.synth.templates import TemplatePack
from gristmill.workflows.alignment.prompt_generation import is_usable_prompt, write_prompts
from gristmill.workflows.alignment.recipe import AlignmentRecipe
from gristmill.workflows.alignment.source import normalize_prompt

Say = Callable[[Request], str | tuple[str, str]]
TASKS = {"math": "sums", "open_qa": "facts", "two_turn": "followups"}
SUMS = {"own": ["plums"], "levels": ["school"], "topics": 0, "subtopics": 0, "forms": ["general"], "problems": 6}


class FakeSource:
    """Two tasks: `sums` that a verifier must understand (a number anywhere will do), and `facts` that it need not."""

    tasks = ("sums", "facts")
    code_tasks: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.given: list[Prompt] = []

    def task(self, pipeline: str) -> str:
        return TASKS.get(pipeline, pipeline)

    def prompts(self) -> list[Prompt]:
        return self.given

    def truth(self, task: str, messages: Conversation) -> dict[str, Any] | None:
        found = [c for c in messages[-1].content if c.isdigit()]
        return {"kind": "number", "value": int(found[0])} if found and task != "facts" else None

    def checkable(self, task: str, messages: Conversation) -> bool:
        return task != "facts"


def mill_of(
    say: Say, source: FakeSource, held_out: tuple[str, ...] = (), longest: int = 10**6, control: str | None = None, **pipelines: Any
) -> Any:
    """A mill of six sums and six facts about plums, or of what is given."""
    settings = {"math": SUMS, "open_qa": {"questions": 6, "revisions": 0}} | pipelines
    topics = {"macro": 0, "subtopics": 0, "own": ["plums"]}
    writing = {"topics": topics, "pipelines": {name: values for name, values in settings.items() if values is not None}}
    context = SimpleNamespace(
        recipe=check(AlignmentRecipe, {"world": "miniature", "control": control, **writing}),
        source=source,
        templates=TemplatePack.load("miniature"),
        held_out=frozenset(normalize_prompt([Message("user", text)]) for text in held_out),
        fits=lambda messages: sum(len(m.content) for m in messages) <= longest,
        requests=[],
    )

    class Fake:
        name = "instruct"

        def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Completion]]]:
            for request in requests:
                context.requests.append(request)
                said = say(request)
                text, finish = (said, "stop") if isinstance(said, str) else said
                yield request, [Completion(text, 1, (0.0,), finish)]  # type: ignore[arg-type]

    context.cached = CachedClient
    context.progress = SimpleNamespace(tick=None)
    context.client = BatchingClient(Fake())
    return context


def prompts_of(
    context: Any, number: int, seen: set[str], answered: set[str], folder: Path
) -> tuple[list[Prompt], list[Demonstration], dict[str, Any]]:
    """What the stage of a round leaves in its folder: prompts, whole conversations; and its summary."""
    folder.mkdir(exist_ok=True)
    facts = write_prompts(context, context.client, number, seen=seen, answered=answered, folder=folder)
    return artifacts.PROMPTS.read(folder), artifacts.CONVERSATIONS.read(folder), facts


def asked_for(request: Request) -> str:
    return request.messages[-1].content


def counting(request: Request, seen: list[str]) -> str:
    """A new sum each time; topics all alike."""
    if asked_for(request).startswith("Name"):
        return "plums"
    seen.append(request.id)
    return f"What is {len(seen)}?"


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


def test_each_pipeline_writes_for_its_task(source: FakeSource, tmp_path: Path) -> None:
    seen: list[str] = []
    context = mill_of(lambda r: counting(r, seen), source)
    prompts, whole, facts = prompts_of(context, 1, set(), set(), tmp_path)
    assert sorted(p.task for p in prompts) == ["facts"] * 6 + ["sums"] * 6 and whole == []
    assert {p.request for p in prompts} == {"Write a word sum about plums.", "Write a question about plums."}
    assert {p.origin for p in prompts} == {"instruct"} and all(len(p.parents) == 2 for p in prompts)
    assert facts == {"funnel": {"written": 12, "kept": 12}, "topics": {"sums": 1, "facts": 1}, "conversations": 0}
    assert read_rows(tmp_path / "prompts.parquet", Prompt) == prompts
    assert all((p.truth is not None) == (p.task == "sums") for p in prompts)


def test_topics_are_the_users_and_those_named_more_than_once(source: FakeSource, tmp_path: Path) -> None:
    names = iter(["pears", "slip", " Pears ", "nuts"])
    context = mill_of(
        lambda r: next(names) if asked_for(r).startswith("Name") else f"{asked_for(r)} {r.id}",
        source,
        math=SUMS | {"topics": 4},
        open_qa=None,
    )
    _, _, facts = prompts_of(context, 1, set(), set(), tmp_path)
    about = {asked_for(r).removeprefix("Write a word sum about ") for r in context.requests if asked_for(r).startswith("Write")}
    assert about == {"plums.", "pears."} and facts["topics"] == {"sums": 2}


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (("What is 2", "length"), "cut off"),
        ("  ", "cut off"),
        (" what  IS one?", "held out"),
        ("Seen 7?", "repeated"),
        ("2" * 99, "too long"),
        ("What is that?", "not understood"),
    ],
)
def test_what_is_dropped_and_why(source: FakeSource, tmp_path: Path, said: Any, why: str) -> None:
    only = SUMS | {"problems": 1}
    context = mill_of(lambda r: said, source, held_out=("What is one?",), longest=50, math=only, open_qa=None)
    prompts, _, facts = prompts_of(context, 1, {"seen 7?"}, set(), tmp_path)
    assert prompts == [] and facts["funnel"][why] == 1 and facts["funnel"]["kept"] == 0


def test_a_prompt_is_written_once_in_all_rounds(source: FakeSource, tmp_path: Path) -> None:
    seen: set[str] = set()
    context = mill_of(lambda r: " What is  5? ", source)
    prompts, _, facts = prompts_of(context, 1, seen, set(), tmp_path / "1")
    assert [p.messages[-1].content for p in prompts] == ["What is  5?"] and facts["funnel"]["repeated"] == 1
    again, _, facts = prompts_of(context, 2, seen, set(), tmp_path / "2")
    assert again == [] and facts["funnel"] == {"written": 2, "repeated": 2, "kept": 0}


def test_requests_differ_between_rounds_and_not_between_starts(source: FakeSource, tmp_path: Path) -> None:
    ids = []
    for start, number in enumerate((1, 1, 2)):
        context = mill_of(asked_for, source)
        prompts_of(context, number, set(), set(), tmp_path / str(start))
        ids.append({r.id for r in context.requests})
    assert ids[0] == ids[1] and ids[0].isdisjoint(ids[2])


def test_what_was_asked_is_not_asked_again(source: FakeSource, tmp_path: Path) -> None:
    seen: list[str] = []
    context = mill_of(lambda r: counting(r, seen), source)
    first = prompts_of(context, 1, set(), set(), tmp_path)
    assert context.requests
    context.requests.clear()
    assert prompts_of(context, 1, set(), set(), tmp_path) == first and context.requests == []


def test_without_a_verifier_a_prompt_must_still_make_sense(source: FakeSource, tmp_path: Path) -> None:
    texts = (text for i in itertools.count() for text in (f"What is {i}?", "What is that?"))
    context = mill_of(lambda r: next(texts), source, control="reward-only")
    prompts, _, facts = prompts_of(context, 1, set(), set(), tmp_path)
    assert all(p.truth is None for p in prompts) and {p.task for p in prompts} == {"sums", "facts"}
    assert facts["funnel"]["not understood"] == 1


def test_given_prompts_come_first_and_are_decontaminated(source: FakeSource, tmp_path: Path) -> None:
    texts = ["What is 1?", "Held 3?", "Why?"]
    source.given = [Prompt(f"g{i}", "sums", (Message("user", t),), "file") for i, t in enumerate(texts)]
    context = mill_of(lambda r: "What is 1?", source, held_out=("held  3?",))
    prompts, _, facts = prompts_of(context, 1, set(), set(), tmp_path)
    assert sorted(p.id for p in prompts) == ["g0", "g2"]
    assert facts["funnel"] == {"from file": 3, "held out": 1, "written": 2, "repeated": 2, "kept": 2}


def test_given_prompts_are_asked_until_an_answer_was_kept(source: FakeSource, tmp_path: Path) -> None:
    source.given = [Prompt(f"g{i}", "sums", (Message("user", f"How much is {i}?"),), "file") for i in range(3)]
    context = mill_of(lambda r: "", source)
    seen: set[str] = set()
    prompts_of(context, 1, seen, set(), tmp_path / "1")
    prompts, _, facts = prompts_of(context, 2, seen, {"g1"}, tmp_path / "2")
    assert sorted(p.id for p in prompts) == ["g0", "g2"]
    assert facts["funnel"]["from file"] == 3 and facts["funnel"]["answered before"] == 1


def test_conversations_that_a_pipeline_writes_whole_are_handed_on(source: FakeSource, tmp_path: Path) -> None:
    numbers = itertools.count()
    context = mill_of(
        lambda r: f"Said {next(numbers)}.",
        source,
        held_out=("said 1.",),
        math=None,
        open_qa=None,
        incapable={"lacks": ["eyes"], "tasks": 3},
    )
    prompts, whole, facts = prompts_of(context, 1, set(), set(), tmp_path)
    assert prompts == [] and len(whole) == facts["conversations"] == 2, "one of three asks what is held out"
    assert read_rows(tmp_path / "conversations.parquet", Demonstration) == whole


# ---- second turns ----


def conversing() -> Say:
    numbers = iter(range(10, 999))

    def say(request: Request) -> str:
        text = asked_for(request)
        if text.startswith("Name"):
            return "plums"
        if text.startswith("Asked"):
            return f"And {next(numbers)} more?"
        return f"What is {next(numbers)}?" if text.startswith("Write") else "It is so."

    return say


TWO = {"two_turn": {"prompts": 4}, "math": SUMS | {"problems": 4}, "open_qa": {"questions": 4, "revisions": 0}}


def test_second_turns_grow_from_first_ones(source: FakeSource, tmp_path: Path) -> None:
    source.code_tasks = frozenset({"facts"})
    context = mill_of(conversing(), source, **TWO)
    prompts, _, facts = prompts_of(context, 1, set(), set(), tmp_path)
    first = {p.id: p for p in prompts if p.task != "followups"}
    second = [p for p in prompts if p.task == "followups"]
    assert len(first) == 8 and len(second) == 4, "programs have no second turn"
    for p in second:
        origin = first[p.parents[-1]]
        assert origin.task == "sums" and p.messages[:2] == (*origin.messages, Message("assistant", "It is so."))
        assert p.request == f"Asked: {origin.messages[0].content}\nSaid: It is so.\nWrite the next question."
    assert facts["funnel"] == {"written": 12, "kept": 12}


def test_second_turns_never_ask_what_is_held_out(source: FakeSource, tmp_path: Path) -> None:
    say = conversing()
    context = mill_of(lambda r: "Secret 4?" if asked_for(r).startswith("Asked") else say(r), source, held_out=("secret 4?",), **TWO)
    prompts, _, facts = prompts_of(context, 1, set(), set(), tmp_path)
    assert not [p for p in prompts if p.task == "followups"] and facts["funnel"]["held out"] == 4


def test_a_second_turn_is_only_kept_where_it_fits(source: FakeSource, tmp_path: Path) -> None:
    say = conversing()
    context = mill_of(lambda r: "so " * 50 if asked_for(r).startswith("What") else say(r), source, longest=100, **TWO)
    prompts, _, facts = prompts_of(context, 1, set(), set(), tmp_path)
    assert len(prompts) == 8 and facts["funnel"]["too long"] == 4


def test_a_talk_that_has_its_second_turn_gets_no_third(source: FakeSource, tmp_path: Path) -> None:
    talk = (Message("user", "What is 1?"), Message("assistant", "1."), Message("user", "And 2 more?"))
    source.given = [Prompt("talk", "followups", talk, "file")]
    context = mill_of(conversing(), source, **TWO | {"two_turn": {"prompts": 99}})
    prompts, _, _ = prompts_of(context, 1, set(), set(), tmp_path)
    assert max(len(p.messages) for p in prompts) == 3 and "talk" in {p.id for p in prompts}


# ---- the probe of by_task ----

GOOD = "Which of these plums is the ripest, and why number {n}?"


def by_task_of(source: FakeSource, say: Say, **probe: Any) -> Any:
    context = mill_of(say, source, math=None, open_qa=None, by_task={"prompts": 6, "max_tokens": 40})
    context.recipe = context.recipe.model_copy(update={"probe": context.recipe.probe.model_validate(probe)})
    return context


def test_a_model_that_can_write_is_asked_for_nothing_twice(source: FakeSource, tmp_path: Path) -> None:
    numbers = itertools.count()
    context = by_task_of(source, lambda r: GOOD.format(n=next(numbers)), num_prompts=5)
    prompts, _, facts = prompts_of(context, 1, set(), set(), tmp_path)
    assert len(prompts) == 12 and "probe" not in facts
    assert len(context.requests) == len({r.id for r in context.requests}) == 12


@pytest.mark.parametrize(
    "said", ["", "## ** ## ||", "\u0000\u0001\ufffd\ufffd\ufffd abcdefgh", "so so so so so so so so so so", ("Which of", "length"), GOOD]
)
def test_a_model_that_cannot_is_found_out_by_a_few_calls(said: str | tuple[str, str], source: FakeSource, tmp_path: Path) -> None:
    context = by_task_of(source, lambda r: said)  # the last one is fine, but always the same
    prompts, _, facts = prompts_of(context, 1, set(), set(), tmp_path)
    assert prompts == [] and len(context.requests) == 8
    assert facts["probe"]["asked"] == 8 and facts["probe"]["usable"] <= 1 and facts["probe"]["instead"] == ""


def test_the_fallback_writes_in_its_place(source: FakeSource, tmp_path: Path) -> None:
    numbers = itertools.count()
    context = by_task_of(
        source,
        lambda r: GOOD.format(n=next(numbers)) if "question about" in asked_for(r) else "?",
        fallback={"open_qa": {"questions": 4, "revisions": 0}},
    )
    prompts, _, facts = prompts_of(context, 1, set(), set(), tmp_path)
    assert [p.task for p in prompts] == ["facts"] * 4 and facts["probe"]["instead"] == "open_qa"


def test_without_a_probe_everything_is_bought(source: FakeSource, tmp_path: Path) -> None:
    context = by_task_of(source, lambda r: "?", num_prompts=0)
    _, _, facts = prompts_of(context, 1, set(), set(), tmp_path)
    assert len(context.requests) == 12 and "probe" not in facts


@pytest.mark.parametrize(
    "text",
    [
        "What is 12 + 7?",
        "Write a haiku about rain.",
        "\u4ec0\u4e48\u662f\u5149\u5408\u4f5c\u7528\uff1f",
        "def f(x): return x  # what does it do?",
    ],
)
def test_prompts_of_many_kinds_are_usable(text: str) -> None:
    assert is_usable_prompt(text)
