"""How prompts are written, with a fake model that says what the test wants."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gristmill.chat import Conversation, Message
from gristmill.engine.generator import Completion, Request
from gristmill.flywheel import recipe as recipes
from gristmill.flywheel.source import fold
from gristmill.flywheel.writing import MIN_NAMED, write_prompts
from gristmill.rows import Prompt, read_rows

Say = Callable[[Request], str | tuple[str, str]]
ENGINE: Any = SimpleNamespace(name="instruct")


class FakeSource:
    """Two tasks: `sums` that a verifier must understand (a number anywhere will do), and `facts` that it need not."""

    topic_requests = {"sums": "Topic of sums?", "facts": "Topic of facts?"}
    prompt_requests = {"sums": "Write {task} about {topic}.", "facts": "Write {task} about {topic}."}
    next_request = "Asked {question} said {answer}. Next?"
    code_tasks: frozenset[str] = frozenset()
    followup_task: str | None = None

    def __init__(self) -> None:
        self.given: list[Prompt] = []
        self.manual: dict[str, list[str]] = {}

    def topics(self) -> dict[str, list[str]]:
        return self.manual

    def prompts(self) -> list[Prompt]:
        return self.given

    def truth(self, task: str, messages: Conversation) -> dict[str, Any] | None:
        found = [c for c in messages[-1].content if c.isdigit()]
        return {"kind": "number", "value": int(found[0])} if found and task != "facts" else None

    def checkable(self, task: str, messages: Conversation) -> bool:
        return task != "facts"


def mill_of(say: Say, source: FakeSource, held_out: tuple[str, ...] = (), longest: int = 10**6, **writing: Any) -> Any:
    values = {"topics": 4, "prompts": 6} | writing
    control = values.pop("control", None)
    mill = SimpleNamespace(
        recipe=recipes.parse({"world": "miniature", "control": control, "writing": values}),
        source=source,
        held_out=frozenset(fold([Message("user", text)]) for text in held_out),
        fits=lambda messages: sum(len(m.content) for m in messages) <= longest,
        journals={},
    )

    def generate(engine: Any, requests: list[Request], journal: Path) -> dict[str, list[Completion]]:
        mill.journals[journal.name] = requests
        assert len({r.id for r in requests}) == len(requests)
        said = {r.id: say(r) for r in requests}
        pairs = {i: (s, "stop") if isinstance(s, str) else s for i, s in said.items()}
        return {i: [Completion(text, 1, (0.0,), finish)] for i, (text, finish) in pairs.items()}

    mill.generate = generate
    return mill


def asked_for(request: Request) -> str:
    return request.messages[-1].content


def counting(request: Request, seen: list[str]) -> str:
    """A new sum each time; topics all alike."""
    if asked_for(request).startswith("Topic"):
        return "plums"
    seen.append(request.id)
    return f"What is {len(seen)}?"


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


def test_each_task_gets_its_share_about_its_topics(source: FakeSource, tmp_path: Path) -> None:
    seen: list[str] = []
    mill = mill_of(lambda r: counting(r, seen), source)
    prompts, facts = write_prompts(mill, ENGINE, 1, set(), set(), tmp_path)
    assert sorted(p.task for p in prompts) == ["facts"] * 6 + ["sums"] * 6
    assert {p.request for p in prompts} == {"Write sums about plums.", "Write facts about plums."}
    assert {p.origin for p in prompts} == {"instruct"} and all(len(p.parents) == 1 for p in prompts)
    assert facts == {"funnel": {"written": 12, "kept": 12}, "topics": {"sums": 1, "facts": 1}}
    assert read_rows(tmp_path / "prompts.parquet", Prompt) == prompts
    assert all((p.truth is not None) == (p.task == "sums") for p in prompts)


def test_topics_are_the_users_and_those_named_more_than_once(source: FakeSource, tmp_path: Path) -> None:
    source.manual = {"sums": ["pears"], "other": ["x"]}
    names = iter(["plums", "slip", "plums", " pears ", *["long " * 20, "two\nlines", "", "nuts"]])
    mill = mill_of(lambda r: next(names) if asked_for(r).startswith("Topic") else asked_for(r), source, prompts=4)
    write_prompts(mill, ENGINE, 1, set(), set(), tmp_path)
    asked = [asked_for(r) for r in mill.journals["prompts.jsonl"]]
    assert MIN_NAMED == 2 and asked[:4] == [f"Write sums about {t}." for t in ("pears", "plums", "pears", "plums")]
    assert asked[4:] == ["Write facts about ."] * 4, "no topic is left: the model is asked without"


def test_an_unfinished_topic_does_not_count(source: FakeSource, tmp_path: Path) -> None:
    mill = mill_of(lambda r: ("plums", "length") if asked_for(r).startswith("Topic") else "1?", source)
    assert write_prompts(mill, ENGINE, 1, set(), set(), tmp_path)[1]["topics"] == {"sums": 0, "facts": 0}


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (("What is 2", "length"), "unfinished"),
        ("  ", "unfinished"),
        (" what  IS one?", "held out"),
        ("Seen 7?", "repeated"),
        ("2" * 99, "too long"),
        ("What is that?", "not understood"),
    ],
)
def test_what_is_dropped_and_why(source: FakeSource, tmp_path: Path, said: Any, why: str) -> None:
    source.topic_requests = {}
    source.prompt_requests = {"sums": "Write."}
    mill = mill_of(lambda r: said, source, held_out=("What is one?",), longest=50, prompts=3)
    prompts, facts = write_prompts(mill, ENGINE, 1, {"seen 7?"}, set(), tmp_path)
    assert prompts == [] and facts["funnel"] == {"written": 3, why: 3, "kept": 0}


def test_a_prompt_is_written_once_in_all_rounds(source: FakeSource, tmp_path: Path) -> None:
    seen: set[str] = set()
    mill = mill_of(lambda r: " What is  5? ", source)
    prompts, facts = write_prompts(mill, ENGINE, 1, seen, set(), tmp_path)
    assert [p.messages[-1].content for p in prompts] == ["What is  5?"] and facts["funnel"]["repeated"] == 11
    again, facts = write_prompts(mill, ENGINE, 2, seen, set(), tmp_path)
    assert again == [] and facts["funnel"] == {"written": 12, "repeated": 12, "kept": 0}


def test_requests_differ_between_rounds_and_not_between_starts(source: FakeSource, tmp_path: Path) -> None:
    ids = []
    for number in (1, 1, 2):
        mill = mill_of(asked_for, source)
        write_prompts(mill, ENGINE, number, set(), set(), tmp_path)
        ids.append({r.id for requests in mill.journals.values() for r in requests})
    assert ids[0] == ids[1] and ids[0].isdisjoint(ids[2])


def test_without_a_verifier_a_prompt_must_still_make_sense(source: FakeSource, tmp_path: Path) -> None:
    texts = (text for i in itertools.count() for text in (f"What is {i}?", "What is that?"))
    mill = mill_of(lambda r: next(texts), source, control="reward-only")
    prompts, facts = write_prompts(mill, ENGINE, 1, set(), set(), tmp_path)
    assert all(p.truth is None for p in prompts) and {p.task for p in prompts} == {"sums", "facts"}
    assert facts["funnel"]["not understood"] == 3


def test_given_prompts_come_first_and_are_decontaminated(source: FakeSource, tmp_path: Path) -> None:
    texts = ["What is 1?", "Held 3?", "Why?"]
    source.given = [Prompt(f"g{i}", "sums", (Message("user", t),), "file") for i, t in enumerate(texts)]
    mill = mill_of(lambda r: "What is 1?", source, held_out=("held  3?",))
    prompts, facts = write_prompts(mill, ENGINE, 1, set(), set(), tmp_path)
    assert sorted(p.id for p in prompts) == ["g0", "g2"]
    assert facts["funnel"] == {"from file": 3, "held out": 1, "written": 12, "repeated": 12, "kept": 2}


def test_given_prompts_are_asked_until_an_answer_was_kept(source: FakeSource, tmp_path: Path) -> None:
    source.given = [Prompt(f"g{i}", "sums", (Message("user", f"How much is {i}?"),), "file") for i in range(3)]
    mill = mill_of(lambda r: "", source)
    seen: set[str] = set()
    write_prompts(mill, ENGINE, 1, seen, set(), tmp_path)
    prompts, facts = write_prompts(mill, ENGINE, 2, seen, {"g1"}, tmp_path)
    assert sorted(p.id for p in prompts) == ["g0", "g2"]
    assert facts["funnel"]["from file"] == 3 and facts["funnel"]["answered before"] == 1


# ---- second turns ----


def conversing(source: FakeSource) -> Say:
    source.followup_task = "followups"
    numbers = iter(range(10, 999))

    def say(request: Request) -> str:
        text = asked_for(request)
        if text.startswith("Topic"):
            return "plums"
        if text.startswith("Asked"):
            return f"And {next(numbers)} more?"
        return f"What is {next(numbers)}?" if text.startswith("Write") else "It is so."

    return say


def test_second_turns_grow_from_first_ones(source: FakeSource, tmp_path: Path) -> None:
    source.code_tasks = frozenset({"facts"})
    mill = mill_of(conversing(source), source, prompts=4)
    prompts, facts = write_prompts(mill, ENGINE, 1, set(), set(), tmp_path)
    first = {p.id: p for p in prompts if p.task != "followups"}
    second = [p for p in prompts if p.task == "followups"]
    assert len(first) == 8 and len(second) == 4, "programs have no second turn"
    for p in second:
        origin = first[p.parents[0]]
        assert origin.task == "sums" and p.messages[:2] == (*origin.messages, Message("assistant", "It is so."))
        assert p.request == f"Asked {origin.messages[0].content} said It is so.. Next?"
    assert facts["funnel"] == {"written": 12, "kept": 12}


def test_second_turns_never_ask_what_is_held_out(source: FakeSource, tmp_path: Path) -> None:
    say = conversing(source)
    mill = mill_of(lambda r: "Secret 4?" if asked_for(r).startswith("Asked") else say(r), source, held_out=("secret 4?",), prompts=4)
    prompts, facts = write_prompts(mill, ENGINE, 1, set(), set(), tmp_path)
    assert not [p for p in prompts if p.task == "followups"] and facts["funnel"]["held out"] == 4


def test_a_second_turn_is_only_asked_for_where_it_fits(source: FakeSource, tmp_path: Path) -> None:
    say = conversing(source)
    mill = mill_of(lambda r: "so " * 50 if asked_for(r).startswith("What") else say(r), source, longest=100, prompts=4)
    prompts, facts = write_prompts(mill, ENGINE, 1, set(), set(), tmp_path)
    assert mill.journals["next.jsonl"] == [] and len(prompts) == 8
    assert facts["funnel"]["too long"] == 4


def test_a_talk_that_has_its_second_turn_gets_no_third(source: FakeSource, tmp_path: Path) -> None:
    talk = (Message("user", "What is 1?"), Message("assistant", "1."), Message("user", "And 2 more?"))
    source.given = [Prompt("talk", "followups", talk, "file")]
    mill = mill_of(conversing(source), source, prompts=99)
    prompts, _ = write_prompts(mill, ENGINE, 1, set(), set(), tmp_path)
    assert max(len(p.messages) for p in prompts) == 3 and "talk" in {p.id for p in prompts}
