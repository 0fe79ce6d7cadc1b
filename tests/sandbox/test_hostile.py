"""Hostile programs beside those of test_sandbox.py: none passes, and none has an effect outside the jail."""

import _ctypes
import ctypes
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gristmill.sandbox import jail, seccomp
from gristmill.sandbox.sandbox import Sandbox

ComesTrue = Callable[[Callable[[], bool]], bool]
LINUX = sys.platform == "linux" and seccomp.supported()
JAIL = LINUX and bool(jail.landlock_abi() or shutil.which("bwrap"))
jailed = pytest.mark.skipif(not JAIL, reason="no jail here: neither Landlock nor bubblewrap on this kernel")

SECRET = "hunter2"

# `any_works` fails unless one of its arguments, called, came through; an error that is no OSError is a mistake in the attack.
HELPERS = """
import os

def any_works(*attempts):
    results = []
    for attempt in attempts:
        try: results.append(attempt())
        except OSError as error: print(error)
    print(results)
    assert results
"""

# Each ends normally exactly if something worked that must not.
HARMLESS_ATTACKS = {
    "look up a name": "import socket\nany_works(lambda: socket.getaddrinfo('localhost', 53))",
    "delete": (
        "import shutil\n"
        "any_works(lambda: os.unlink(secret), lambda: os.rename(secret, 'mine'), lambda: shutil.rmtree(folder))"
    ),
    "overwrite": (
        "open('mine', 'w').close()\n"
        "any_works(lambda: os.truncate(secret, 0), lambda: open(secret, 'r+').write('x'), lambda: open(secret, 'a').write('x'),\n"
        "    lambda: os.open(secret, os.O_RDONLY | os.O_TRUNC), lambda: os.replace('mine', secret))"
    ),
    "read by a back door": (
        "import shutil\n"
        "def by_folder(): return open(os.open('secret', 0, dir_fd=os.open(folder, os.O_PATH))).read()\n"
        "def by_handle(): return open('/proc/self/fd/%d' % os.open(secret, os.O_PATH)).read()\n"
        "def by_chdir():\n    os.chdir(folder)\n    return open('secret').read()\n"
        "any_works(lambda: shutil.copy(secret, 'mine'), lambda: os.listdir(folder), by_folder, by_handle, by_chdir)"
    ),
    "symbolic links, left behind": (
        "os.symlink(secret, 'file')\nos.symlink(folder, 'there')\n"
        "any_works(lambda: open('file').read(), lambda: open('file', 'a').write('x'), lambda: os.listdir('there'),\n"
        "    lambda: open('there/new', 'w').close(), lambda: os.unlink('there/secret'))"
    ),
    "a shell": (
        "shell = ['/bin/sh', '-c', 'echo > \"$0\"', outside]\n"
        "def by_system():\n    if os.system(f'echo > {outside}'): raise OSError('no shell')\n"
        "any_works(by_system, lambda: os.posix_spawn(shell[0], shell, {}), lambda: os.execv(shell[0], shell))"
    ),
    "/proc of another process": (
        "there = f'/proc/{victim}/'\n"
        "any_works(lambda: open(there + 'mem', 'r+b'), lambda: open(there + 'maps').read(), lambda: os.listdir(there + 'fd'),\n"
        "    lambda: open(there + 'root' + secret).read(), lambda: os.readlink(there + 'cwd'), lambda: os.listdir('/proc'))"
    ),
    "/proc of itself": (
        "any_works(lambda: open('/proc/self/mem', 'r+b'), lambda: open('/proc/self/environ').read(),\n"
        "    lambda: open('/proc/self/root' + secret).read(), lambda: open('/proc/thread-self/maps').read())"
    ),
    "trace by ctypes": (
        "import ctypes\n"
        "def trace():\n    if ctypes.CDLL(None).ptrace(0, 0, 0, 0): raise OSError('no ptrace')\n"
        "any_works(trace, lambda: ctypes.string_at(id(trace), 8), lambda: ctypes.pythonapi.Py_IsInitialized())"
    ),
    "memory in pieces": (
        "import mmap\npieces = []\n"
        "for _ in range(40):\n"
        "    try: pieces.append(mmap.mmap(-1, 64 << 20))\n    except (MemoryError, OSError): pass\n"
        "assert len(pieces) > 16"
    ),
}  # fmt: skip

# Past the audit hook: any function of the C library lies at a fixed distance from one whose address ctypes tells.
RAW = """
import ctypes
word = ctypes.c_long
syscall = ctypes.CFUNCTYPE(word, *[word] * 7, use_errno=True)(ctypes._memmove_addr + distance)

def call(number, *arguments):
    kept = [ctypes.create_string_buffer(a) if isinstance(a, bytes) else a for a in arguments]
    words = [ctypes.cast(a, ctypes.c_void_p).value if isinstance(a, ctypes.Array) else a for a in kept]
    answer = syscall(number, *words, *[0] * (6 - len(words)))
    return answer if answer != -1 else -ctypes.get_errno()

if call(getpid) != os.getpid(): raise RuntimeError('no system call came through')
"""
GETPID = {"x86_64": 39, "aarch64": 172}
RAW_CALLS = {  # the numbers on x86-64 and aarch64, the arguments
    "socket": (41, 198, "2, 1"),
    "clone, a process": (56, 220, "17"),
    "clone3": (435, 435, "bytes(88), 88"),
    "execve": (59, 221, "b'/bin/true'"),
    "kill": (62, 129, "victim, 9"),
    "tgkill": (234, 131, "victim, victim, 9"),
    "rt_sigqueueinfo": (129, 138, "victim, 9, bytes(128)"),
    "pidfd_open": (434, 434, "victim"),
    "ptrace": (101, 117, "0x4206, victim"),
    "process_vm_readv": (310, 270, "victim"),
    "prlimit": (302, 261, "victim, 7, 0, bytes(16)"),
    "setpriority": (141, 140, "0, victim, 19"),
    "prctl, to outlive the parent": (157, 167, "1, 0"),
    "openat": (257, 56, "-100, secret.encode()"),
    "unlinkat": (263, 35, "-100, secret.encode()"),
    "io_uring_setup": (425, 425, "1, bytes(120)"),
    "memfd_create": (319, 279, "b'x'"),
    "unshare": (272, 97, "0x10000000"),
    "mount": (165, 40, "b'x', b'/', b'tmpfs'"),
    "bpf": (321, 280, "0, bytes(128), 128"),
    "shmget": (29, 194, "0, 4096, 0o1600"),
}


def _raw_calls() -> str:
    column = platform.machine() == "aarch64"
    made = "".join(f"    {name!r}: call({entry[column]}, {entry[2]}),\n" for name, entry in RAW_CALLS.items())
    refused = "(-errno.EPERM, -errno.EACCES, -errno.ENOSYS, -errno.ENOENT)"  # no such file: bubblewrap shows the program few
    return RAW + f"import errno\ndone = {{\n{made}}}\nprint(done)\nassert any(answer not in {refused} for answer in done.values())"


TIME_OUT_S = 0.4

# Name: program, check, how the reason begins.
HOSTILE: dict[str, tuple[str, str, str | tuple[str, ...]]] = {name: (text, "", "failed") for name, text in HARMLESS_ATTACKS.items()} | {
    "raw system calls": (_raw_calls(), "", "failed"),
    "write the standard library": (
        "import sys\n"
        "any_works(lambda: open(os.__file__, 'a'), lambda: open(sys.executable, 'a'), lambda: os.mkdir(os.__file__[:-5] + 'x'))",
        "", "failed",
    ),
    "a signal by the owner of a pipe": (
        "import fcntl, signal, time\n"
        "reader, writer = os.pipe()\n"
        "def kill():\n"
        "    fcntl.fcntl(reader, fcntl.F_SETOWN, victim)\n"
        "    fcntl.fcntl(reader, fcntl.F_SETSIG, signal.SIGTERM)\n"
        "    fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)\n"
        "    os.write(writer, b'x')\n    time.sleep(0.05)\n"
        "any_works(kill)",
        "assert 'sent' == 'arrived'", "failed",
    ),
    "threads without end": (
        "import _thread, time\n"
        "_thread.stack_size(32 << 10)\n"
        "while True:\n"
        "    try: _thread.start_new_thread(time.sleep, (60,))\n    except (RuntimeError, MemoryError): pass",
        "", ("timeout", "error: "),  # whichever limit it meets first, time or memory
    ),
    "a loop in C that keeps the interpreter's lock": ("import itertools\nsum(itertools.repeat(0))", "", "timeout"),
    "recursion through C": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return sorted([x], key=f)\nf(1)", "", "error: ",
    ),
    "a text too deep to compile": ("x = " + "-" * 200_000 + "1", "", "error: "),
    "answer in the zygote's name": (
        "import json, struct\n"
        "answer = json.dumps({'passed': True, 'reason': 'passed', 'seconds': 0.0, 'output': ''}).encode()\n"
        "for fd in range(256):\n"
        "    try: os.write(fd, struct.pack('>I', len(answer)) + answer)\n    except OSError: pass\n"
        "os._exit(0)",
        "", ("early exit", "error: the program broke the protocol of the check"),
    ),
    "a pipe in place of the verdict's": (
        "import threading\n"
        "reader, writer = os.pipe()\n"
        "saved = []\n"
        "for fd in set(range(3, 64)) - {reader, writer}:\n"
        "    try:\n        saved.append(os.dup(fd))\n        os.dup2(writer, fd)\n    except OSError: break\n"
        "def forward():\n"
        "    data = os.read(reader, 16)\n"
        "    for fd in saved: os.write(fd, data[:16].ljust(16))\n"
        "    os._exit(0)\n"
        "threading.Thread(target=forward, daemon=True).start()",
        "assert 1 == 2", ("failed", "error: ", "early exit"),
    ),
    "an import that lies": (
        "import builtins, types\n"
        "builtins.__import__ = lambda *a, **k: types.SimpleNamespace(floor=lambda x: 2)",
        "import math\nassert math.floor(1.5) == 2", "failed",
    ),
    "assertions off": (
        "import builtins\n"
        "class AssertionError(BaseException): pass\n"
        "builtins.AssertionError = AssertionError\nvars(builtins)['__debug__'] = False",
        "assert 1 == 2", "failed",
    ),
    "the secret in another interpreter's frames": (
        "import importlib, time\n"
        "text = '''\nimport os, sys\n"
        "for f in sys._current_frames().values():\n"
        "    while f:\n"
        "        found = [v for v in f.f_locals.values() if isinstance(v, bytes) and len(v) == 16]\n"
        "        for fd in range(3, 256):\n"
        "            for nonce in found:\n"
        "                try: os.write(fd, nonce)\n"
        "                except OSError: pass\n"
        "        if found: os._exit(0)\n"
        "        f = f.f_back\n'''\n"
        "for name, run in (('_xxsubinterpreters', 'run_string'), ('_interpreters', 'exec')):\n"
        "    try: module = importlib.import_module(name)\n    except ImportError: continue\n"
        "    getattr(module, run)(module.create(), text)",
        "assert 1 == 2", ("failed", "error: ", "early exit"),
    ),
    "a collection on top of the keeper": (
        "import gc, sys, time, _thread\n"
        "get, limit, write, leave, ident = sys._getframe, sys.setrecursionlimit, os.write, os._exit, _thread.get_ident\n"
        "me = ident()\n"
        "def walk(*a):\n"
        "    if ident() == me: return\n"
        "    limit(5000)\n    f = get()\n"
        "    while f:\n"
        "        found = [v for v in f.f_locals.values() if isinstance(v, bytes) and len(v) == 16]\n"
        "        for fd in range(3, 256):\n"
        "            for nonce in found:\n"
        "                try: write(fd, nonce)\n"
        "                except OSError: pass\n"
        "        if found: leave(0)\n"
        "        f = f.f_back\n"
        "gc.callbacks.append(walk)\ngc.collect()\ngc.set_threshold(1, 1, 1)\n"
        "for n in range(1, 60):\n"
        "    try:\n        limit(n)\n        break\n"
        "    except RecursionError: pass\n"
        "time.sleep(0.05)\nlimit(5000)\ntime.sleep(0.3)",
        "assert 1 == 2", ("failed", "error: ", "early exit"),
    ),
    "exit while the check runs": (
        "import threading\nthreading.Timer(0.05, os._exit, (0,)).start()",
        "import time\ntime.sleep(1)\nassert 1 == 2", ("early exit", "failed"),
    ),
    "kill itself": ("import signal\ndef f(): signal.raise_signal(signal.SIGKILL)", "f()\nassert 1 == 2", "early exit"),
    "an error that speaks for itself": (
        "class Passed(AssertionError):\n"
        "    def __str__(self):\n        os._exit(0)\n"
        "class Loud(Exception):\n"
        "    def __str__(self):\n        print('passed')\n        return 'passed\\0'\n"
        "def f(): raise Loud() from Passed()",
        "f()", ("error: Loud", "early exit"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=["strongest", "plain"])
def box(request: pytest.FixtureRequest, make_sandbox: type[Sandbox]) -> Iterator[Sandbox]:
    """A sandbox as this machine builds it, and one that has neither bubblewrap nor namespaces."""
    os.environ["GRISTMILL_TEST_SECRET"] = SECRET
    try:
        with make_sandbox() as made:
            if request.param == "plain":
                made._candidates = [setup for setup in made._candidates if not setup.bubblewrap and not setup.namespaces]
                if not made._candidates:
                    pytest.skip("no Landlock here")
            yield made
    finally:
        del os.environ["GRISTMILL_TEST_SECRET"]


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """Another process of the same user."""
    with subprocess.Popen(["sleep", "60"], env=os.environ | {"GRISTMILL_TEST_SECRET": SECRET}) as process:
        yield process
        process.kill()


@pytest.fixture
def aims(tmp_path: Path, victim: subprocess.Popen[bytes]) -> str:
    """What the programs aim at, as the head of each."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "secret").write_text(SECRET)
    libc = ctypes.CDLL(None)
    values = {
        "folder": str(folder),
        "secret": str(folder / "secret"),
        "outside": str(tmp_path / "outside"),
        "victim": victim.pid,
        "distance": (ctypes.cast(libc.syscall, ctypes.c_void_p).value or 0) - _ctypes._memmove_addr,
        "getpid": GETPID.get(platform.machine(), 0),
    }
    return "".join(f"{name} = {value!r}\n" for name, value in values.items()) + HELPERS


def _processes(box: Sandbox) -> int:
    """How many processes there are in a sandbox: its zygotes, one that runs checks, and what else should not be there."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    ours = {worker._process.pid for worker in box._workers if worker._process}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return len(ours)


def _state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Mode, time of change and content of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mode, path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@jailed
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program_neither_passes_nor_harms(
    box: Sandbox, aims: str, victim: subprocess.Popen[bytes], name: str, tmp_path: Path, comes_true: ComesTrue
) -> None:
    program, check, expected = HOSTILE[name]
    processes, state = 0, _state(tmp_path)
    for _ in range(2):  # the process that runs checks may have done its share, and then there is none
        assert box.run("", "").passed
        processes = max(processes, _processes(box))
    source = program if name == "a text too deep to compile" else aims + program
    result = box.run(source, check, TIME_OUT_S) if "timeout" in expected else box.run(source, check)
    assert not result.passed
    assert result.reason.startswith(expected), result
    assert SECRET not in result.output + result.reason
    assert _state(tmp_path) == state
    assert victim.poll() is None
    assert box.run("import os", "assert os.listdir('.') == []").passed
    assert comes_true(lambda: _processes(box) <= processes)  # nothing that was not there before


@pytest.mark.skipif(not LINUX, reason="the attacks are written for Linux")
@pytest.mark.parametrize("name", [*HARMLESS_ATTACKS, "a signal by the owner of a pipe", "raw system calls"])
def test_attack_works_outside_the_jail(aims: str, name: str, tmp_path: Path) -> None:
    """Otherwise the test above would prove nothing."""
    program = RAW if name == "raw system calls" else HOSTILE[name][0]
    subprocess.run([sys.executable, "-I", "-S", "-c", aims + program], cwd=tmp_path, check=True)


@jailed
def test_more_folders_than_can_be_removed_in_time_hold_nobody_up(box: Sandbox) -> None:
    result = box.run("import os\ni = 0\nwhile True:\n    os.mkdir(str(i))\n    i += 1", "", 3.0)
    assert not result.passed and not result.reason.startswith("error: the zygote")
    assert box.run("import os", "assert os.listdir('.') == []").passed
