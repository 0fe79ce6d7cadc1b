"""Dataset formats: what public data sets look like, read or refused."""

from typing import Any

import pytest

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.data.formats import parse_conversation, parse_pair


def talk(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    turns = tuple(Message("assistant" if i % 2 else "user", c) for i, c in enumerate(contents))
    return turns if system is None else (Message("system", system), *turns)


def openai(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    return [{"role": m.role, "content": m.content} for m in talk(*contents, system=system)]


def sharegpt(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": who, "value": said} for who, said in pairs]


QA = talk("How far?", "Two miles.")
DEMONSTRATIONS: dict[str, tuple[dict[str, Any], tuple[Message, ...]]] = {
    "openai": ({"messages": openai("How far?", "Two miles.")}, QA),
    "openai with parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, *openai("", "c")[1:]]},
        talk("a\nb", "c"),
    ),
    "openai with fields that hold nothing": (
        {
            "messages": [{"role": "developer", "content": "s"}, *({**m, "tool_calls": None, "name": None} for m in openai("a", "b"))],
            "tools": [],
        },
        talk("a", "b", system="s"),
    ),
    "messages and a system column": ({"system": "s", "messages": openai("a", "b")}, talk("a", "b", system="s")),
    "messages and the prompt again": ({"prompt": "a", "messages": openai("a", "b")}, talk("a", "b")),
    "sharegpt": (
        {"conversations": sharegpt(("system", "s"), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")), "tools": ""},
        talk("a", "b", "c", "d", system="s"),
    ),
    "sharegpt of other names": ({"conversations": sharegpt(("user", "a"), ("chatgpt", "b"))}, talk("a", "b")),
    "wildchat": ({"conversation": [m | {"language": "English"} for m in openai("a", "b")], "model": "m"}, talk("a", "b")),
    "prompt and response": ({"prompt": "How far?", "response": "Two miles."}, QA),
    "trl prompt-completion": ({"prompt": "How far?", "completion": "Two miles."}, QA),
    "trl prompt-completion of turns": (
        {"prompt": openai("a", system="s"), "completion": [{"role": "assistant", "content": "b"}]},
        talk("a", "b", system="s"),
    ),
    "alpaca": ({"instruction": "How far?", "input": "", "output": "Two miles."}, QA),
    "alpaca with an input": ({"instruction": "Add.", "input": "1 2", "output": "3", "system": "s"}, talk("Add.\n\n1 2", "3", system="s")),
    "alpaca with earlier turns": ({"instruction": "c", "output": "d", "history": [["a", "b"]]}, talk("a", "b", "c", "d")),
    "dolly": ({"instruction": "Who?", "context": "Ann came.", "response": "Ann.", "category": "qa"}, talk("Who?\n\nAnn came.", "Ann.")),
    "question and answer": ({"question": "How far?", "answer": "Two miles."}, QA),
    "openorca": ({"id": "1", "system_prompt": "s", "question": "a", "response": "b"}, talk("a", "b", system="s")),
    "metamath": ({"query": "a", "response": "b", "type": "t"}, talk("a", "b")),
    "helpsteer2": ({"prompt": "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc", "response": "d"}, talk("a", "b", "c", "d")),
    "nemo's prompt": (
        {"prompt": "<extra_id_0>System\ns\n<extra_id_1>User\na\n<extra_id_1>Assistant\n", "response": "b"},
        talk("a", "b", system="s"),
    ),
    "a mark within a line is text": ({"prompt": "say <extra_id_1>User", "response": "b"}, talk("say <extra_id_1>User", "b")),
}


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_demonstrations_of_every_form(name: str) -> None:
    record, expected = DEMONSTRATIONS[name]
    assert parse_conversation(record, answered=True)[0] == expected


@pytest.mark.parametrize(
    "name", [n for n, (r, _) in DEMONSTRATIONS.items() if not {"messages", "conversations", "conversation"} & r.keys()]
)
def test_prompts_of_every_form(name: str) -> None:
    record, expected = DEMONSTRATIONS[name]
    assert parse_conversation(record, answered=False)[0] == expected[:-1]


def test_columns_that_mean_nothing_to_training_are_kept() -> None:
    record = {"messages": openai("a", "b"), "source": "forum", "stars": 3, "nothing": None, "id": "7"}
    assert parse_conversation(record, answered=True, known=("id",))[1] == {"source": "forum", "stars": 3}
    assert parse_conversation({"prompt": "a", "response": "b"}, answered=False)[1] == {"response": "b"}
    assert parse_pair({"prompt": "q", "chosen": "a", "rejected": "b", "annotator": {"age": 3}})[3] == {"annotator": {"age": 3}}


CALL = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": openai("a", "b"), "tools": [{"type": "function"}]}, "`tools`"),
    ({"messages": openai("a", "b"), "functions": [{"name": "f"}]}, "`functions`"),
    ({"messages": openai("a", "b"), "images": ["x.png"]}, "`images`"),
    ({"messages": [*openai("a"), {"role": "assistant", "content": None, "tool_calls": CALL}]}, "turn 2 of `messages` calls a tool"),
    ({"messages": [*openai("a"), {"role": "assistant", "content": "b", "function_call": {"name": "f"}}]}, "calls a tool"),
    ({"messages": [*openai("a", "b"), {"role": "tool", "content": "r", "tool_call_id": "1"}]}, "turn 3 .* a tool"),
    ({"messages": [{"role": "user", "content": "a", "name": "ann"}, *openai("", "b")[1:]]}, "`name` 'ann'"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, *openai("", "b")[1:]]},
        "parts that are not text",
    ),
    ({"messages": [*openai("a"), {"role": "assistant", "content": "b", "prefix": True}]}, "`prefix`"),
    ({"messages": openai("a", "b", "c")}, "must end with the assistant"),
    ({"messages": openai("a", "b")[1:]}, "'assistant' where 'user'"),
    ({"messages": "a"}, "list of turns"),
    ({"messages": [{"role": "critic", "content": "a"}]}, "'critic'"),
    ({"messages": [{"role": "user", "content": 3}]}, "no text"),
    ({"messages": openai("a", "b"), "system": "s", "prompt": "other"}, "both `messages` and `prompt`"),
    ({"messages": openai("a", "b", system="s"), "system": "t"}, "`system`"),
    ({"messages": openai("a", "b"), "conversations": sharegpt(("human", "x"), ("gpt", "y"))}, "different conversations"),
    ({"messages": openai("a", "b"), "response": "c"}, "both `messages` and `response`"),
    ({"conversations": sharegpt(("human", "a"), ("function_call", "{}"))}, "a tool"),
    ({"conversations": sharegpt(("human", "a"), ("observation", "r"))}, "a tool"),
    ({"prompt": "a", "completion": "b", "label": False}, "KTO"),
    ({"prompt": "a", "completion": "b", "label": 0}, "KTO"),
    ({"question": "a", "passage": "c", "answer": "b"}, "`passage`"),
    ({"question": "a", "choices": ["x", "y"], "answer": "B"}, "`choices`"),
    ({"question": "a", "options": {"A": "x", "B": "y"}, "answer": "B"}, "`options`"),
    ({"instruction": "a", "output": " \n"}, "answer is empty"),
    ({"chosen": "a", "rejected": "b", "prompt": "c"}, "gristmill train dpo"),
    ({"instruction": "a", "completions": [{"response": "b"}], "models": ["m"]}, "UltraFeedback"),
    ({"problem": "a", "solution": "b", "answer": "c"}, "`answer` and `solution`"),
    ({"question": "a", "context": "c", "answer": "b"}, "`context`"),
    ({"prompt": "a", "question": "b", "answer": "c"}, "`prompt` and `question`"),
    ({"prompt": "a"}, "its columns: prompt"),
    ({"text": "long ago"}, "pretraining"),
    ({"x": 1}, "its columns: x"),
    ({}, "its columns: none"),
    ({"prompt": ["a"], "response": "b"}, "turn 1 of `prompt` is not an object"),
    ({"prompt": 3, "response": "b"}, "list of turns"),
    ({"prompt": "a", "response": 3}, "`response` must be text"),
    ({"instruction": "a", "input": 3, "output": "b"}, "must be text"),
    ({"instruction": "a", "output": "b", "history": ["x"]}, "`history`"),
    ({"prompt": "a\n<extra_id_1>User\nb", "response": "c"}, "turns must alternate"),
]


@pytest.mark.parametrize(("record", "message"), REFUSED)
def test_what_cannot_be_used_is_refused_by_name(record: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_conversation(record, answered=True)


ANSWER, WORSE = [{"role": "assistant", "content": "x"}], [{"role": "assistant", "content": "y"}]
HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: q\n\nAssistant: "
MARKED = "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nq"
PAIRS: dict[str, tuple[dict[str, Any], tuple[Message, ...]]] = {
    "our export": ({"prompt": openai("q"), "chosen": ANSWER, "rejected": WORSE}, talk("q")),
    "our rows": ({"prompt": "0123456789abcdef", "messages": openai("q"), "chosen": "x", "rejected": "y"}, talk("q")),
    "plain": ({"prompt": "q", "chosen": "x", "rejected": "y"}, talk("q")),
    "plain prompt, sides as turns": ({"prompt": "q", "chosen": ANSWER, "rejected": WORSE}, talk("q")),
    "nemo": ({"prompt": "q", "chosen_response": "x", "rejected_response": "y"}, talk("q")),
    "implicit prompt": ({"chosen": openai("q", "x"), "rejected": openai("q", "y")}, talk("q")),
    "implicit prompt of many turns": (
        {"chosen": openai("a", "b", "q", "x", system="s"), "rejected": openai("a", "b", "q", "y", system="s")},
        talk("a", "b", "q", system="s"),
    ),
    "prompt in both sides": ({"prompt": openai("q"), "chosen": openai("q", "x"), "rejected": openai("q", "y")}, talk("q")),
    "a plain prompt in both sides": ({"prompt": "q", "chosen": openai("q", "x"), "rejected": openai("q", "y")}, talk("q")),
    "ultrafeedback": (
        {"prompt": "q", "messages": openai("q", "x"), "chosen": openai("q", "x"), "rejected": openai("q", "y"), "score_chosen": 8.0},
        talk("q"),
    ),
    "a system turn in the prompt alone": (
        {"prompt": openai("q", system="s"), "chosen": openai("q", "x"), "rejected": openai("q", "y")},
        talk("q", system="s"),
    ),
    "orca": ({"system": "s", "question": "q", "chosen": "x", "rejected": "y"}, talk("q", system="s")),
    "llama-factory": (
        {"conversations": sharegpt(("human", "q")), "chosen": {"from": "gpt", "value": "x"}, "rejected": {"from": "gpt", "value": "y"}},
        talk("q"),
    ),
    "hh": ({"chosen": HH + "x", "rejected": HH + "y"}, talk("a", "b", "q")),
    "hh with a prompt": ({"prompt": HH, "chosen": "x", "rejected": "y"}, talk("a", "b", "q")),
    "helpsteer's turns": ({"prompt": MARKED, "chosen": "x", "rejected": "y"}, talk("a", "b", "q")),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_every_form(name: str) -> None:
    record, prompt = PAIRS[name]
    assert parse_pair(record, known=("score_chosen",)) == (prompt, "x", "y", {})


NO_PAIRS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "q", "completion": "x", "label": True}, "KTO"),
    ({"prompt": "q", "chosen": "x"}, "lacks `rejected`"),
    ({"prompt": "q", "response": "x"}, "gristmill train sft"),
    ({"messages": openai("q", "x")}, "gristmill train sft"),
    ({"prompt": "q", "response": "x", "helpfulness": 3, "correctness": 3}, "gristmill train reward"),
    ({"context": openai("q"), "response1": "x", "response2": "y", "overall_preference": 1}, "HelpSteer"),
    ({"instruction": "q", "completions": [{"response": "x"}]}, "UltraFeedback"),
    ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "implicit prompt"),
    ({"chosen": ANSWER, "rejected": WORSE}, "there is no prompt"),
    ({"chosen": openai("q", "x"), "rejected": openai("r", "y")}, "differ before their last answer"),
    ({"prompt": "p", "chosen": openai("q", "x"), "rejected": openai("q", "y")}, "another than `prompt`"),
    ({"prompt": openai("p"), "chosen": openai("q", "x"), "rejected": openai("q", "y")}, "another than `prompt`"),
    ({"prompt": openai("q", system="s"), "chosen": openai("q", "x", system="t"), "rejected": openai("q", "y")}, "system turn"),
    ({"messages": openai("q", "z"), "chosen": openai("q", "x"), "rejected": openai("q", "y")}, "is not `chosen`"),
    ({"prompt": "q", "chosen": "x", "rejected": 3}, "`rejected` must be text"),
    ({"prompt": "q", "chosen": [], "rejected": "y"}, "list of turns"),
    ({"prompt": "q", "chosen": "x", "rejected": "y", "tools": [{}]}, "`tools`"),
    ({"prompt": openai("q"), "chosen": [{"role": "assistant", "content": "x", "weight": 0}], "rejected": "y"}, "weight 0"),
    ({"prompt": "q", "chosen": [{"role": "system", "content": "s"}], "rejected": "y"}, "another than `prompt`"),
    ({"chosen": openai("q", "x", "z"), "rejected": openai("q", "y", "z")}, "must end with the assistant"),
]


@pytest.mark.parametrize(("record", "message"), NO_PAIRS)
def test_what_is_no_pair_is_refused_by_name(record: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_pair(record)
