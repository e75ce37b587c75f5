"""Irreversible confinement of the calling process, so that hostile code cannot harm the machine, even as root.

Each of these layers stops most attacks on its own:

1. limits of resources: CPU time, address space, file size, open files, processes, core dumps
2. Landlock (Linux 5.13 and later): reads only below the standard library and the system's shared libraries, writes only
   below one directory; from Linux 6.7 on, no TCP, and from 6.12 on, no signals to other processes
3. the loss of all capabilities, so that root is not exempt from the limits above
4. seccomp (x86-64 and arm64): only the system calls that plain computation needs
5. an audit hook, which says what was refused

Without 2 or 4 (macOS, older Linux, gVisor), the sandbox runs only if the user allows it, and without 2 root becomes
`nobody`. Side channels and the wall-clock time are not covered; the parent kills a process that takes too long. The
sandbox's child imports this module before any foreign code, so it imports only the standard library.
"""

# In the child of the sandbox, from left to right:
#
#     limit_resources -> confine_files -> drop_privileges -> fork -+-> candidate: confine_calls, watch
#                                                                  +-> examiner:  confine_calls
#
# `pipeline.rewards.checker.serve` does the same without the fork. The order matters: Landlock opens the folders that it
# allows, and only a process that still has its capabilities can give its directory to another user.

import contextlib
import ctypes
import errno
import math
import os
import platform
import struct
import sys

# Windows lacks it, but also imports this module.
with contextlib.suppress(ImportError):
    import resource

# prctl(2), capset(2), landlock(7), seccomp(2)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
CAPABILITY_VERSION_3 = 0x20080522
# access rights of landlock(7): write file 1<<1, read file 1<<2, read directory 1<<3, remove file 1<<5,
# make regular file 1<<8, truncate 1<<14 (ABI 3)
READ = 1 << 2 | 1 << 3
WRITE = READ | 1 << 1 | 1 << 5 | 1 << 8 | 1 << 14
# All rights that ABI 1, 2, … know; from ABI 5 on, they include ioctl on devices.
ALL_RIGHTS = [(1 << bits) - 1 for bits in (13, 14, 15, 15, 16)]

# name: (x86-64, arm64) from the kernel's asm/unistd.h; None where the architecture has no such call
SYSTEM_CALLS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "readv": (19, 65), "pread64": (17, 67), "write": (1, 64), "writev": (20, 66),
    "pwrite64": (18, 68), "close": (3, 57), "lseek": (8, 62), "openat": (257, 56), "fcntl": (72, 25),
    "ioctl": (16, 29), "ftruncate": (77, 46), "fstat": (5, 80), "stat": (4, None), "lstat": (6, None),
    "newfstatat": (262, 79), "statx": (332, 291), "access": (21, None), "faccessat": (269, 48),
    "faccessat2": (439, 439), "getcwd": (79, 17), "getdents64": (217, 61), "readlink": (89, None),
    "readlinkat": (267, 78), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe2": (293, 59),
    "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216), "madvise": (28, 233),
    "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "futex": (202, 98), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "nanosleep": (35, 101), "gettimeofday": (96, 169), "times": (100, 153),
    "getrandom": (318, 278), "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "exit": (60, 93), "exit_group": (231, 94), "wait4": (61, 260), "getpid": (39, 172), "getppid": (110, 173),
    "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "getrusage": (98, 165), "sysinfo": (99, 179), "uname": (63, 160), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "restart_syscall": (219, 128), "rseq": (334, 293), "setitimer": (38, 103),
}  # fmt: skip
# changes to the directory, which are only safe if Landlock limits them to one directory
DIRECTORY_CALLS: dict[str, tuple[int | None, int | None]] = {
    "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
}  # fmt: skip
# allowed commands of calls with dangerous ones: F_SETOWN and FIOSETOWN signal other processes
COMMANDS: dict[str, tuple[int, ...]] = {
    # dup, descriptor and status flags, locks, dup with close-on-exec
    "fcntl": (0, 1, 2, 3, 4, 5, 6, 7, 1030),
    # whether it is a terminal, its size, non-blocking, bytes to read, close-on-exec
    "ioctl": (0x5401, 0x5413, 0x5421, 0x541B, 0x5450, 0x5451),
}
REFUSED_EVENTS = (
    "socket.", "subprocess.", "ctypes.", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill",
    "os.chmod", "os.chown", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.utime", "os.setxattr", "pty.",
    "shutil.", "syslog.", "signal.pthread_kill", "_thread.start_new_thread", "resource.",
)  # fmt: skip


def limit_resources(seconds: float, memory_mb: int) -> None:
    """Set hard limits: `seconds` of CPU time (rounded up, plus one) and `memory_mb` MiB of address space."""
    cpu = math.ceil(seconds) + 1
    limits = {
        resource.RLIMIT_CPU: (cpu, cpu + 1),
        resource.RLIMIT_AS: (memory_mb << 20,) * 2,
        resource.RLIMIT_FSIZE: (1 << 20,) * 2,
        resource.RLIMIT_NOFILE: (32, 32),
        resource.RLIMIT_CORE: (0, 0),
    }
    for limit, values in limits.items():
        # An existing lower limit remains; macOS cannot limit the address space.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, values)


def landlock_abi(libc: ctypes.CDLL) -> int:
    """Return the version of the kernel's Landlock; below 1 where it is missing or switched off."""
    return int(libc.syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def confine_files(directory: str) -> bool:
    """Limit writes to `directory`, and reads to it and the libraries, with Landlock. Return whether it succeeded.

    From Linux 6.7 on, TCP is blocked as well, and from 6.12 on, signals to other processes.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    abi = landlock_abi(libc)
    if abi < 1 or libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    all_rights = ALL_RIGHTS[min(abi, len(ALL_RIGHTS)) - 1]
    # struct landlock_ruleset_attr, of which older kernels know the first one or two fields. The first 3 is TCP bind and
    # connect; the second is other processes' abstract sockets, and signals to them.
    attributes = struct.pack("QQQ", all_rights, 3, 3)
    size = 8
    if abi >= 4:
        size = 16
    if abi >= 6:
        size = 24
    ruleset = libc.syscall(LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)
    if ruleset < 0:
        return False
    for path, rights in [(directory, WRITE), *((path, READ) for path in _readable())]:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            # A missing or inaccessible path stays unreadable.
            continue
        rule = struct.pack("=Qi", rights & all_rights, descriptor)
        error = libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, rule, 0)
        os.close(descriptor)
        if error:
            return False
    error = libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
    return error == 0


def drop_privileges(files_confined: bool) -> None:
    """Give up all capabilities. Without Landlock, root becomes `nobody`, who gets the working directory."""
    if os.geteuid() == 0 and not files_confined:
        os.chown(".", 65534, 65534)
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.capset(struct.pack("Ii", CAPABILITY_VERSION_3, 0), bytes(24))
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        # This also closes /proc/PID to its siblings.
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def confine_calls(files_confined: bool) -> bool:
    """Allow only `SYSTEM_CALLS` from now on, with seccomp; EPERM for others. Return whether it succeeded.

    They suffice for plain computation: no processes, threads, sockets, signals, namespaces or `io_uring`.
    """
    # For systems without seccomp. This does not limit a root with capabilities.
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    column = {"x86_64": 0, "aarch64": 1}.get(platform.machine())
    if sys.platform != "linux" or column is None:
        return False
    program = _filter(column, files_confined)
    packed = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(packed, len(packed))
    # struct sock_fprog: the number of instructions, and where they are
    description = struct.pack("HP", len(program), ctypes.addressof(buffer))
    return ctypes.CDLL(None, use_errno=True).prctl(PR_SET_SECCOMP, 2, description, 0, 0) == 0


def _filter(column: int, files_confined: bool) -> list[tuple[int, int, int, int]]:
    """Return the instructions of the filter of calls, for the architecture in this `column` of `SYSTEM_CALLS`."""
    # A program in classic BPF, which the kernel runs before each call. An instruction is (operation, jump if true, jump
    # if false, operand), and jumps are counted from the next instruction:
    #
    #     load architecture; if it is ours, skip one;  kill
    #     load number of the call
    #     if it is not 0 (read), skip one;             allow
    #     if it is not 72 (fcntl), skip the block:     load argument 1; if it is 0, allow; if it is 1, allow; …; refuse
    #     …
    #                                                  refuse
    load, equal, set_bits, keep_bits, answer = 0x20, 0x15, 0x45, 0x54, 0x06
    allow = (answer, 0, 0, 0x7FFF0000)
    refuse = (answer, 0, 0, 0x00050000 | errno.EPERM)
    kill = (answer, 0, 0, 0x80000000)
    architecture = (0xC000003E, 0xC00000B7)[column]
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), kill, (load, 0, 0, 0)]
    calls = dict(SYSTEM_CALLS)
    if files_confined:
        calls |= DIRECTORY_CALLS
    for name, numbers in calls.items():
        number = numbers[column]
        if number is None:
            continue
        block = [allow]
        if name in COMMANDS:
            # The low half of argument 1 is at offset 24 of struct seccomp_data.
            block = [(load, 0, 0, 24)]
            for command in COMMANDS[name]:
                block += [(equal, 0, 1, command), allow]
            block.append(refuse)
        elif name == "openat" and not files_confined:
            # Argument 2 is the flags: allow only reading.
            changing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
            block = [(load, 0, 0, 32), (set_bits, 0, 1, changing), refuse, allow]
        elif name == "openat":
            # Landlock before ABI 3 does not cover truncation, and no version covers an open without access mode.
            block = [(load, 0, 0, 32), (keep_bits, 0, 0, os.O_TRUNC | 3)]
            for flags in (os.O_TRUNC, 3, os.O_TRUNC | 3):
                block += [(equal, 0, 1, flags), refuse]
            block.append(allow)
        program += [(equal, 0, len(block), number), *block]
    return [*program, refuse]


def watch(directory: str) -> None:
    """Add an audit hook whose errors say what is refused, where the other layers only give an error number."""
    readable = tuple(os.path.realpath(path) + os.sep for path in [*_readable(), directory])
    writable = os.path.realpath(directory) + os.sep
    changing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    # The code may replace these in their modules.
    realpath, fsdecode, separator = os.path.realpath, os.fsdecode, os.sep

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event.startswith(REFUSED_EVENTS):
            raise PermissionError(errno.EPERM, f"the sandbox refuses {event}")
        if event == "open" and isinstance(arguments[0], str | bytes):
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            path = realpath(fsdecode(arguments[0])) + separator
            if not path.startswith(writable if flags & changing else readable):
                raise PermissionError(errno.EPERM, f"the sandbox refuses to open {path[:-1]}")

    sys.addaudithook(hook)


def _readable() -> list[str]:
    """List the standard library (under `-S`, all that can be imported), shared libraries and time zones."""
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", os.path.join(sys.base_prefix, "lib"), "/usr/share/zoneinfo"]
    return [os.path.dirname(os.__file__), *filter(None, sys.path), *system]
