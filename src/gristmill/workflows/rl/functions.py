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
from types import TracebackType
from typing import Any

from gristmill.core.echo import visible
from gristmill.core.errors import InputError
from gristmill.data.rows import Prompt
from gristmill.generation.api import Completion
from gristmill.workflows.rl.recipe import RewardFunction

MAX_REPLY_BYTES = 16 << 20
MAX_ERROR_CHARS = 300
MAX_FAILURES = 5  # answers that fail one after the other, from the first on, before the function is given up
# What the file prints goes to the terminal's errors; the answers have a pipe of their own. Columns that it does not take are left out.
RUNNER = """
import asyncio, importlib.util, inspect, json, os, sys
replies = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
path, name = sys.argv[1:]
sys.path.insert(0, os.path.dirname(os.path.abspath(path)))

def reply(**values):
    print(json.dumps(values), file=replies, flush=True)

def told(error):
    return f"{type(error).__name__}: {error}"

try:
    spec = importlib.util.spec_from_file_location("rewards", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name)
    taken = inspect.signature(function).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in taken)
    names = {p.name for p in taken}
except BaseException as error:
    reply(error=told(error))
    sys.exit()
reply(ready=True)
for line in sys.stdin:
    given = json.loads(line)
    try:
        values = function(**(given if takes_all else {k: v for k, v in given.items() if k in names}))
        values = asyncio.run(values) if inspect.isawaitable(values) else values
        reply(values=[None if value is None else float(value) for value in values])
    except BaseException as error:
        reply(error=told(error))
"""


class RewardProcess:
    """The process of one function. It is started again after a hang.

    Raises:
        InputError: the file cannot be run, or has no such function.
    """

    def __init__(self, function: RewardFunction):
        self.function = function
        self._start()

    def __enter__(self) -> "RewardProcess":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def _start(self) -> None:
        command = [sys.executable, "-c", RUNNER, str(self.function.file), self.function.name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        found = self._read()
        if "error" in found:
            self._stop()
            raise InputError(f"{self}: {found['error']}")

    def __str__(self) -> str:
        return f"The reward function {self.function.name} of {self.function.file}"

    def _stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _read(self) -> dict[str, Any]:
        """A reply, or what went wrong."""
        assert self._process.stdout is not None
        reply, deadline, pipe = b"", time.monotonic() + self.function.timeout, self._process.stdout.fileno()
        while not reply.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                return {"error": f"it did not answer within {self.function.timeout:g} s", "dead": True}
            part = os.read(pipe, 1 << 16)
            reply += part
            if not part or len(reply) > MAX_REPLY_BYTES:
                return {"error": "it ended" if not part else "its answer is too long", "dead": True}
        found = json.loads(reply)
        return found if "error" not in found else {"error": visible(str(found["error"]))[:MAX_ERROR_CHARS]}

    def _ask(self, prompts: Sequence[Prompt], answers: Sequence[Completion]) -> dict[str, Any]:
        assert self._process.stdin is not None
        columns = {name for prompt in prompts for name in prompt.meta}
        given: dict[str, Any] = {name: [prompt.meta.get(name) for prompt in prompts] for name in columns}
        given["answer"] = [(prompt.truth or {}).get("value") for prompt in prompts]
        as_talk = self.function.messages
        given["prompts"] = [
            [{"role": m.role, "content": m.content} for m in p.messages] if as_talk else p.messages[-1].content for p in prompts
        ]
        given["completions"] = [[{"role": "assistant", "content": a.text}] if as_talk else a.text for a in answers]
        given["completion_ids"] = [list(answer.tokens) for answer in answers]
        try:
            self._process.stdin.write(json.dumps(given).encode() + b"\n")
            self._process.stdin.flush()
            found = self._read()
        except BrokenPipeError:
            found = {"error": "it ended", "dead": True}
        if "values" in found:
            found |= self._checked(found["values"], len(answers))
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

    def rewards(self, prompts: Sequence[Prompt], answers: Sequence[Completion]) -> list[float | str | None]:
        """Of each answer its value, None where the function does not apply, or the error it ended with.

        Where a batch fails its answers are asked about one by one, so that one bad answer costs no other its reward.

        Raises:
            InputError: every answer of the batch failed.
        """
        if not answers:
            return []
        found = self._ask(prompts, answers)
        if "error" not in found:
            return list(found["values"])
        out: list[float | str | None] = []
        for prompt, answer in zip(prompts, answers, strict=True):
            single = self._ask([prompt], [answer])
            out.append(single["error"] if "error" in single else single["values"][0])
            if len(out) == MAX_FAILURES and all(isinstance(value, str) for value in out):
                break
        if all(isinstance(value, str) for value in out):
            raise InputError(f"{self} fails on every answer ({out[0]}): mend it and run the same command again; nothing sampled is lost.")
        return out
