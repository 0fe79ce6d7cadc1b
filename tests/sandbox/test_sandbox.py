"""The jail stops every attack, lets ordinary programs work, and only a finished check counts as a pass."""

import errno
import os
import platform
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gristmill.core.errors import InputError
from gristmill.sandbox import jail, sandbox, seccomp
from gristmill.sandbox.sandbox import Sandbox

ComesTrue = Callable[[Callable[[], bool]], bool]
LINUX = sys.platform == "linux" and seccomp.supported()
JAIL = LINUX and bool(jail.landlock_abi() or shutil.which("bwrap"))
jailed = pytest.mark.skipif(not JAIL, reason="no jail here: neither Landlock nor bubblewrap on this kernel")
with_bubblewrap = pytest.mark.skipif(not (JAIL and shutil.which("bwrap")), reason="bubblewrap is not installed")

# Each program ends normally exactly if its attack worked.
HARMLESS_ATTACKS = {
    "tcp": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)",
    "udp": "from socket import *\nsocket(AF_INET, SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
    "write outside": "open('{outside}', 'w').write('x')",
    "write the temporary folder": "import os\nopen('{tmp}/gristmill-attack-%d' % os.getpid(), 'w').close()",
    "read a secret": "assert 'hunter2' in open('{secret}').read()",
    "read /etc/passwd": "assert 'root' in open('/etc/passwd').read()",
    "environment": "import os\nassert 'hunter2' in os.environ.values()",
    "environment of the parent": (
        "import os\nseen = b''\n"
        "for pid in ('self', os.getppid(), 1, {pid}):\n"
        "    try: seen += open('/proc/%s/environ' % pid, 'rb').read()\n"
        "    except OSError: pass\n"
        "assert b'hunter2' in seen"
    ),
    "64 MB file": "with open('big', 'wb') as file:\n    for _ in range(64): file.write(bytes(1 << 20))",
    "exec": "import subprocess\nsubprocess.run(['/bin/true'], check=True)",
}
ATTACKS = HARMLESS_ATTACKS | {
    "fork bomb": (
        "import os, time\n"
        "for _ in range(300):\n"
        "    if os.fork() == 0:\n        time.sleep(5)\n        os._exit(0)"
    ),
    "4 GB": "x = bytearray(4 << 30)",
    "endless loop": "while True: pass",
    "signal the parent": (
        "import os\nsent = 0\n"
        "for pid in (os.getppid(), {pid}, -1, 0, 1):\n"
        "    try:\n        os.kill(pid, 9)\n        sent += 1\n"
        "    except OSError: pass\n"
        "assert sent"
    ),
    "early exit": "import os\nos._exit(0)",
    # Beyond the sixteen: the output flood has its own test.
    "outlive the zygote": "import ctypes, os\nassert ctypes.CDLL(None).prctl(1, 0) == 0",
    "change limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "socket pair": "import socket\nsocket.socketpair()",
    "link a file in": "import os\nos.link('{secret}', 'mine')\nopen('mine').read()",
}  # fmt: skip

BENIGN = {
    "scratch write": ("open('a', 'w').write('x')\nimport os, shutil\nos.mkdir('d')\nshutil.copy('a', 'd/b')",
                      "assert open('d/b').read() == 'x'"),
    "ctypes": ("import ctypes\nclass P(ctypes.Structure):\n    _fields_ = [('x', ctypes.c_int)]",
               "assert P(3).x == 3"),
    "threads": ("import threading\nseen = []\n"
                "ts = [threading.Thread(target=seen.append, args=(i,)) for i in range(20)]\n"
                "[t.start() for t in ts]\n[t.join() for t in ts]",
                "assert sorted(seen) == list(range(20))"),
    "standard library": ("import json, re, sqlite3, hashlib, decimal, zoneinfo, csv, unittest, xml.dom\n"
                         "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 3\n"
                         "def f(): return json.loads('[1]'), A().x, sqlite3.connect(':memory:') is not None",
                         "assert f() == ([1], 3, True)"),
    "deep recursion": ("import sys\nsys.setrecursionlimit(30000)\ndef f(n): return n and 1 + f(n - 1)",
                       "assert f(20000) == 20000"),
    "a main block": ("def f(): return 1\nif __name__ == '__main__':\n    input()", "assert f() == 1"),
    "a thread left behind": ("import threading, time\n"
                             "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()", ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def box(make_sandbox: type[Sandbox]) -> Iterator[Sandbox]:
    os.environ["GRISTMILL_TEST_SECRET"] = "hunter2"
    try:
        with make_sandbox() as made:
            yield made
    finally:
        del os.environ["GRISTMILL_TEST_SECRET"]


@pytest.fixture
def aims(tmp_path: Path) -> Iterator[dict[str, object]]:
    """What the attacks aim at: a listening port, a secret file, a place to write, this process."""
    (tmp_path / "secret").write_text("hunter2")
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield {
            "port": server.getsockname()[1],
            "secret": tmp_path / "secret",
            "outside": tmp_path / "outside",
            "tmp": tempfile.gettempdir(),
            "pid": os.getpid(),
        }


# ---- the jail ----------------------------------------------------------------------------------------------


@jailed
@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_blocked(box: Sandbox, aims: dict[str, object], name: str, tmp_path: Path) -> None:
    result = box.run(ATTACKS[name].format(**aims), "", timeout_s=0.3 if name == "endless loop" else 60.0)
    assert not result.passed
    expected = {"endless loop": "timeout", "early exit": "early exit", "4 GB": "error: MemoryError"}
    assert result.reason.startswith(expected.get(name, ("error: ", "failed")))
    assert "SyntaxError" not in result.reason and "NameError" not in result.reason
    assert not (tmp_path / "outside").exists()
    assert box.run("x = 1", "assert x == 1").passed  # the zygote lives


@pytest.mark.parametrize("name", HARMLESS_ATTACKS)
def test_attack_works_outside_the_jail(aims: dict[str, object], name: str, tmp_path: Path) -> None:
    """Otherwise the test above would prove nothing."""
    if name.startswith("environment of") and not Path("/proc/self/environ").exists():
        pytest.skip("no /proc here")
    program = ATTACKS[name].format(**aims | {"tmp": tmp_path})
    child_env = os.environ | {"GRISTMILL_TEST_SECRET": "hunter2"}
    subprocess.run([sys.executable, "-I", "-S", "-c", program], cwd=tmp_path, env=child_env, check=True)


@jailed
@pytest.mark.parametrize("name", BENIGN)
def test_benign_program_passes(box: Sandbox, name: str) -> None:
    result = box.run(*BENIGN[name])
    assert (result.passed, result.reason) == (True, "passed"), result


@jailed
def test_output_is_capped_and_drained(box: Sandbox) -> None:
    flood = "import os\nfor _ in range(200):\n    os.write(1, b'x' * (1 << 20))\nprint('end', flush=True)"
    result = box.run(flood, "")
    assert result.passed  # drained: the program never blocked
    assert result.output == "x" * (64 << 10)


@jailed
def test_many_small_files_cannot_fill_the_disk(box: Sandbox) -> None:
    space = box.run("import os\nprint(os.statvfs('.').f_files)", "")
    if int(space.output) > jail.SCRATCH_INODES:
        pytest.skip("no namespaces here, so that the scratch folder lies on the disk")
    assert "No space left" in box.run("for i in range(100000):\n    open(str(i), 'w').close()", "").reason
    large = "for i in range(5):\n    open(str(i), 'wb').write(bytes(15 << 20))"
    assert "No space left" in box.run(large, "").reason


@jailed
def test_metadata_outside_is_untouched(box: Sandbox, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.write_text("x")
    target.chmod(0o640)
    before = target.stat()
    box.run(f"import os\nos.chmod('{target}', 0o777)\nos.utime('{target}', (1, 1))", "")
    after = target.stat()
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


@jailed
def test_every_way_to_start_a_zygote_keeps_the_walls(make_sandbox: type[Sandbox], aims: dict[str, object]) -> None:
    """With namespaces and without, one at a time (bubblewrap too, where it is installed)."""
    for setup in sandbox._setups(unsafe=False):
        with make_sandbox() as box:
            box._candidates = [setup]
            try:
                assert box.run("x = 1", "assert x == 1").passed
            except InputError:
                assert setup.bubblewrap or setup.namespaces, "the plain jail must always start"
                continue
            for name in (
                "write outside",
                "read a secret",
                "environment of the parent",
                "signal the parent",
                "tcp",
            ):
                assert not box.run(ATTACKS[name].format(**aims), "").passed, (setup, name)


@with_bubblewrap
def test_bubblewrap_is_enough_without_landlock(
    monkeypatch: pytest.MonkeyPatch, make_sandbox: type[Sandbox], aims: dict[str, object]
) -> None:
    monkeypatch.setattr(jail, "landlock_abi", lambda: 0)
    with make_sandbox() as box:
        try:
            box.run("", "")
        except InputError:
            pytest.skip("bubblewrap is installed but cannot start here")
        for name, program in ATTACKS.items():
            assert not box.run(program.format(**aims), "", timeout_s=0.5).passed, name
        assert box.run(*BENIGN["standard library"]).passed
        # Without Landlock a program can write beside its folder, in the zygote's memory, but that is swept.
        box.run("open('../left', 'w').write('x')\nimport os\nos.rename('../run', '../gone')", "")
        assert box.run("import os", "assert os.listdir('..') == ['run'] and os.listdir('.') == []").passed


# ---- what counts as a pass ---------------------------------------------------------------------------------


@jailed
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("def f(): return 2", "failed"),
        ("f = 1 / 0", "error: ZeroDivisionError: division by zero"),
        ("def f(:", "error: SyntaxError: "),
        ("f = '\ud800'", "error: UnicodeEncodeError: "),
        ("import sys\nsys.exit(0)", "early exit"),
        ("raise SystemExit", "early exit"),
        ("def f():\n    import os\n    os._exit(0)", "early exit"),
        ("def f():\n    raise SystemExit(0)", "early exit"),
        ("import _thread\n_thread.exit()", "early exit"),
        ("import os\nos.closerange(3, 64)\nos._exit(0)", "early exit"),
        ("import ctypes\nctypes.memset(0, 0, 1)", "error: killed by SIGSEGV"),
        ("x = bytearray(1 << 30)", "error: MemoryError"),
    ],
)
def test_reasons(box: Sandbox, program: str, reason: str) -> None:
    result = box.run(program, "assert f() == 1")
    assert not result.passed
    assert result.reason.startswith(reason)
    assert "\n" not in result.reason and len(result.reason) <= 200


@jailed
def test_any_other_byte_in_the_pipes_spoils_a_pass(box: Sandbox) -> None:
    program = (
        "import os\n"
        "for fd in range(3, 64):\n"
        "    try: os.write(fd, b'x')\n    except OSError: pass"
    )  # fmt: skip
    assert box.run(program, "").reason == "error: the program broke the protocol of the check"
    assert box.run(program, "import gc").reason == "error: the program wrote to the verdict pipe"


SPRAY = """
import builtins, ctypes, functools, gc, os, sys, threading, time, types, _thread

def spray(*frames):
    seen, queue, values, releases = set(), list(frames), set(), []
    while queue:
        frame = queue.pop()
        if frame is None or id(frame) in seen:
            continue
        seen.add(id(frame))
        queue.append(frame.f_back)
        for value in list(frame.f_locals.values()) + list(frame.f_code.co_consts):
            if isinstance(value, bytes) and len(value) == 16:
                values.add(value)
            for part in value if isinstance(value, tuple) else (value,):
                if getattr(part, '__name__', '') == 'release':
                    releases.append(part)
    if values:
        write_everywhere(values)
        real_exit(0)
    for release in releases:
        try: release()
        except RuntimeError: pass

def write_everywhere(values):
    for value in values:
        for fd in range(3, 2048):
            try: real_write(fd, value)
            except OSError: pass

def evil(*args, **kwargs):
    spray(sys._getframe())
    return True

real_write, real_exit, real_sleep = os.write, os._exit, time.sleep
"""

FORGERIES = {
    "walk up the frames": "evil()",
    "walk the frames of a traceback": "try: 1 / 0\nexcept Exception as e: spray(e.__traceback__.tb_frame)",
    "frames of all threads": "spray(*sys._current_frames().values())",
    "frames of all threads, from a fresh sys": (
        "import _imp, importlib.machinery as m\n"
        "fresh = _imp.create_builtin(m.ModuleSpec('sys', None))\n"
        "spray(*(fresh or sys)._current_frames().values())"
    ),
    "the collector's objects": (
        "write_everywhere({x for o in gc.get_objects() for x in gc.get_referents(o)"
        " if isinstance(x, bytes) and len(x) == 16})"
    ),
    "referrers": "spray(*[o for o in gc.get_referrers(sys.modules) if isinstance(o, types.FrameType)])",
    "read and write every descriptor": (
        "for fd in range(3, 2048):\n"
        "    try:\n        os.set_blocking(fd, False)\n        write_everywhere([os.read(fd, 4096)])\n"
        "    except OSError: pass"
    ),
    "guess": "write_everywhere([bytes(16)])",
    "replace what the keeper calls": (
        "time.sleep = os._exit = os.write = _thread._count = evil\nreal_sleep(0.01)"
    ),
    "replace the keeper's globals": (
        "g = sys.unraisablehook.__globals__\n"
        "for name in list(g):\n    if name[:2] != '__': g[name] = evil\n"
        "real_sleep(0.01)"
    ),
    "release every lock in reach": (
        "for cell in sys.unraisablehook.__closure__:\n"
        "    try: cell.cell_contents.release()\n    except Exception: pass"
    ),
    "the failure hook": (
        "def hook(u):\n"
        "    evil()\n    time.sleep(0.01)\n"
        "    for x in (u.object, u.exc_traceback): spray(getattr(x, 'tb_frame', None))\n"
        "sys.unraisablehook = hook"
    ),
    "collector callbacks": "gc.set_threshold(1)\ngc.callbacks.append(evil)\ntime.sleep(0.02)",
    "finalizers": (
        "class D:\n    def __init__(self): self.me = self\n    __del__ = evil\n"
        "gc.set_threshold(1)\nfor _ in range(200):\n    D()\n    time.sleep(0.0001)"
    ),
    "a lurking thread": (
        "def lurk():\n    while True: evil()\n"
        "threading.Thread(target=lurk, daemon=True).start()"
    ),
    "an audit hook": "sys.addaudithook(evil)",
    "a tracer that skips assertions": (
        "def jump(frame, event, arg):\n"
        "    if event == 'line' and frame.f_lineno == 2: frame.f_lineno = 3\n"
        "    return jump if frame.f_code.co_filename == '<check>' else None\n"
        "sys.settrace(jump)\n"
        "frame = sys._getframe()\n"
        "while frame:\n"
        "    if frame.f_code.co_filename == '<check>': frame.f_trace = jump\n"
        "    frame = frame.f_back"
    ),
    "ctypes": "ctypes.pythonapi._PyThread_CurrentFrames.restype = ctypes.py_object\n"
              "spray(*ctypes.pythonapi._PyThread_CurrentFrames().values())",
    "at exit": "import atexit\natexit.register(evil)\nthreading._register_atexit(evil)",
    "swallow the assertion": (
        "builtins.AssertionError = KeyboardInterrupt\nsys.excepthook = threading.excepthook = evil"
    ),
    "other built-ins": "builtins.exec = builtins.compile = builtins.len = lambda *a, **k: 7",
    "replace __builtins__": "__builtins__ = {'len': lambda x: 7}",
}  # fmt: skip


@jailed
@pytest.mark.parametrize("name", FORGERIES)
def test_pass_cannot_be_forged(box: Sandbox, name: str) -> None:
    """A forger fails at top level and inside the check, and the next program is judged rightly."""
    forge = "try:\n    " + FORGERIES[name].replace("\n", "\n    ") + "\nexcept Exception as e: print(e)"
    assert not box.run(SPRAY + forge, "pass\nassert len([]) == 7\nx = 1", timeout_s=1).passed
    in_check = SPRAY + "def f():\n    " + forge.replace("\n", "\n    ")
    assert not box.run(in_check, "f()\nassert 1 == 2\nx = 1", timeout_s=1).passed
    assert box.run("x = 1", "assert x == 1").passed


@jailed
def test_check_meets_the_real_builtins(box: Sandbox) -> None:
    program = "import builtins\nbuiltins.sorted = lambda x: [1, 2]\ndef f(): return [2, 1]"
    assert box.run(program, "assert sorted(f()) == [1, 2] and f() == [2, 1]").passed
    assert not box.run("import builtins\nbuiltins.len = lambda x: 7", "assert len([]) == 7").passed


# ---- time, cleanliness, survival ---------------------------------------------------------------------------


@jailed
@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "import signal, threading\n"
        "for s in range(1, 32):\n"
        "    try: signal.pthread_sigmask(signal.SIG_BLOCK, [s])\n    except OSError: pass\n"
        "def spin():\n    while True: pass\n"
        "[threading.Thread(target=spin).start() for _ in range(8)]\nspin()",
        "while True: print('x' * 1000)",
    ],
)
def test_time_out_kills(box: Sandbox, program: str) -> None:
    result = box.run(program, "", timeout_s=0.2)
    assert (result.passed, result.reason) == (False, "timeout")
    assert 0.2 <= result.seconds < 30  # and not a minute


@jailed
def test_scratch_is_emptied_and_folders_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_sandbox: type[Sandbox], comes_true: ComesTrue
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mess = (
        "import os\nopen('left', 'w').write('x')\nos.mkdir('closed', 0)\nos.symlink('/usr', 'link')\n"
        "os.mkdir('deep')\nos.chdir('deep')\n"
        "for _ in range(300):\n    os.mkdir('d' * 100)\n    os.chdir('d' * 100)"
    )
    for namespaces in (True, False):
        with make_sandbox() as box:
            box._candidates = [c for c in box._candidates if c.namespaces == namespaces or c.bubblewrap]
            try:
                assert box.run(mess, "").passed
            except InputError:
                continue
            assert box.run("import os\nleft = os.listdir('.')", "assert left == []").passed
            assert box.run(mess + "\nwhile True: pass", "", timeout_s=0.3).reason == "timeout"
            assert box.run("import os\nleft = os.listdir('.')", "assert left == []").passed
            assert comes_true(lambda: len(list(tmp_path.iterdir())) == 1)  # what takes long is removed by another process
        assert comes_true(lambda: list(tmp_path.iterdir()) == [])


def test_empty_folder_removes_a_tree_deeper_than_a_path_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "keep").write_text("x")
    top = tmp_path / "top"
    top.mkdir()
    (top / "link").symlink_to(tmp_path / "keep")
    handle = os.open(top, os.O_RDONLY)
    for _ in range(1050):
        os.mkdir("d" * 50, dir_fd=handle)
        inner = os.open("d" * 50, os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle = inner
    os.mkdir("closed", 0, dir_fd=handle)
    os.close(handle)
    jail.empty_folder(str(top))
    assert list(top.iterdir()) == []
    assert (tmp_path / "keep").read_text() == "x"


@jailed
def test_one_zygote_survives_many_runs(box: Sandbox) -> None:
    box.run("", "")
    before = [worker._process.pid for worker in box._workers if worker._process]
    for i in range(50):
        assert box.run(f"def f(): return {i}", f"assert f() == {i // 2 * 2}").passed == (i % 2 == 0)
    assert [worker._process.pid for worker in box._workers if worker._process] == before


@jailed
def test_a_killed_zygote_is_replaced(make_sandbox: type[Sandbox]) -> None:
    with make_sandbox() as box:
        assert box.run("x = 1", "assert x == 1").passed
        (worker,) = [worker for worker in box._workers if worker._process]
        assert worker._process
        os.killpg(worker._process.pid, signal.SIGKILL)
        assert box.run("x = 1", "assert x == 1").passed


@jailed
def test_a_zygote_ends_with_its_caller(tmp_path: Path, comes_true: ComesTrue) -> None:
    code = (
        f"import sys, os, tempfile; sys.path[:] = {sys.path!r}; tempfile.tempdir = {str(tmp_path)!r}\n"
        "from gristmill.sandbox.sandbox import Sandbox\n"
        "box = Sandbox(); box.run('', '')\n"
        "print([w._process.pid for w in box._workers if w._process][0], flush=True)\n"
        "os._exit(0)"
    )
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert comes_true(lambda: not _alive(pid))
    # bubblewrap hides the folder's outside from the zygote.
    assert list(tmp_path.iterdir()) == [] or shutil.which("bwrap")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@jailed
def test_run_many_keeps_the_order_and_runs_two_at_a_time(box: Sandbox) -> None:
    pairs = [(f"def f(): return {i}", "assert f() % 3") for i in range(20)]
    assert [result.passed for result in box.run_many(pairs)] == [i % 3 != 0 for i in range(20)]
    nap = "import time\nstart = time.time()\ntime.sleep(0.3)\nprint(start, time.time())"

    def overlap() -> bool:
        spans = [[float(word) for word in result.output.split()] for result in box.run_many([(nap, "")] * 2)]
        return max(start for start, _ in spans) < min(end for _, end in spans)

    assert any(overlap() for _ in range(20))


# ---- machines without a jail -------------------------------------------------------------------------------


def test_refuses_without_landlock_and_bubblewrap(monkeypatch: pytest.MonkeyPatch, make_sandbox: type[Sandbox]) -> None:
    monkeypatch.setattr(jail, "landlock_abi", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="bubblewrap.*--unsafe-code"):
        Sandbox()
    with make_sandbox(unsafe=True) as box:
        assert box.run("def f(): return 1", "assert f() == 1").passed
        assert box.run("def f(): return 1", "assert f() == 2").reason == "failed"
        assert box.run("while True: pass", "", timeout_s=0.2).reason == "timeout"
        assert box.run("import os\nos._exit(0)", "").reason == "early exit"


def test_refuses_an_unknown_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(InputError, match="x86-64 or aarch64.*--unsafe-code"):
        Sandbox()


@jailed
def test_refuses_when_the_jail_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jail, "landlock_abi", lambda: 99)  # the zygote will ask for a ruleset nobody offers
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sandbox._Setup, "command", lambda self, base: [sys.executable, "-c", "pass"])
    with Sandbox() as box, pytest.raises(InputError, match="could not be built"):
        box.run("", "")


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_a_meaningless_time_limit(timeout_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    with Sandbox(unsafe=True) as box, pytest.raises(InputError, match="time limit"):
        box.run("", "", timeout_s=timeout_s)


# ---- the system-call filter, interpreted: both processors on either ----------------------------------------


def _interpret(code: bytes, number: int, word: int, argument: int = 0) -> int:
    data = struct.pack("=IIQ6Q", number, word, 0, argument, 0, 0, 0, 0, 0)
    register, at = 0, 0
    while True:
        op, if_true, if_false, value = struct.unpack_from("=HBBI", code, 8 * at)
        at += 1
        if op == 0x20:
            register = struct.unpack_from("=I", data, value)[0]
        elif op == 0x06:
            return value
        else:
            hit = {0x15: register == value, 0x35: register >= value, 0x45: bool(register & value)}[op]
            at += if_true if hit else if_false


@pytest.mark.parametrize("machine", sorted(seccomp.ARCHITECTURES))
def test_filter_on_both_processors(machine: str) -> None:
    column, word = seccomp.ARCHITECTURES[machine]
    code = seccomp.build_filter(machine, pid=77)
    assert len(code) // 8 < 4096
    allow, refuse, missing = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS

    def answer(x86: int, arm: int, argument: int = 0) -> int:
        return _interpret(code, (x86, arm)[column], word, argument)

    # read, write, mmap, exit_group; then socket, execve, ptrace, io_uring_setup
    assert answer(0, 63) == answer(1, 64) == answer(9, 222) == answer(231, 94) == allow
    assert answer(41, 198) == answer(59, 221) == answer(101, 117) == answer(425, 425) == refuse
    assert answer(56, 220, 0x3D0F00) == allow  # what a thread library asks of clone
    assert answer(56, 220, signal.SIGCHLD) == refuse  # fork
    assert answer(435, 435) == answer(471, 471) == missing  # clone3, and calls nobody knew
    assert answer(62, 129, 77) == answer(234, 131, 77) == allow
    for other in (0, 1, 2**32 - 1):
        assert answer(62, 129, other) == answer(234, 131, other) == refuse
    assert answer(302, 261, 0) == allow and answer(302, 261, 1) == refuse
    assert answer(268, 53) == 0x50000  # fchmodat: pretended
    assert answer(157, 167, 1) == refuse and answer(157, 167, 15) == allow
    assert _interpret(code, 0, word ^ 1) == 0x80000000
    if machine == "x86_64":
        assert _interpret(code, 0x40000000, word) == 0x80000000
