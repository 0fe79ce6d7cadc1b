"""A seccomp-BPF filter for untrusted Python, assembled by hand (standard library only).

A filter is a list of 8-byte instructions that the kernel runs on every system call over `struct seccomp_data`
(number, architecture, instruction pointer, six 64-bit arguments); see seccomp(2) and the kernel's
Documentation/userspace-api/seccomp_filter.rst. Every block below ends in a return on both branches, so that
blocks are simply laid one after the other and no jump distance depends on what stands elsewhere.
"""

import errno
import platform
import struct

_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_CLONE_THREAD = 0x10000
_FIRST_UNKNOWN_CALL = 470  # both tables below were read up to here
_PR_SET_PDEATHSIG = 1

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine name -> (column of the tables below, the kernel's architecture word)."""

# name: (x86-64 number, aarch64 number); None where the architecture has no such call. Three groups of calls
# are refused: those that reach the network or other processes, those that make a new process or program, and
# those that could widen what the process may do.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200),
    "listen": (50, 201), "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "process_madvise": (440, 440), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "setpriority": (141, 140), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122), "sched_setattr": (314, 274),
    "ioprio_set": (251, 30), "migrate_pages": (256, 238), "move_pages": (279, 239), "shmget": (29, 194),
    "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191),
    "semtimedop": (220, 192), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187),
    "mq_open": (240, 180), "mq_unlink": (241, 181), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "open_tree_attr": (467, 467), "unshare": (272, 97), "setns": (308, 268),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "bpf": (321, 280),
    "perf_event_open": (298, 241), "io_uring_setup": (425, 425), "userfaultfd": (323, 282),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "fanotify_init": (300, 262),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "acct": (163, 89), "syslog": (103, 116),
    "personality": (135, 92), "setuid": (105, 146), "setgid": (106, 144), "setreuid": (113, 145),
    "setregid": (114, 143), "setresuid": (117, 147), "setresgid": (119, 149), "setfsuid": (122, 151),
    "setfsgid": (123, 152), "setgroups": (116, 159),
    # Landlock knows truncation by path only from its third version on; truncation of an open file stays
    # allowed.
    "truncate": (76, 45),
}  # fmt: skip

# Landlock does not cover metadata: without this a program could chmod any file of its user. The calls answer
# "done" and do nothing, because shutil.copy and its like call them on files of the scratch directory.
_PRETENDED: dict[str, tuple[int | None, int | None]] = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "removexattrat": (466, 466), "file_setattr": (469, 469),
}  # fmt: skip

_CLONE, _CLONE3 = (56, 220), (435, 435)
_KILL_CALL, _TGKILL, _PRLIMIT, _PRCTL, _FCNTL = (62, 129), (234, 131), (302, 261), (157, 167), (72, 25)
_F_SETOWN, _F_SETOWN_EX = 8, 15


def supported() -> bool:
    """Is there a table for this machine's processor?"""
    return platform.machine() in ARCHITECTURES


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _argument(index: int) -> bytes:
    """Load the low 32 bits of an argument (both architectures are little-endian)."""
    return _op(_LOAD, 16 + 8 * index)


def _answer(number: int, action: int) -> bytes:
    return _op(_EQUAL, number, 0, 1) + _op(_RETURN, action)


def _answer_on(number: int, test: int, value: int, *, hit: int, miss: int) -> bytes:
    """Decide a call by a test on its first argument."""
    return _op(_EQUAL, number, 0, 4) + _argument(0) + _op(test, value, 0, 1) + _op(_RETURN, hit) + _op(_RETURN, miss)


def build_filter(machine: str, pid: int) -> bytes:
    """The filter for one process.

    Signals are allowed to `pid` itself only, limits may be read and lowered for the caller only, `clone` may
    make threads but no process, and `clone3` answers ENOSYS so that the C library falls back to `clone` (a
    filter cannot see clone3's flags, which lie behind a pointer). Calls newer than the tables do not exist
    for the program.

    Args:
        machine: as `platform.machine()` names it, a key of ARCHITECTURES.
        pid: the process that will be filtered, as it sees itself.

    Returns:
        The instructions, 8 bytes each.
    """
    column, word = ARCHITECTURES[machine]
    refuse = _ERRNO | errno.EPERM
    out = [_op(_LOAD, 4), _op(_EQUAL, word, 1, 0), _op(_RETURN, _KILL), _op(_LOAD, 0)]
    if machine == "x86_64":  # the x32 calls share the architecture word and differ by one bit in the number
        out += [_op(_AT_LEAST, 0x40000000, 0, 1), _op(_RETURN, _KILL)]
    out += [_op(_AT_LEAST, _FIRST_UNKNOWN_CALL, 0, 1), _op(_RETURN, _ERRNO | errno.ENOSYS)]
    for table, action in ((_REFUSED, refuse), (_PRETENDED, _ERRNO)):
        out += [_answer(number, action) for entry in table.values() if (number := entry[column]) is not None]
    out.append(_answer(_CLONE3[column], _ERRNO | errno.ENOSYS))
    out.append(_answer_on(_CLONE[column], _ANY_BIT, _CLONE_THREAD, hit=_ALLOW, miss=refuse))
    for call, only in ((_KILL_CALL, pid), (_TGKILL, pid), (_PRLIMIT, 0)):
        out.append(_answer_on(call[column], _EQUAL, only, hit=_ALLOW, miss=refuse))
    # A program that took back the parent-death signal could outlive its parent.
    out.append(_answer_on(_PRCTL[column], _EQUAL, _PR_SET_PDEATHSIG, hit=refuse, miss=_ALLOW))
    # The owner of a file is sent a signal when it can be read: before Landlock's sixth version, any process of the user.
    out.append(_op(_EQUAL, _FCNTL[column], 0, 6) + _argument(1))
    for command in (_F_SETOWN, _F_SETOWN_EX):
        out.append(_op(_EQUAL, command, 0, 1) + _op(_RETURN, refuse))
    out.append(_op(_RETURN, _ALLOW))
    out.append(_op(_RETURN, _ALLOW))
    return b"".join(out)
