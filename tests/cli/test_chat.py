"""Chat in the terminal: what is said, saved and resumed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gristmill.cli.chat import ChatSession
from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.data.chat_format import FORMATS
from gristmill.data.readers import read_demonstrations
from gristmill.data.tokenizer import Tokenizer
from gristmill.engine.engine import Engine
from gristmill.generation.api import Request, SamplingParams
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.transformer import Transformer


@pytest.fixture(scope="module")
def engine() -> Engine:
    tokenizer = Tokenizer.train(["hello \x1b[31m"] * 3, 300, FORMATS["chatml"].special_tokens)
    blocks = uniform_blocks(num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, ffn_size=32)
    model = Transformer(ModelConfig("nemotron", tokenizer.vocab_size, 16, blocks, max_positions=256))
    return Engine(model, tokenizer, FORMATS["chatml"], name="mill", max_batch=1)


def talk(engine: Engine, lines: Sequence[str], **more: Any) -> ChatSession:
    rest = iter([f"{line}\n" for line in lines])
    session = ChatSession(engine, SamplingParams(temperature=1.0, max_tokens=12), read_line=lambda: next(rest, ""), **more)
    session.run()
    return session


def turns(file: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in file.read_text().splitlines()]


def test_answers_are_streamed_and_those_of_the_engine(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    session = talk(engine, ["Hi", "More"], system="Be kind.")
    asked = (Message("system", "Be kind."), Message("user", "Hi"))
    ((_, (first,)),) = engine.generate([Request("0", asked, SamplingParams(temperature=1.0, max_tokens=12))])
    assert [message.role for message in session.talk] == ["system", "user", "assistant", "user", "assistant"]
    assert session.talk[2].content == first.text
    out, err = capsys.readouterr()
    assert "mill> " in out and "\x1b" not in out and err.count("tokens, ") == 2 and "a second" in err


def test_a_history_is_saved_and_goes_on(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "talks.jsonl"
    talk(engine, ["Hi"], history=file, system="Be kind.")
    assert [turn["role"] for turn in turns(file)[0]] == ["system", "user", "assistant"]
    session = talk(engine, ["More", "/new", "Again"], history=file)
    assert "goes on, with 3 messages" in capsys.readouterr().err
    assert [len(one) for one in turns(file)] == [5, 3] and turns(file)[1][0] == {"role": "system", "content": "Be kind."}
    assert len(session.talk) == 3 and len(read_demonstrations(file)) == 2  # it is a file of demonstrations


def test_thinking_stays_switched_whatever_the_system_message_is(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "talks.jsonl"
    talk(engine, ["Hi"], history=file, system="Be kind.")
    session = talk(engine, ["More", "/system Be short.", "Again", "/system", "And"], history=file, thinking="on")
    on = "detailed thinking on"
    assert [one[0]["content"] for one in turns(file)] == [f"{on}\n\nBe kind.", f"{on}\n\nBe short.", on]
    assert session.talk[0].content == on


def test_commands(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "saved.jsonl"
    other = tmp_path / "other"
    other.write_text("mine")
    session = talk(
        engine,
        ["/regenerate", "Hi", f"/save {file}", "/regenerate", f"/save {other}", "/regenerate 0", "/etc is", " /etc is", "/undo", "/help"],
    )
    err = capsys.readouterr()
    for words in ("no question yet", "exists: give another name", "would be the same", "no /etc"):
        assert words in err.err
    assert "/regenerate [TEMPERATURE]" in err.out and other.read_text() == "mine"
    assert [(message.role, message.content) for message in session.talk[:1]] == [("user", "Hi")] and len(session.talk) == 2
    assert turns(file)[-1][1]["content"] == session.talk[1].content
    first = talk(engine, ["Hi"]).talk[1]
    assert session.talk[1] != first


def test_a_message_without_room_is_taken_back(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    session = talk(engine, ["x" * 400, "Hi"])
    assert "taken back" in capsys.readouterr().err and session.talk[0].content == "Hi"


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = ChatSession(engine, SamplingParams(max_tokens=100), read_line=iter(["Hi\n", "More\n", ""]).__next__)
    step, count = session._core.step, iter(range(100))

    def interrupted() -> None:
        if next(count) == 5:
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr(session._core, "step", interrupted)
    session.run()
    assert "5 tokens" in (err := capsys.readouterr().err) and "ended by you" in err and len(session.talk) == 4


def test_a_file_of_something_else_is_refused(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "x"
    for text in ("mine", "{}", '{"messages": 5}', '{"messages": [{"role": "user"}]}'):
        file.write_text(text)
        with pytest.raises(InputError):
            ChatSession(engine, SamplingParams(), history=file)
