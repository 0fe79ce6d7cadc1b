"""Sandbox for untrusted Python: runs a program against a check, in a few milliseconds.

A `Sandbox` keeps one or two clean zygote processes (see zygote.py, which also says what a pass proves and
what it does not) that fork one jailed child a program. The jail (jail.py) is Landlock, a system-call filter
and resource limits, inside private namespaces where the kernel allows them; if bubblewrap is installed each
zygote is started inside it once, so that its walls cost nothing per program. Programs have the standard
library, 1 GiB of memory, an empty scratch folder as working directory, no standard input, no network, no
other process.

Known gaps: a file's existence and size can still be asked for (stat), though it cannot be read; how many
threads a program starts is limited only by its memory and time; `asyncio` does not work, since it needs a
socket pair; only the private namespaces bound the scratch folder's total size (each file is limited to 16 MiB
anyway).
"""

import contextlib
import functools
import json
import os
import queue
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gristmill.core.errors import InputError
from gristmill.sandbox import jail, seccomp, split, wire

NUM_WORKERS = 2
_SWEEP_S = 0.5  # seconds to remove a folder in; a larger one is removed by a process of its own
_GRACE_S = 5.0
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from gristmill.sandbox import zygote; zygote.main()"
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class SandboxResult:
    """Outcome of one program.

    Attributes:
        passed: the program and then the check ran to their end.
        reason: "passed"; "failed" (an assertion); "error: TYPE: MESSAGE" (any other exception, or a signal);
            "timeout"; "early exit" (the process or the program's thread ended before the check did).
        seconds: wall time of the child, cleaning up not counted.
        output: the first 64 KiB of its standard output and error.
        weak: something in the verdict was decided where the program could lie about it (see split.py).
    """

    passed: bool
    reason: str
    seconds: float
    output: str = ""
    weak: bool = False


class _Broken(Exception):
    """A zygote process died or does not answer."""


@dataclass(frozen=True)
class _Setup:
    """One way to start a zygote process: inside bubblewrap or not, with namespaces of its own or not."""

    bubblewrap: str | None
    namespaces: bool
    landlock: int
    strict: bool

    def command(self, base: str) -> list[str]:
        # Not the virtual environment's: programs get the standard library only, and less of the disk to read.
        python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
        config = {"base": base, "namespaces": self.namespaces}
        config |= {"landlock": self.landlock, "strict": self.strict}
        options = ["-I", "-S", "-B", "-X", "utf8"]
        inner = [python, *options, "-c", _BOOT, str(_PACKAGE.parent), json.dumps(config)]
        if self.bubblewrap is None:
            return inner
        readable = sorted({*jail.readable_paths(), python, str(_PACKAGE)} - {"/dev/urandom", "/dev/zero"})
        wrap = [self.bubblewrap, "--unshare-all", "--cap-drop", "ALL"]
        for path in readable:
            wrap += ["--ro-bind", path, path]
        wrap += ["--dev", "/dev"]
        if _bubblewrap_version(self.bubblewrap) >= (0, 7):
            wrap += ["--size", str(jail.SCRATCH_BYTES)]
        # bubblewrap's own root and /dev are writable file systems in memory that would outlive a program.
        wrap += ["--tmpfs", base, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/"]
        return [*wrap, *inner]


@functools.cache
def _bubblewrap_version(path: str) -> tuple[int, ...]:
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    return tuple(int(part) for part in re.findall(r"\d+", answer)[:2])


class _Worker:
    """One zygote process, started when first needed and again after it broke."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._base: tempfile.TemporaryDirectory[str] | None = None

    def start(self, setup: _Setup) -> None:
        """Start the zygote, unless it runs already. Raises _Broken with what went wrong."""
        if self._process is not None and self._process.poll() is None:
            return
        self.stop()
        self._base = tempfile.TemporaryDirectory(prefix="gristmill-sandbox-")
        # The empty environment is for bubblewrap too: its own would be readable inside as that of process 1.
        self._process = subprocess.Popen(
            setup.command(os.path.realpath(self._base.name)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
            bufsize=0,
            start_new_session=True,
        )
        try:
            hello = self._answer(time.monotonic() + 60)
        except _Broken as error:
            self.stop()
            raise _Broken("the zygote process did not start") from error
        if not hello["ready"]:
            self.stop()
            raise _Broken(hello["error"])

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and wait for its answer. Raises _Broken, and stops the zygote, if none comes."""
        assert self._process is not None and self._process.stdin is not None
        try:
            wire.send(self._process.stdin.fileno(), request)
            answer = self._answer(time.monotonic() + request["timeout_s"] + _GRACE_S)
        except BaseException as error:
            self.stop()  # also after an interrupt: the next request must not meet this one's answer
            if isinstance(error, OSError):
                raise _Broken("the zygote process has gone") from error
            raise
        if answer.pop("spent"):  # its folder could not be emptied in time: the next program gets another
            self.stop()
        return answer

    def _answer(self, deadline: float) -> dict[str, Any]:
        head = self._read(4, deadline)
        answer: dict[str, Any] = json.loads(self._read(struct.unpack(">I", head)[0], deadline))
        return answer

    def _read(self, size: int, deadline: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        fd = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        data = b""
        while len(data) < size:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise _Broken("the zygote process does not answer")
            part = os.read(fd, size - len(data))
            if not part:
                raise _Broken("the zygote process has gone")
            data += part
        return data

    def stop(self) -> None:
        """Kill the zygote and everything in it, and remove its folder."""
        process, base = self._process, self._base
        self._process = self._base = None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        if base is not None:
            if jail.empty_folder(base.name, _SWEEP_S):
                base.cleanup()
            else:
                base._finalizer.detach()  # type: ignore[attr-defined]
                subprocess.Popen(["rm", "-rf", "--", base.name], start_new_session=True, stderr=subprocess.DEVNULL)


def _setups(unsafe: bool) -> list[_Setup]:
    """The ways to start a zygote on this machine, the strongest first."""
    landlock = jail.landlock_abi()
    bubblewrap = shutil.which("bwrap")
    if not unsafe:
        if sys.platform != "linux" or not seccomp.supported():
            raise InputError(
                "Running generated code needs Linux on x86-64 or aarch64 for its system-call filter; "
                "run there, or pass --unsafe-code to run it with weaker walls or none."
            )
        if not landlock and bubblewrap is None:
            raise InputError(
                "This kernel offers no Landlock and bubblewrap (bwrap) is not installed, so code cannot "
                "be jailed; install bubblewrap, use Linux 5.13 or newer with Landlock enabled, or pass "
                "--unsafe-code to run it with weaker walls or none."
            )
    setups = []
    if bubblewrap is not None:
        setups.append(_Setup(bubblewrap, False, landlock, True))
    if landlock or unsafe:
        setups += [_Setup(None, namespaces, landlock, not unsafe) for namespaces in (True, False)]
    return setups


class Sandbox:
    """Runs untrusted programs; a context manager. Safe to call from several threads.

    Args:
        unsafe: run even where no jail can be built (with whatever walls there are).

    Raises:
        InputError: no jail is possible on this machine and `unsafe` is not set.
    """

    def __init__(self, unsafe: bool = False) -> None:
        self._candidates = _setups(unsafe)
        self._workers = [_Worker() for _ in range(NUM_WORKERS)]
        # Last in, first out: callers that run one program at a time start one zygote only.
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop the zygote processes and remove their folders; a later run starts them again."""
        for worker in self._workers:
            worker.stop()

    def run(self, program: str, check: str, timeout_s: float = 3.0) -> SandboxResult:
        """Execute a program, and then a check of it in a process of its own (see split.py).

        Args:
            program: Python source, untrusted. `__name__` is "program" in it, so that a block under
                `if __name__ == "__main__"` does not run.
            check: Python source, usually assertions, that sees the program's names. `__run_tests__()` runs its test functions and
                classes, `__run_script__(stdin)` the program as a script, which gives what it printed.
            timeout_s: wall-clock limit in seconds for both together.

        Returns:
            The result; whatever the program does is a result and raises nothing.

        Raises:
            InputError: `timeout_s` is not positive, or the jail could not be built.
        """
        if not 0 < timeout_s < 1e6:
            raise InputError(f"The time limit is {timeout_s} s; give a positive number of seconds.")
        request = {"program": program, "check": check, "timeout_s": timeout_s, "split": split.splits(check)}
        worker = self._idle.get()
        try:
            # A zygote that was killed between two runs is replaced; one that dies twice dies of this program.
            for _ in range(2):
                self._start(worker)
                try:
                    return SandboxResult(**worker.run(request))
                except _Broken:
                    continue
            return SandboxResult(False, "error: the zygote process died twice", 0.0)
        finally:
            self._idle.put(worker)

    def run_many(self, pairs: Sequence[tuple[str, str]], timeout_s: float = 3.0) -> list[SandboxResult]:
        """`run` for many (program, check) pairs, two at a time; results in the order of the pairs."""
        with ThreadPoolExecutor(NUM_WORKERS) as pool:
            return list(pool.map(lambda pair: self.run(pair[0], pair[1], timeout_s), pairs))

    def _start(self, worker: _Worker) -> None:
        """Start a zygote in the strongest way that works here."""
        problems = []
        for setup in self._candidates:
            try:
                worker.start(setup)
                return
            except _Broken as error:
                problems.append(str(error))
        raise InputError(
            f"The jail for generated code could not be built ({'; '.join(problems)}); "
            "fix that, or pass --unsafe-code to run it with weaker walls or none."
        )
