"""Process isolation: resource limits, Landlock, seccomp, namespaces (standard library only).

Everything here acts on the calling process and cannot be undone by it. The order of `enter` matters: Landlock
and seccomp need no_new_privs first, and the system-call filter comes last because it forbids what the
others use.
Sources: landlock(7), seccomp(2), capabilities(7), user_namespaces(7).
"""

import ctypes
import math
import os
import platform
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable
from functools import partial

from gristmill.sandbox import seccomp

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same on every architecture
_READ_FILE, _WRITE_FILE, _READ_DIR = 1 << 2, 1 << 1, 1 << 3
_MAKE_DEVICES = 1 << 6 | 1 << 11
_EXECUTE = 1 << 0
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 4, 38, 22
_NEW_NAMESPACES = 0x00020000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000  # mount, ipc, user, pid, net
_MS_NOSUID_NODEV, _MS_PRIVATE_RECURSIVE = 2 | 4, 1 << 18 | 1 << 14

MEMORY_BYTES = 1 << 30
FILE_BYTES = 16 << 20
OPEN_FILES = 64
SCRATCH_BYTES, SCRATCH_INODES = 64 << 20, 4096

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def landlock_abi() -> int:
    """The Landlock version this kernel offers; 0 where it offers none."""
    if sys.platform != "linux":
        return 0
    return max(0, int(_libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))))


def readable_paths() -> list[str]:
    """What a program may read: the system's libraries and the running interpreter's."""
    prefixes = {sys.base_prefix, sys.base_exec_prefix}
    paths = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/urandom", "/dev/zero"]
    paths += [os.path.join(prefix, name) for prefix in sorted(prefixes) for name in ("lib", "lib64")]
    return [path for path in paths if os.path.exists(path)]


def _add_path(ruleset: int, path: str, rights: int) -> None:
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, handle))
        _check(_libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, ctypes.c_uint32(0)), "landlock_add_rule")
    finally:
        os.close(handle)


def landlock_ruleset(abi: int, scratch: str) -> int:
    """A Landlock ruleset: read the libraries, write in `scratch`, nothing else.

    From version 4 on TCP is refused, from 6 on signals and abstract sockets of other processes.

    Args:
        abi: the Landlock version, at least 1.
        scratch: an existing folder.

    Returns:
        A file descriptor for `enter`.

    Raises:
        OSError: the kernel refused.
    """
    handled = (1 << 13) - 1
    handled |= sum(1 << bit for bit, since in ((13, 2), (14, 3), (15, 5)) if abi >= since)
    words = [handled] + [0b11] * (abi >= 4) + [0b11] * (abi >= 6)
    attributes = ctypes.create_string_buffer(struct.pack(f"={len(words)}Q", *words), 8 * len(words))
    created = _libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(8 * len(words)), ctypes.c_uint32(0))
    ruleset = _check(created, "landlock_create_ruleset")
    for path in readable_paths():
        _add_path(ruleset, path, _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0))
    _add_path(ruleset, "/dev/null", _READ_FILE | _WRITE_FILE)
    _add_path(ruleset, scratch, handled & ~(_MAKE_DEVICES | _EXECUTE | 1 << 15))
    return ruleset


def _limit(cpu_seconds: int) -> None:
    limits = {
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for which, value in limits.items():
        hard = resource.getrlimit(which)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(which, (value, value))


def _drop_capabilities() -> None:
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
    _check(_libc.capset(header, ctypes.create_string_buffer(24)), "capset")


def _filter_calls() -> None:
    code = seccomp.build_filter(platform.machine(), os.getpid())
    buffer = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer)))
    _check(_libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(2), program), "seccomp")


def _forbid_new_privileges() -> None:
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), 0, 0, 0), "PR_SET_NO_NEW_PRIVS")


def _restrict(ruleset: int) -> None:
    _check(_libc.syscall(_LANDLOCK_RESTRICT, ruleset, ctypes.c_uint32(0)), "landlock_restrict_self")


def die_with_parent() -> None:
    """Be killed when the (single-threaded) parent dies."""
    if sys.platform == "linux":
        _check(_libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL)), "PR_SET_PDEATHSIG")


def hide_memory() -> None:
    """Forbid other processes of the same user to trace this one or to read its memory and environment."""
    if sys.platform == "linux":
        _check(_libc.prctl(_PR_SET_DUMPABLE, ctypes.c_ulong(0)), "PR_SET_DUMPABLE")


def enter(ruleset: int | None, timeout_s: float, *, strict: bool) -> None:
    """Lock the calling process in for the rest of its life.

    Args:
        ruleset: from `landlock_ruleset`; None where the kernel has no Landlock.
        timeout_s: the wall-clock limit; processor time is limited to the larger of 10 s and twice this.
        strict: fail on the first wall that cannot be built; otherwise build those that can be.

    Raises:
        OSError, ValueError: a wall could not be built (only when strict).
    """
    cpu_seconds = max(10, math.ceil(2 * timeout_s))
    walls: list[Callable[[], None]] = [die_with_parent, hide_memory, partial(_limit, cpu_seconds)]
    if sys.platform == "linux":
        walls.append(_forbid_new_privileges)
        if ruleset is not None:
            walls.append(partial(_restrict, ruleset))
        walls.append(_drop_capabilities)
        if seccomp.supported():
            walls.append(_filter_calls)
    for build in walls:
        try:
            build()
        except (OSError, ValueError):
            if strict:
                raise


def enter_namespaces(base: str) -> bool:
    """Give the calling process its own users, mounts, network, IPC and (for its children) process numbers.

    `base` becomes a file system in memory of 64 MiB and 4096 files: many small files cannot fill the disk.

    Args:
        base: an existing folder.

    Returns:
        False, with nothing changed, where the kernel or a container forbids it.

    Raises:
        OSError: the namespaces were made but could not be set up; this process is of no further use.
    """
    user, group = os.getuid(), os.getgid()
    if sys.platform != "linux" or _libc.unshare(_NEW_NAMESPACES) != 0:
        return False
    settings = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
    for name, text in settings.items():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    _check(_libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_PRIVATE_RECURSIVE), None), "mount private")
    options = f"size={SCRATCH_BYTES},nr_inodes={SCRATCH_INODES},mode=700".encode()
    flags = ctypes.c_ulong(_MS_NOSUID_NODEV)
    _check(_libc.mount(b"tmpfs", os.fsencode(base), b"tmpfs", flags, options), "mount tmpfs")
    return True


def remove_base(base: str) -> None:
    """Remove the scratch file system, if `enter_namespaces` made one, and its folder."""
    empty_folder(base)
    if sys.platform == "linux":
        _libc.umount2(os.fsencode(base), 2)  # 2: as soon as nothing uses it; fails where nothing is mounted
    os.rmdir(base)


class _TooLong(Exception):
    """There was more to remove than there was time."""


def _remove_files(folder: int, deadline: float) -> list[str]:
    """Unlink what is no folder in an open folder; returns the folders in it, made accessible."""
    names = []
    with os.scandir(folder) as entries:
        for entry in list(entries):
            if time.monotonic() > deadline:
                raise _TooLong
            if entry.is_dir(follow_symlinks=False):
                os.chmod(entry.name, 0o700, dir_fd=folder)
                names.append(entry.name)
            else:
                os.unlink(entry.name, dir_fd=folder)
    return names


def empty_folder(folder: str, seconds: float = math.inf) -> bool:
    """Remove everything in `folder`, however deep; no other process may be writing in it. False if the time did not suffice.

    It walks with one open folder at a time: a program can nest deeper, within a second, than the recursion
    limit, the number of open files or the length of a path allow a recursive removal to follow.
    """
    deadline = time.monotonic() + seconds
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    here = os.open(folder, flags)
    path: list[str] = []
    try:
        waiting = [_remove_files(here, deadline)]  # the folders still to be removed at every level of the path
        while waiting[-1] or path:
            if waiting[-1]:
                path.append(waiting[-1].pop())
                there = os.open(path[-1], flags, dir_fd=here)
                waiting.append(_remove_files(there, deadline))
            else:
                waiting.pop()
                there = os.open("..", flags, dir_fd=here)
                os.rmdir(path.pop(), dir_fd=there)
            os.close(here)
            here = there
            if time.monotonic() > deadline:
                return False
    except _TooLong:
        return False
    finally:
        os.close(here)
    return True
