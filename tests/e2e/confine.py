"""What a process is denied by the system it runs on: descriptors, memory, threads, system calls.

Each function confines the process that calls it, for good; given to `subprocess` as `preexec_fn` that is the child. Nothing of
the machine is changed, so tests may run side by side.
"""

import ctypes
import errno
import os
import platform
import resource
import struct

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO = 0x7FFF0000, 0x00050000
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
# Offsets into struct seccomp_data: the number of the call, the low word of its first argument.
NUMBER, FIRST_ARGUMENT = 0, 16

CALLS = {
    "x86_64": {"socket": 41, "clone": 56, "io_uring_setup": 425, "io_uring_enter": 426, "clone3": 435},
    "aarch64": {"socket": 198, "clone": 220, "io_uring_setup": 425, "io_uring_enter": 426, "clone3": 435},
}[platform.machine()]

libc = ctypes.CDLL(None, use_errno=True)


class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("program", ctypes.c_void_p)]


def _install(program):
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    memory = ctypes.create_string_buffer(code, len(code))
    filter = Filter(len(program), ctypes.cast(memory, ctypes.c_void_p))
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(filter)):
        raise OSError(ctypes.get_errno(), "seccomp")


def refuse(number, *calls, first_argument=None):
    """System calls fail with this errno, as under a container's seccomp profile; with an argument, only those calls."""

    def confine():
        program = []
        for call in calls:
            program.append((LOAD_WORD, 0, 0, NUMBER))
            if first_argument is None:
                program.append((JUMP_IF_EQUAL, 0, 1, CALLS[call]))
            else:
                program.append((JUMP_IF_EQUAL, 0, 3, CALLS[call]))
                program.append((LOAD_WORD, 0, 0, FIRST_ARGUMENT))
                program.append((JUMP_IF_EQUAL, 0, 1, first_argument))
            program.append((RETURN, 0, 0, SECCOMP_RET_ERRNO | number))
        program.append((RETURN, 0, 0, SECCOMP_RET_ALLOW))
        _install(program)

    return confine


def limit(which, amount):
    """A resource limit, soft and hard."""
    return lambda: resource.setrlimit(which, (amount, amount))


def only_cpu(cpu):
    return lambda: os.sched_setaffinity(0, {cpu})


def unprivileged():
    """Root is exempt from some limits; nobody is not."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def all_of(*confinements):
    def confine():
        for one in confinements:
            one()

    return confine


__all__ = ["all_of", "errno", "limit", "only_cpu", "refuse", "unprivileged"]
