"""A user's reward functions, in TRL's form, in a process of their own: no exception, hang or NaN ends a run or passes in silence.

    def reward(prompts, completions, completion_ids, **columns) -> list[float | None]

A file of yours is trusted as any program that you start; what it returns is not. It crosses as JSON.
"""

import contextlib
import json
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gristmill.core.echo import visible
from gristmill.core.errors import InputError
from gristmill.data.rows import Prompt
from gristmill.generation.api import Completion
from gristmill.workflows.rl.recipe import RewardFunction

MAX_REPLY_BYTES = 256 << 20  # an environment says all its prompts
MAX_ERROR_CHARS = 300
MAX_FAILURES = 5  # answers that fail one after the other, from the first on, before the function is given up
# What the file prints goes to the terminal's errors; the answers have a pipe of their own.
PRELUDE = """
import asyncio, importlib.util, inspect, json, os, sys
replies = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
path, given = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, os.path.dirname(os.path.abspath(path)))

def reply(**values):
    print(json.dumps(values), file=replies, flush=True)

def told(error):
    return f"{type(error).__name__}: {error}"

def call(function, values):
    taken = inspect.signature(function).parameters.values()
    names = {p.name for p in taken}
    values = values if any(p.kind is p.VAR_KEYWORD for p in taken) else {k: v for k, v in values.items() if k in names}
    found = function(**values)
    return asyncio.run(found) if inspect.isawaitable(found) else found

def load():
    spec = importlib.util.spec_from_file_location("rewards", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def serve(begin, answer):
    try:
        state, said = begin()
    except BaseException as error:
        reply(error=told(error))
        sys.exit()
    reply(ready=True, **said)
    for line in sys.stdin:
        try:
            reply(values=[None if value is None else float(value) for value in answer(state, json.loads(line))])
        except BaseException as error:
            reply(error=told(error))
"""
FUNCTION = """
serve(lambda: (getattr(load(), given["name"]), {}), call)
"""


class PythonProcess:
    """A user's Python file in a process of its own, which values answers in JSON lines. It is started again after a hang.

    Args:
        program: what runs there, after `PRELUDE`; `given` is handed to it.
        label: for errors.
        timeout, start_timeout: seconds that a reply may take, and the first one.

    Attributes:
        said: what it told when it was ready.

    Raises:
        InputError: the file cannot be run, or lacks what the program asks it for.
    """

    def __init__(self, program: str, file: Path, given: dict[str, Any], *, label: str, timeout: float, start_timeout: float = 0.0):
        self._command = [sys.executable, "-c", PRELUDE + program, str(file), json.dumps(given)]
        self._label, self._timeout, self._start_timeout = label, timeout, max(timeout, start_timeout)
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def __str__(self) -> str:
        return self._label

    def _start(self) -> None:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self.said = self._read(self._start_timeout)
        if "error" in self.said:
            self._stop()
            raise InputError(f"{self}: {self.said['error']}")

    def _stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _read(self, timeout: float) -> dict[str, Any]:
        """A reply, or what went wrong."""
        assert self._process.stdout is not None
        parts, size, deadline, pipe = list[bytes](), 0, time.monotonic() + timeout, self._process.stdout.fileno()
        while not parts or not parts[-1].endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                return {"error": f"it did not answer within {timeout:g} s", "dead": True}
            parts.append(os.read(pipe, 1 << 16))
            size += len(parts[-1])
            if not parts[-1] or size > MAX_REPLY_BYTES:
                return {"error": "it ended" if not parts[-1] else "its answer is too long", "dead": True}
        found: dict[str, Any] = json.loads(b"".join(parts))
        return found if "error" not in found else {"error": visible(str(found["error"]))[:MAX_ERROR_CHARS]}

    def ask(self, given: dict[str, Any], num: int) -> dict[str, Any]:
        """`values`, so many, or an `error`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(given).encode() + b"\n")
            self._process.stdin.flush()
            found = self._read(self._timeout)
        except BrokenPipeError:
            found = {"error": "it ended", "dead": True}
        if "values" in found:
            found |= self._checked(found["values"], num)
        if found.pop("dead", False):
            self._stop()
            self._start()
        return found

    @staticmethod
    def _checked(values: Any, num: int) -> dict[str, Any]:
        if not isinstance(values, list) or len(values) != num:
            return {"error": f"it gave {len(values) if isinstance(values, list) else 'no list of'} values for {num} answers"}
        bad = [value for value in values if value is not None and not math.isfinite(value)]
        return {"error": f"it gave {bad[0]}"} if bad else {}

    def question(self, prompts: Sequence[Prompt], answers: Sequence[Completion]) -> dict[str, Any]:
        """What the program is given of answers."""
        raise NotImplementedError

    def rewards(self, prompts: Sequence[Prompt], answers: Sequence[Completion]) -> list[float | str | None]:
        """Of each answer its value, None where there is none for it, or the error it ended with.

        Where a batch fails its answers are asked about one by one, so that one bad answer costs no other its reward.

        Raises:
            InputError: every answer of the batch failed.
        """
        if not answers:
            return []
        found = self.ask(self.question(prompts, answers), len(answers))
        if "error" not in found:
            return list(found["values"])
        out: list[float | str | None] = []
        for prompt, answer in zip(prompts, answers, strict=True):
            single = self.ask(self.question([prompt], [answer]), 1)
            out.append(single["error"] if "error" in single else single["values"][0])
            if len(out) == MAX_FAILURES and all(isinstance(value, str) for value in out):
                break
        if all(isinstance(value, str) for value in out):
            raise InputError(f"{self} fails on every answer ({out[0]}): mend it and run the same command again; nothing sampled is lost.")
        return out


class RewardProcess(PythonProcess):
    """A function in TRL's form. Columns that it does not take are left out."""

    def __init__(self, function: RewardFunction):
        self.name, self.weight, self._as_talk = function.name, function.weight, function.messages
        label = f"The reward function {function.name} of {function.file}"
        super().__init__(FUNCTION, function.file, {"name": function.name}, label=label, timeout=function.timeout)

    def question(self, prompts: Sequence[Prompt], answers: Sequence[Completion]) -> dict[str, Any]:
        columns = {name for prompt in prompts for name in prompt.meta}
        given: dict[str, Any] = {name: [prompt.meta.get(name) for prompt in prompts] for name in columns}
        given["answer"] = [(prompt.truth or {}).get("value") for prompt in prompts]
        as_talk = self._as_talk
        given["prompts"] = [
            [{"role": m.role, "content": m.content} for m in p.messages] if as_talk else p.messages[-1].content for p in prompts
        ]
        given["completions"] = [[{"role": "assistant", "content": a.text}] if as_talk else a.text for a in answers]
        given["completion_ids"] = [list(answer.tokens) for answer in answers]
        return given
