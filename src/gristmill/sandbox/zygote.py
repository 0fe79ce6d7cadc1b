"""Zygote process of the sandbox: started clean, it forks one jailed child a program.

Started as `python -I -S -c BOOT source_folder config` with an empty environment, so that no key, file or
device memory of the caller is in it, and it imports the standard library only. It reads requests from
standard input and answers on standard output, each a 4-byte big-endian length and JSON, and ends when
standard input closes.

How a pass is proved. The zygote draws a 16-byte nonce for every program and believes a pass only when exactly
these bytes, and nothing else, come through the child's private pipe. The exit code proves nothing. In the
child:

- the main thread, the *keeper*, waits;
- program and check run in a second thread whose only callers are C functions (`map` over `exec` inside
  `deque`), so no walk up the frames finds the keeper. The link of that chain after the check writes the
  nonce, so it is written only if every assertion held; no Python frame holds it once the program can run;
- an audit hook, which Python code cannot remove, refuses the calls that would reach other threads' frames,
  list the collector's objects, install a tracer (which can jump over an assertion) or call C functions
  through ctypes;
- nothing secret lies in any pipe, and any other byte written to the private pipe spoils the pass.

What this does not stop: a program that reads or writes its own memory natively (ctypes pointers, crafted
bytecode) owns the interpreter the check runs in and can forge a pass, as can one whose objects lie (`__eq__`
that is always true), that shadows a name the check uses, or that changes a module the check imports. The
jail holds in all these cases: only the verdict is at stake.
"""

import builtins
import contextlib
import functools
import gc
import json
import operator
import os
import select
import signal
import struct
import sys
import time
import traceback
import types
from _thread import _count, allocate_lock, start_new_thread
from collections import deque
from typing import Any, NoReturn

from gristmill.sandbox import jail

OUTPUT_BYTES = 64 << 10
_NONCE_BYTES = 16
_VERDICT_BYTES = 1000
_REASON_CHARS = 200
_SWEEP_S = 2.0  # a program may leave more files than can be removed in a reasonable time

# Imported before the first fork: most programs import some of these, and a child inherits them for nothing.
_COMMON_MODULES = (
    "abc bisect copy ctypes dataclasses datetime decimal enum fractions heapq hashlib itertools math random "
    "re statistics string textwrap threading typing"
)

_REFUSED_EVENTS = frozenset(
    {
        "sys._current_frames",
        "cpython.PyInterpreterState_New",
        "sys._current_exceptions",
        "sys.settrace",
        "sys.setprofile",
        "sys.addaudithook",
        "sys.monitoring.register_callback",
        "gc.get_objects",
        "gc.get_referrers",
        "gc.get_referents",
        "ctypes.dlopen",
        "ctypes.dlsym",
        "ctypes.dlsym/handle",
        "ctypes.call_function",
        "ctypes.addressof",
        "ctypes.cdata",
        "ctypes.string_at",
        "ctypes.wstring_at",
    }
)


def read_exactly(fd: int, size: int) -> bytes:
    """Read `size` bytes; fewer only at the end of the stream."""
    parts = []
    while size and (part := os.read(fd, min(size, 1 << 20))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def send(fd: int, message: dict[str, Any]) -> None:
    """Write one message."""
    data = json.dumps(message).encode()
    data = struct.pack(">I", len(data)) + data
    while data:
        data = data[os.write(fd, data) :]


def receive(fd: int) -> dict[str, Any] | None:
    """Read one message; None when the other side has gone."""
    head = read_exactly(fd, 4)
    if len(head) < 4:
        return None
    size = struct.unpack(">I", head)[0]
    body = read_exactly(fd, size)
    return json.loads(body) if len(body) == size else None


# ---- in the child ------------------------------------------------------------------------------------------


def _refuse_introspection() -> None:
    # The set is bound as a default: the hook's globals can be reached through a traceback and changed.
    def hook(event: str, arguments: tuple[Any, ...], refused: frozenset[str] = _REFUSED_EVENTS) -> None:
        if event in refused:
            raise PermissionError(f"{event} is not allowed here")

    sys.addaudithook(hook)


def _describe(error: BaseException | None) -> str:
    if isinstance(error, AssertionError):
        return "failed"
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = ""
    return f"error: {type(error).__name__}" + (f": {text}" if text else "")


def _report(verdict: int, error: BaseException | None) -> None:
    os.write(verdict, b"!" + _describe(error).encode(errors="replace")[:_VERDICT_BYTES])


def _execute(program: str, check: str, verdict: int, secret: list[bytes]) -> None:
    """The keeper: run both texts in a second thread and write the nonce if both came to their end."""
    module = types.ModuleType("program")
    sys.modules["program"] = module
    namespace = module.__dict__
    try:
        codes = [
            compile(text, f"<{name}>", "exec", dont_inherit=True, optimize=0) for name, text in (("program", program), ("check", check))
        ]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        traceback.print_exception(error, limit=0)
        _report(verdict, error)
        return
    begun, go, failed = allocate_lock(), allocate_lock(), allocate_lock()
    for lock in (begun, go, failed):
        lock.acquire()

    def note_failure(unraisable: Any, usual: Any = sys.unraisablehook) -> None:
        if "thread started by" not in (unraisable.err_msg or ""):
            usual(unraisable)
            return
        try:
            _report(verdict, unraisable.exc_value)
            traceback.print_exception(unraisable.exc_value)
        finally:
            failed.release()

    sys.unraisablehook = note_failure
    functions = vars(builtins)
    steps: tuple[Any, ...] = (
        begun.release,
        go.acquire,
        functools.partial(exec, codes[0], namespace),
        # The check meets the real built-in functions, whatever the program replaced.
        functools.partial(functions.update, dict(functions)),
        functools.partial(namespace.__setitem__, "__builtins__", builtins),
        functools.partial(exec, codes[1], namespace),
        functools.partial(os.write, verdict, secret.pop()),
        failed.release,
    )
    # From here on the keeper calls nothing but what these locals hold: the program may replace any attribute
    # of any module, and its code must never run on top of this frame. For the same reason nothing in the loop
    # allocates an object that the collector tracks, since a collection started here would run the program's
    # finalizers here.
    sleep, running = time.sleep, _count
    # And nothing but C functions stands between the thread's start and the program.
    start_new_thread(deque, (map(operator.call, steps), 0))
    begun.acquire()
    del steps
    go.release()
    while failed.locked() and running():
        sleep(0.0005)


def _child(request: dict[str, Any], ruleset: int | None, strict: bool, pipes: tuple[int, int], secret: list[bytes]) -> None:
    verdict, output = pipes
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    jail.enter(ruleset, request["timeout_s"], strict=strict)
    os.closerange(3, verdict)
    os.closerange(verdict + 1, jail.OPEN_FILES * 4)
    _refuse_introspection()
    _execute(request["program"], request["check"], verdict, secret)


# ---- in the zygote -----------------------------------------------------------------------------------------


def _watch(verdict: int, output: int, control: int, deadline: float) -> tuple[bytes, bytes, bool]:
    """Collect what a child says until its verdict pipe closes, the deadline passes or the caller dies.

    Returns:
        The verdict, at most OUTPUT_BYTES of output (the rest is read and dropped, so that the child never
        blocks on a full pipe), and whether the deadline passed.
    """
    poll = select.poll()
    poll.register(verdict, select.POLLIN)
    poll.register(output, select.POLLIN)
    poll.register(control, 0)  # hang-up only
    said, kept = b"", bytearray()
    while True:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return said, bytes(kept), True
        for fd, _ in poll.poll(remaining * 1000 + 1):
            if fd == control:
                return b"", b"", True
            part = os.read(fd, 1 << 16)
            if fd == verdict:
                said += part
                if not part or len(said) > _VERDICT_BYTES + 1:
                    return said, bytes(kept), False
            elif part:
                kept += part[: OUTPUT_BYTES - len(kept)]
            else:
                poll.unregister(output)


def _drain(output: int, kept: bytes) -> bytes:
    """What a dead child left in its output pipe: at most the pipe's capacity."""
    while len(kept) < OUTPUT_BYTES and (part := os.read(output, OUTPUT_BYTES - len(kept))):
        kept += part
    return kept


def _reason(said: bytes, late: bool, status: int) -> str:
    if late:
        return "timeout"
    text = said[1:].decode(errors="replace") if said.startswith(b"!") else ""
    if text == "failed" or text.startswith("error: "):
        return text[:_REASON_CHARS]
    if said:
        return "error: the program wrote to the verdict pipe"
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
        return f"error: killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return "early exit"


def _run(request: dict[str, Any], scratch: str, ruleset: int | None, strict: bool, control: int) -> dict[str, Any]:
    """Fork a jailed child for one program, watch it, kill it, clean up."""
    os.makedirs(scratch, mode=0o700, exist_ok=True)
    os.chdir(scratch)
    verdict, verdict_end = os.pipe()
    output, output_end = os.pipe()
    nonce = os.urandom(_NONCE_BYTES)
    leave = os._exit  # the program may replace it, see _execute
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        secret = [nonce]
        del nonce
        try:
            _child(request, ruleset, strict, (verdict_end, output_end), secret)
        finally:
            leave(0)
    os.close(verdict_end)
    os.close(output_end)
    said, kept, late = _watch(verdict, output, control, start + request["timeout_s"])
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    seconds = time.monotonic() - start
    kept = _drain(output, kept)
    os.close(verdict)
    os.close(output)
    os.chdir("/")
    spent = not jail.empty_folder(os.path.dirname(scratch) if ruleset is None else scratch, _SWEEP_S)
    passed = said == nonce and not late
    reason = "passed" if passed else _reason(said, late, status)
    return {"passed": passed, "reason": reason, "seconds": seconds, "output": kept.decode(errors="replace"), "spent": spent}


def _try_jail(ruleset: int | None) -> str:
    """Enter the jail once, in a child that then tries to fork; returns what went wrong, "" for nothing."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            jail.enter(ruleset, 1.0, strict=True)
            with contextlib.suppress(PermissionError):
                os.fork()
                os.write(writer, b"a jailed process could fork")
        except (OSError, ValueError) as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    wrong = read_exactly(reader, 4096).decode()
    os.close(reader)
    os.waitpid(pid, 0)
    return wrong


def _serve(control: int, answers: int, config: dict[str, Any]) -> None:
    base, strict = config["base"], config["strict"]
    scratch = os.path.join(base, "run")
    os.makedirs(scratch, mode=0o700, exist_ok=True)
    ruleset = jail.landlock_ruleset(config["landlock"], scratch) if config["landlock"] else None
    wrong = _try_jail(ruleset) if strict else ""
    send(answers, {"ready": not wrong, "error": wrong})
    while not wrong and (request := receive(control)) is not None:
        send(answers, _run(request, scratch, ruleset, strict, control))
    jail.remove_base(base)  # the caller, which otherwise does this, has gone


def _prepare() -> None:
    """Import what programs commonly import, and take this package and its names out of their reach."""
    for name in _COMMON_MODULES.split():
        __import__(name)
    for name in [name for name in sys.modules if name.split(".")[0] == "gristmill"]:
        del sys.modules[name]
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.path.remove(sys.argv[1])
    sys.argv = ["program"]
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # the child ends without flushing
    gc.collect()
    gc.freeze()


def main() -> NoReturn:
    """Serve requests until standard input closes; the configuration is the second argument, in JSON."""
    config = json.loads(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control, answers = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    try:
        if config["namespaces"] and jail.enter_namespaces(config["base"]):
            # A new process-number space begins with the next child; it ends, with all in it, when that child
            # ends.
            pid = os.fork()
            if pid:
                os.close(control)
                os.close(answers)
                os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
            jail.die_with_parent()
        jail.hide_memory()
        _prepare()
        _serve(control, answers, config)
    except OSError as error:
        with contextlib.suppress(OSError):
            send(answers, {"ready": False, "error": str(error)})
    os._exit(0)
