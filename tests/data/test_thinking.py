"""The thinking toggle: its line in the system turn, the form of an answer, Llama-Nemotron's records, the server's switch."""

import json
from pathlib import Path

import pytest

from gristmill.core.errors import InputError
from gristmill.data.chat import Conversation, Message
from gristmill.data.chat_format import FORMATS
from gristmill.data.readers import read_demonstrations
from gristmill.data.thinking import (
    THINKING_OFF,
    THINKING_ON,
    keeps_form,
    nemotron_record,
    split_answer,
    thinking_answer,
    toggle_of,
    with_toggle,
)
from gristmill.data.tokenizer import Tokenizer

ASKED = (Message("user", "2 and 2?"),)


def test_the_toggle_takes_the_place_of_one_that_is_there_and_keeps_what_else_the_system_turn_says() -> None:
    assert with_toggle(ASKED, "on") == (Message("system", THINKING_ON), *ASKED)
    said = (Message("system", f"Be kind.\n{THINKING_ON.upper()}\nBe short."), *ASKED)
    assert toggle_of(said) == "on"
    off = with_toggle(said, "off")
    assert toggle_of(off) == "off" and off[0].content == f"{THINKING_OFF}\n\nBe kind.\nBe short." and off[1:] == ASKED
    assert with_toggle(with_toggle(off, "on"), "off") == off and toggle_of(ASKED) is None
    with pytest.raises(InputError, match="both"):
        toggle_of((Message("system", f"{THINKING_ON}\n{THINKING_OFF}"), *ASKED))


def test_trace_and_reply_of_an_answer() -> None:
    assert split_answer(thinking_answer("2 + 2 = 4.", "4")) == ("2 + 2 = 4.", "4") and keeps_form(thinking_answer("2", "4"), True)
    assert split_answer("4") == ("", "4") and split_answer("<think>2") == ("", "<think>2")


@pytest.mark.parametrize("mode", ["on", "off"])
def test_records_of_llama_nemotron_come_back_as_they_were(tmp_path: Path, mode: str) -> None:
    answer = thinking_answer("2 + 2 = 4.", "4") if mode == "on" else "4"
    talk: Conversation = (*with_toggle(ASKED, mode), Message("assistant", answer))  # type: ignore[arg-type]
    record = nemotron_record(talk, category="math", generator="people")
    assert record["reasoning"] == mode and record["input"] == [{"role": "user", "content": "2 and 2?"}] and record["output"] == answer
    rows = [record, record | {"system_prompt": ""}, record | {"system_prompt": None}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row.messages for row in read_demonstrations(tmp_path / "rows.jsonl")] == [talk] * 3
    (tmp_path / "wrong.jsonl").write_text(json.dumps(record | {"reasoning": "off" if mode == "on" else "on"}))
    with pytest.raises(InputError, match="`reasoning` is"):
        read_demonstrations(tmp_path / "wrong.jsonl")


def test_the_switch_of_a_server_is_the_toggle_for_a_model_with_tokens_for_thinking() -> None:
    form = FORMATS["nemotron"]
    plain = Tokenizer.train(["System\nUser\nAssistant\n"], 300, form.special_tokens)
    tokenizer = plain.with_tokens(["<think>", "</think>"], special=False)
    for name, value, mode in (("enable_thinking", True, "on"), ("thinking", False, "off")):
        found = form.render_turns(ASKED, tokenizer, variables={name: value})
        assert found == form.render_prompt(with_toggle(ASKED, mode), tokenizer)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=f"has no '{name}'"):
            form.render_turns(ASKED, plain, variables={name: value})
    for variables, words in (({"enable_thinking": 1}, "true or false"), ({"documents": []}, "has no 'documents'")):
        with pytest.raises(InputError, match=words):
            form.render_turns(ASKED, tokenizer, variables=variables)
    ids = tokenizer.encode(thinking_answer("a", "b"))
    assert len(ids) == 4 and tokenizer.decode(ids) == "<think>a</think>b", "a token each, which an answer shows"
