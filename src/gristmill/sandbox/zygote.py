"""Zygote process of the sandbox: started clean, it forks one jailed child a program.

Started as `python -I -S -c BOOT source_folder config` with an empty environment, so that no key, file or
device memory of the caller is in it, and it imports the standard library only. It reads requests from
standard input and answers on standard output, each a 4-byte big-endian length and JSON, and ends when
standard input closes.

A check runs in a process of its own (check_side.py), jailed like the program's: it calls the program over two pipes, gets plain data back,
and says through a pipe that no program ever has what came out. That process serves one check after the other, as long as none leaves a
trace in it; the program's process is made for one program and killed.

A check that must look into the program (splits, in split.py) runs in the program's process, and its verdict is weak. There a pass is
proved by a 16-byte nonce, drawn for every program: only exactly these bytes, and nothing else, through the child's private pipe count.
The exit code proves nothing. In such a child:

- the main thread, the *keeper*, waits;
- program and check run in a second thread whose only callers are C functions (`map` over `exec` inside
  `deque`), so no walk up the frames finds the keeper. The link of that chain after the check writes the
  nonce, so it is written only if every assertion held; no Python frame holds it once the program can run;
- an audit hook, which Python code cannot remove, refuses the calls that would reach other threads' frames,
  list the collector's objects, install a tracer (which can jump over an assertion) or call C functions
  through ctypes, and the import of modules that were made to get at the interpreter;
- nothing secret lies in any pipe, and any other byte written to the private pipe spoils the pass.

What this does not stop, and why such a verdict is weak: a program that reads or writes its own memory natively (ctypes pointers,
crafted bytecode) owns the interpreter the check runs in and can forge a pass, as can one whose objects lie (`__eq__` that is always
true), that shadows a name the check uses, or that changes a module the check imports. The jail holds in all these cases.
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
from collections.abc import Callable
from typing import Any, NoReturn

from gristmill.sandbox import check_side, jail, program_side, test_runner
from gristmill.sandbox.wire import read_exactly, receive, send

OUTPUT_BYTES = 64 << 10
_NONCE_BYTES = 16
_VERDICT_BYTES = 1000
_REASON_CHARS = 200
_LAST_WORDS_S = 0.1  # for the check, when the program's process has ended
_END_S = 5.0  # for the check to see that it has; more than that on no machine
_CHECKER_CPU_S = 2.0  # far below its limit
_SWEEP_S = 2.0  # a program may leave more files than can be removed in a reasonable time

# Imported before the first fork: most programs import some of these, and a child inherits them for nothing.
_COMMON_MODULES = (
    "abc bisect copy ctypes dataclasses datetime decimal enum fractions heapq hashlib itertools math random "
    "re statistics string subprocess textwrap threading typing"
)

# Modules made to get at the interpreter or at other processes. What `ctypes` and `subprocess` need of them, they hold already.
_REFUSED_MODULES = frozenset(
    [
        "_ctypes",
        "_ctypes_test",
        "_interpchannels",
        "_interpqueues",
        "_interpreters",
        "_posixsubprocess",
        "_remote_debugging",
        "_testbuffer",
        "_testcapi",
        "_testclinic",
        "_testclinic_limited",
        "_testexternalinspection",
        "_testimportmultiple",
        "_testinternalcapi",
        "_testlimitedcapi",
        "_testmultiphase",
        "_testsinglephase",
        "_xxinterpchannels",
        "_xxsubinterpreters",
        "_xxtestfuzz",
        "xxlimited",
        "xxlimited_35",
    ]
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


# ---- in the child ------------------------------------------------------------------------------------------


_TRACING = frozenset(("sys.settrace", "sys.setprofile", "sys.monitoring.register_callback"))


def _refuse_introspection(tracing: bool) -> None:
    """Refuse what reaches into the interpreter; `tracing` is of use to a program, and no danger where its check runs elsewhere."""

    # The set is bound as a default: the hook's globals can be reached through a traceback and changed.
    def hook(
        event: str,
        arguments: tuple[Any, ...],
        refused: frozenset[str] = _REFUSED_EVENTS - _TRACING if tracing else _REFUSED_EVENTS,
        modules: frozenset[str] = _REFUSED_MODULES,
        library: str = os.path.dirname(os.path.realpath(os.__file__)) + os.sep,
    ) -> None:
        if event in refused:
            raise PermissionError(f"{event} is not allowed here")
        if event == "import":
            name, file = arguments[:2]
            if name.rpartition(".")[2] in modules or (type(file) is str and not os.path.realpath(file).startswith(library)):
                raise ImportError(f"{name} is not allowed here")

    sys.addaudithook(hook)


def _report(verdict: int, error: BaseException | None) -> None:
    os.write(verdict, b"!" + check_side.describe(error).encode(errors="replace")[:_VERDICT_BYTES])


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
        functools.partial(namespace.__setitem__, "__run_tests__", functools.partial(test_runner.run_tests, namespace)),
        functools.partial(sys.modules.__setitem__, "pytest", test_runner.pytest_module()),
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


def _serve_check(program: str, script: bool, reader: int, writer: int) -> None:
    """Run the program (unless the check runs it as a script), and then what its check, in another process, asks of it."""
    module = types.ModuleType("program")
    sys.modules["program"] = module
    reason = ""
    try:
        code = compile(program, "<program>", "exec", dont_inherit=True, optimize=0)
        if not script:
            exec(code, module.__dict__)
    except SystemExit:
        reason = "early exit"
    except BaseException as error:
        traceback.print_exception(error, limit=0 if isinstance(error, SyntaxError) else None)
        reason = check_side.describe(error)
    send(writer, {"reason": reason, "names": [name for name in module.__dict__ if name[:2] != "__"]})
    if not reason:
        program_side.ProgramSide(reader, writer, module.__dict__, program).run()


def _enter(ruleset: int | None, strict: bool, timeout_s: float, *, output: int, keep: tuple[int, ...]) -> None:
    """Lock this child in, with its output and the pipes that are its own."""
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    for fd in (1, *keep):  # an earlier program with the same pipe may have changed it for all who hold it
        os.set_blocking(fd, True)
    jail.enter(ruleset, timeout_s, strict=strict)
    low = 3
    for fd in (*sorted(keep), jail.OPEN_FILES * 4):
        os.closerange(low, fd)
        low = fd + 1


# ---- in the zygote -----------------------------------------------------------------------------------------


class _Checker:
    """The jailed process that runs checks, one after the other, until one takes too long or leaves a trace in it.

    Programs get two of its pipes; none of them sees the one that its verdicts come through.
    """

    def __init__(self, ruleset: int | None, strict: bool, timeout_s: float, *, scratch: str, output: int):
        self.timeout_s = timeout_s
        self.asked, ask = os.pipe()
        self._told, self.tell = os.pipe()
        jobs, self._jobs = os.pipe()
        self.verdict, verdict = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                _enter(ruleset, strict, timeout_s, output=output, keep=(ask, self._told, jobs, verdict))
                while (job := receive(jobs)) is not None:
                    os.chdir(scratch)
                    reason, weak, clean = check_side.run_check(job["check"], self._told, ask)
                    clean = clean and time.process_time() < _CHECKER_CPU_S
                    send(verdict, {"reason": reason, "weak": weak, "clean": clean})
                    if not clean:
                        break
            finally:
                os._exit(0)
        for fd in (ask, jobs, verdict):
            os.close(fd)

    def begin(self, check: str) -> None:
        """Start a check; the program's process exists already."""
        with contextlib.suppress(OSError):  # it died meanwhile: no verdict will come
            send(self._jobs, {"check": check})

    def hang_up(self) -> None:
        """End what the program can say: what it has said is still read, and behind it the check meets its end."""
        os.close(self.tell)
        self.tell = -1

    def rest(self) -> None:
        """Forget what the last program said after its check had ended."""
        for fd in (self._told, self.asked):
            _drain(fd, b"")

    def stop(self) -> None:
        """Kill it."""
        _kill(self._pid)
        for fd in (self.asked, self._told, self.tell, self._jobs, self.verdict):
            if fd >= 0:
                os.close(fd)


def _kill(pid: int) -> int:
    """Kill a child and its process group; returns its status."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        os.killpg(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def _drain(fd: int, kept: bytes) -> bytes:
    """What nobody will write to any more and still lies in a pipe, behind the first OUTPUT_BYTES of it."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while poll.poll(0) and (part := os.read(fd, 1 << 16)):
        kept += part[: max(0, OUTPUT_BYTES - len(kept))]
    return kept


class _Runner:
    """Runs programs with their checks, one at a time.

    Args:
        scratch: the folder that programs work in.
        ruleset: from `jail.landlock_ruleset`, or None.
        control: the caller's pipe; when it hangs up, all ends.
    """

    def __init__(self, scratch: str, ruleset: int | None, strict: bool, *, control: int):
        self._scratch, self._ruleset, self._strict, self._control = scratch, ruleset, strict, control
        self._output, self._output_end = os.pipe()
        self._checker: _Checker | None = None

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run one program and its check, in two children or, where the check does not split, in one whose verdict is weak."""
        start = time.monotonic()
        deadline = start + request["timeout_s"]
        os.makedirs(self._scratch, mode=0o700, exist_ok=True)
        os.chdir(self._scratch)
        apart = bool(request["split"])
        reason, output, weak = self._apart(request, deadline) if apart else self._together(request, deadline)
        if reason == "unsplit":
            reason, output, weak = self._together(request, deadline)
        seconds = time.monotonic() - start
        os.chdir("/")
        spent = not jail.empty_folder(os.path.dirname(self._scratch) if self._ruleset is None else self._scratch, _SWEEP_S)
        text = output.decode(errors="replace")
        return {"passed": reason == "passed", "reason": reason, "seconds": seconds, "output": text, "spent": spent, "weak": weak}

    def _fork(self, timeout_s: float, keep: tuple[int, ...], work: Callable[[], None]) -> int:
        leave = os._exit  # the program may replace it, see _execute
        pid = os.fork()
        if pid == 0:
            try:
                _enter(self._ruleset, self._strict, timeout_s, output=self._output_end, keep=keep)
                _refuse_introspection(tracing=True)
                work()
            finally:
                leave(0)
        return pid

    def _apart(self, request: dict[str, Any], deadline: float) -> tuple[str, bytes, bool]:
        timeout_s, check = request["timeout_s"], request["check"]
        if self._checker is not None and self._checker.timeout_s < timeout_s:
            self._checker.stop()
            self._checker = None
        if self._checker is None:
            self._checker = _Checker(self._ruleset, self._strict, timeout_s, scratch=self._scratch, output=self._output_end)
        checker = self._checker
        alive, alive_end = os.pipe()  # closed with the program's process, which has the only other end
        keep = (checker.asked, checker.tell, alive_end)
        work = functools.partial(_serve_check, request["program"], "__run_script__(" in check, checker.asked, checker.tell)
        pid = self._fork(timeout_s, keep, work)
        os.close(alive_end)
        checker.begin(check)
        said, kept, late = self._watch(checker.verdict, alive, deadline, checker.hang_up)
        os.close(alive)
        status = _kill(pid)
        kept = _drain(self._output, kept)
        verdict: dict[str, Any] = json.loads(said[4:]) if said and not late else {"reason": "", "weak": False, "clean": False}
        if verdict["clean"] and checker.tell >= 0:
            checker.rest()
        else:
            checker.stop()
            self._checker = None
        reason = verdict["reason"]
        if late:
            reason = "timeout"
        elif reason in ("", "early exit"):
            reason = _exit_reason(status)
        return reason[:_REASON_CHARS], kept, bool(verdict["weak"])

    def _together(self, request: dict[str, Any], deadline: float) -> tuple[str, bytes, bool]:
        verdict, verdict_end = os.pipe()
        nonce = os.urandom(_NONCE_BYTES)
        secret = [nonce]
        program, check = request["program"], request["check"]
        leave = os._exit
        pid = os.fork()
        if pid == 0:
            del nonce
            try:
                _enter(self._ruleset, self._strict, request["timeout_s"], output=self._output_end, keep=(verdict_end,))
                _refuse_introspection(tracing=False)
                _execute(program, check, verdict_end, secret)
            finally:
                leave(0)
        os.close(verdict_end)
        said, kept, late = self._watch(verdict, None, deadline)
        status = _kill(pid)
        kept = _drain(self._output, kept)
        os.close(verdict)
        return "passed" if said == nonce and not late else _reason(said, late, status), kept, True

    def _watch(
        self, verdict: int, alive: int | None, deadline: float, hang_up: Callable[[], None] | None = None
    ) -> tuple[bytes, bytes, bool]:
        """Collect what is said until there is a whole verdict, nobody is left who could say one, or the deadline passes.

        Args:
            verdict: of a check in its own process (one message), or of one in the program's (until the pipe closes).
            alive: hangs up when the program's process ends, where the check has its own.
            hang_up: tells the check that nobody will answer it.

        Returns:
            The verdict, at most OUTPUT_BYTES of output (the rest is read and dropped, so that a child never blocks on a full pipe),
            and whether the deadline passed.
        """
        poll = select.poll()
        poll.register(verdict, select.POLLIN)
        poll.register(self._output, select.POLLIN)
        poll.register(self._control, 0)  # hang-up only
        if alive is not None:
            poll.register(alive, select.POLLIN)
        said, kept = b"", bytearray()
        gone, last = False, deadline
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                if gone and hang_up is not None:
                    hang_up()
                    hang_up, deadline = None, min(last, time.monotonic() + _END_S)
                    continue
                return said, bytes(kept), not gone
            for fd, _ in poll.poll(remaining * 1000 + 1):
                if fd == self._control:
                    return b"", b"", True
                part = os.read(fd, 1 << 16)
                if fd == verdict:
                    said += part
                    whole = len(said) >= 4 and len(said) >= 4 + struct.unpack(">I", said[:4])[0] if alive is not None else False
                    if not part or whole or (alive is None and len(said) > _VERDICT_BYTES + 1):
                        return said, bytes(kept), False
                elif fd == alive:
                    # The program ended: the check may still end too, if it asks no more, or has not read what was said last.
                    poll.unregister(alive)
                    gone, deadline = True, min(deadline, time.monotonic() + _LAST_WORDS_S)
                else:
                    kept += part[: OUTPUT_BYTES - len(kept)]


def _reason(said: bytes, late: bool, status: int) -> str:
    if late:
        return "timeout"
    text = said[1:].decode(errors="replace") if said.startswith(b"!") else ""
    if text == "failed" or text.startswith("error: "):
        return text[:_REASON_CHARS]
    if said:
        return "error: the program wrote to the verdict pipe"
    return _exit_reason(status)


def _exit_reason(status: int) -> str:
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
        return f"error: killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return "early exit"


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
    runner = _Runner(scratch, ruleset, strict, control=control)
    while not wrong and (request := receive(control)) is not None:
        send(answers, runner.run(request))
    jail.remove_base(base)  # the caller, which otherwise does this, has gone


class _NoFinder:
    """Finds none of the refused modules, wherever they lie."""

    def find_spec(self, name: str, path: Any = None, target: Any = None, modules: frozenset[str] = _REFUSED_MODULES) -> None:
        if name.rpartition(".")[2] in modules:
            raise ImportError(f"{name} is not allowed here")


def _prepare() -> None:
    """Import what programs commonly import, and take this package and its names out of their reach."""
    for name in _COMMON_MODULES.split():
        __import__(name)
    for name in [name for name in sys.modules if name.split(".")[0] == "gristmill"]:
        del sys.modules[name]
    sys.meta_path.insert(0, _NoFinder())
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # scripts end so; `-S` leaves them out
    for name in _REFUSED_MODULES:
        sys.modules[name] = None  # type: ignore[assignment]  # an import fails
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
