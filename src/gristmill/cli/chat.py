"""Chat in the terminal: streamed answers, commands, and a history that is saved as rows of `messages`."""

import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from gristmill.core.echo import echo
from gristmill.core.errors import InputError
from gristmill.core.io import read_bytes, replacing, write_jsonl
from gristmill.core.response_text import strip_thinking
from gristmill.core.untrusted import quoted_path
from gristmill.data.chat import Message, conversation, to_dicts
from gristmill.data.thinking import with_toggle
from gristmill.engine.engine import Engine
from gristmill.generation.api import Request, SamplingParams
from gristmill.server.responses import IncrementalDetokenizer

MAX_HISTORY_BYTES = 64 << 20
HELP = """/regenerate [TEMPERATURE]  answer again, in place of the last answer
/undo                      take the last question and its answer back
/new                       start over
/system [TEXT]             start over with this system message, or without one
/save [FILE]               save the conversation, from now on after every answer
/help                      this list
An empty line or Ctrl-D ends it. Ctrl-C ends an answer. A blank before / makes a message of it."""
_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?")


class ChatSession:
    """Chat session with a model, until its input ends.

    Args:
        system: system message that conversations begin with; "": none.
        thinking: mode of thinking, whose line is put into every system message; "": none is.
        history: file of conversations, one a line; the last one goes on, and is saved after every answer.
        read_line: reads a line of the user's; "" is the end.

    Raises:
        InputError: the file holds something else than conversations.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: SamplingParams,
        *,
        seed: int = 0,
        system: str = "",
        thinking: Literal["", "on", "off"] = "",
        history: Path | None = None,
        read_line: Callable[[], str] = sys.stdin.readline,
    ) -> None:
        self.engine, self.sampling, self.seed, self.history, self.read_line = engine, sampling, seed, history, read_line
        self.earlier = _read_history(history) if history is not None and history.exists() else []
        self.thinking = thinking
        self._begin_with(system)
        if self.earlier and len(self.earlier[-1]) > 1:
            resumed = self.earlier.pop()
            if not system and resumed[0].role == "system":
                self._begin_with(resumed[0].content)
            self.talk = [*self.system, *(message for message in resumed if message.role != "system")]
            echo(f"The conversation of {quoted_path(history or Path())} goes on, with {len(resumed)} messages; /new starts over.", err=True)
        self._core = engine.core()
        self._num_answers = 0

    def _begin_with(self, system: str) -> None:
        """Choose the system message of conversations to come, and begin one."""
        self.system = [Message("system", system)] if system else []
        if self.thinking:
            self.system = list(with_toggle(self.system, self.thinking))
        self.talk = list(self.system)

    def run(self) -> None:
        """Take lines until there are no more."""
        while True:
            echo("you> ", nl=False)
            try:
                line = self.read_line()
            except KeyboardInterrupt:
                line = ""
            if not line.strip():
                echo("")
                return
            if line.startswith("/") and (command := _COMMAND.fullmatch(line.strip())) is not None:
                try:
                    self._do(command[1], command[2] or "")
                except InputError as e:
                    echo(f"gristmill: {e}", err=True)
                continue
            self.talk.append(Message("user", line.strip()))
            self._answer(self.sampling)

    def _do(self, name: str, rest: str) -> None:
        """Do what a command says."""
        if name == "help":
            echo(HELP)
        elif name in ("new", "system"):
            self.earlier += [tuple(self.talk)] if len(self.talk) > len(self.system) else []
            if name == "system":
                self._begin_with(rest)
            self.talk = list(self.system)
        elif name == "save":
            self._save_to(Path(rest) if rest else None)
        elif name in ("regenerate", "undo"):
            asked = [place for place, message in enumerate(self.talk) if message.role == "user"]
            if not asked:
                raise InputError("There is no question yet: ask one.")
            if name == "undo":
                self.talk = self.talk[: asked[-1]]
                self._save()
                return
            try:
                sampling = replace(self.sampling, temperature=float(rest)) if rest else self.sampling
            except ValueError:
                raise InputError("Give /regenerate a temperature, as 0.8, or nothing.") from None
            if sampling.temperature == 0:
                raise InputError("At temperature 0 the answer would be the same: say /regenerate 0.8, or start with --temperature.")
            self.talk = self.talk[: asked[-1] + 1]
            self._answer(sampling)
        else:
            raise InputError(f"There is no /{name}: /help lists what there is, and a blank before it makes a message of it.")

    def _answer(self, sampling: SamplingParams) -> None:
        """Stream an answer to the last message. One that cannot be given takes the message back."""
        # what was thought before earlier answers is no part of them
        said_before = [replace(m, content=strip_thinking(m.content)) if m.role == "assistant" else m for m in self.talk]
        request = Request(str(self._num_answers), tuple(said_before), sampling, self.seed)
        try:
            state = self.engine.prepare(request)
            self._core.add(state)
        except InputError as e:
            self.talk.pop()
            echo(f"gristmill: {e} The message is taken back; /new starts over.", err=True)
            return
        self._num_answers += 1
        echo(f"{self.engine.name}> ", nl=False)
        text = IncrementalDetokenizer(self.engine, sampling.stop)
        said, num_tokens, told = "", 0, list[tuple[int, bool]]()
        state.listener = lambda sample, token, logprob, last, top: told.append((token, last))
        started = time.perf_counter()
        try:
            while state.num_unfinished and state.error is None:
                self._core.step()
                for token, last in told:
                    num_tokens += 1
                    completion = state.completions[0] if last else None
                    piece = text.add(token) if completion is None else text.finish(completion.text)
                    said += piece
                    echo(piece, nl=False)
                told.clear()
        except KeyboardInterrupt:  # in the middle of a step, whose state nobody knows
            self._core.release()
            self._core = self.engine.core()
        seconds = time.perf_counter() - started
        self._core.take_finished()
        echo("")
        if state.error is not None:
            raise state.error
        (completion,) = state.completions
        cut = ", ended by you" if completion is None else ""
        if completion is not None and completion.finish == "length":
            cut = ", cut off at --max-tokens or at the model's context"
        echo(f"[{num_tokens} tokens, {num_tokens / max(seconds, 1e-9):,.1f} a second{cut}]", err=True)
        self.talk.append(Message("assistant", said))
        self._save()

    def _save_to(self, file: Path | None) -> None:
        """Choose the file that is written after every answer."""
        if file is None and self.history is None:
            raise InputError("Give /save the name of a file, or start with --history FILE.")
        if file is not None and file != self.history:
            if file.exists():
                raise InputError(f"{quoted_path(file)} exists: give another name, or start with --history to go on with it.")
            self.history = file
        self._save()
        echo(f"saved: {quoted_path(self.history or Path())}", err=True)

    def _save(self) -> None:
        if self.history is None:
            return
        talks = [*self.earlier, *([tuple(self.talk)] if len(self.talk) > len(self.system) else [])]
        with replacing(self.history) as path:
            write_jsonl(path, ({"messages": to_dicts(talk)} for talk in talks))


def _read_history(file: Path) -> list[tuple[Message, ...]]:
    """Conversations of a file, one a line."""
    try:
        rows = [json.loads(line) for line in read_bytes(file, MAX_HISTORY_BYTES).decode().split("\n") if line.strip()]
        return [conversation(row["messages"]) for row in rows]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise InputError(f"{quoted_path(file)} holds no conversations, one a line with `messages`: give --history another file.") from e
