"""Scores of both modes: what an answer must keep to, be and reach to count, by level and task, and under a budget."""

from gristmill.data.chat import Message
from gristmill.data.rows import Prompt
from gristmill.evaluate.reasoning import budget_score, reasoning_scores
from gristmill.generation.api import Completion
from gristmill.judge.programs import Verifier

TRACE = "3 + 4 = 7."


def prompt(name: str, mode: str, task: str = "sums", level: int = 1) -> Prompt:
    meta = {"reasoning": mode, "level": level} | ({"trace": TRACE} if task == "sums" else {})
    return Prompt(name, task, (Message("user", "3 and 4?"),), "human", (), {"kind": "number", "value": 7}, meta=meta)


def said(text: str, num_tokens: int = 4, finish: str = "stop") -> Completion:
    return Completion(text, num_tokens, (), finish)  # type: ignore[arg-type]


def test_an_answer_counts_that_ends_keeps_the_form_and_is_right() -> None:
    prompts = [prompt(f"on{i}", "on", level=1 + i % 2) for i in range(6)] + [prompt("off0", "off"), prompt("off1", "off")]
    prompts += [prompt("other", "on", task="facts"), prompt("fact", "off", task="facts")]
    answers = {
        "on0": said(f"<think>{TRACE}</think>7", 10),
        "on1": said("<think>3 + 4 = 8.</think>7", 12),  # right by chance: its step is wrong
        "on2": said("7"),
        "on3": said(f"<think>{TRACE}</think>7", finish="length"),
        "on4": said(f"<think>{TRACE}</think>8", 6),
        "on5": said(f"<think>{TRACE} {TRACE}</think>7", 14),
        "off0": said("7"),
        "off1": said(f"<think>{TRACE}</think>7"),
        "other": said("<think>hm</think>7"),
        "fact": said("7"),
    }
    found = reasoning_scores(prompts, answers, Verifier().verify, task="sums")
    assert (found["on"]["mean"], found["on"]["n"], found["off"]["mean"]) == (0.5, 6, 0.5)
    assert found["levels"]["on"] == {"1": found["levels"]["on"]["1"], "2": found["levels"]["on"]["2"]}
    assert (found["levels"]["on"]["1"]["mean"], found["levels"]["on"]["2"]["mean"]) == (0.3333, 0.6667)
    assert found["tasks"]["on"]["facts"]["mean"] == found["tasks"]["off"]["facts"]["mean"] == 1
    assert (found["obedience"]["on"]["mean"], found["obedience"]["on"]["n"]) == (0.8571, 7) and found["obedience"]["off"]["mean"] == 0.6667
    assert found["steps"]["mean"] == 0.5, "two of six have other equations than the reference, and one has none"
    assert found["tokens"]["on"] == {"right": 12.0, "wrong": 4.7}
    assert found["outcomes"]["on"] == {"on0": True, "on1": True, "on2": False, "on3": False, "on4": False, "on5": True}
    assert reasoning_scores(prompts, answers, Verifier().verify)["on"]["n"] == 7


def test_a_budget_has_a_score_and_a_length() -> None:
    prompts = [prompt("a", "on"), prompt("b", "on")]
    answers = {"a": said(f"<think>{TRACE}</think>7", 8), "b": said("<think>3 +</think>1", 5)}
    assert budget_score(prompts, answers, Verifier().verify, 4) == {
        "budget": 4,
        "mean": 0.5,
        "ci95": [0.0945, 0.9055],
        "n": 2,
        "tokens": 6.5,
    }
