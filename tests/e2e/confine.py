"""What a process is denied by the system it runs on: descriptors, memory, threads, system calls.

Each function confines the process that calls it, for good; given to `subprocess` as `preexec_fn` that is the child. Nothing of
the machine is changed, so tests may run side by side.
"""

import ctypes
import errno
import fcntl
import os
import platform
import resource
import select
import socket
import struct
import threading

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, SECCOMP_RET_USER_NOTIF = 0x7FFF0000, 0x00050000, 0x7FC00000
SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER = 1, 8
# What is told of a call: its id, the thread, the call with its arguments. What is answered: the id, a value, an errno, flags.
TOLD, ANSWER, GO_ON = struct.Struct("QIIiIQ6Q"), struct.Struct("QqiI"), 1
# Among the arguments of a call that was told of: the flags of io_uring_enter. A shard's own ring gives it more than others do.
ENTER_FLAGS, ENTER_EXT_ARG = 9, 8
SECCOMP_IOCTL_NOTIF_RECV = 0xC0002100 | TOLD.size << 16
SECCOMP_IOCTL_NOTIF_SEND = 0xC0002101 | ANSWER.size << 16
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
# Offsets into struct seccomp_data: the number of the call, the low word of its first argument.
NUMBER, FIRST_ARGUMENT = 0, 16

CALLS = {
    "x86_64": {"seccomp": 317, "socket": 41, "clone": 56, "io_uring_setup": 425, "io_uring_enter": 426, "clone3": 435},
    "aarch64": {"seccomp": 277, "socket": 198, "clone": 220, "io_uring_setup": 425, "io_uring_enter": 426, "clone3": 435},
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


class Supervised:
    """A process that asks here before each of these system calls, so that they can be refused while it runs, and no more."""

    def __init__(self, *calls):
        self.calls, self.number, self.refused = calls, 0, 0
        self.awaited = 0
        self.ours, self.theirs = socket.socketpair()

    def confine(self):
        program = [(LOAD_WORD, 0, 0, NUMBER)]
        for call in self.calls:
            program += [(JUMP_IF_EQUAL, 0, 1, CALLS[call]), (RETURN, 0, 0, SECCOMP_RET_USER_NOTIF)]
        program.append((RETURN, 0, 0, SECCOMP_RET_ALLOW))
        code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
        memory = ctypes.create_string_buffer(code, len(code))
        filter = Filter(len(program), ctypes.cast(memory, ctypes.c_void_p))
        if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "no_new_privs")
        listener = libc.syscall(
            CALLS["seccomp"], SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, ctypes.byref(filter)
        )
        if listener < 0:
            raise OSError(ctypes.get_errno(), "seccomp")
        socket.send_fds(self.theirs, [b"-"], [listener])
        os.close(listener)

    def __enter__(self):
        threading.Thread(target=self._answer, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.number = 0
        self.theirs.close()

    def refuse(self, number):
        """From now on they fail with this errno; 0: they do not."""
        self.number, self.awaited = number, 0

    def refuse_from_a_turn_on(self, number):
        """They fail with this errno from the next call on by which a shard enters its own ring, and not glommio one of its."""
        self.awaited = number

    def _answer(self):
        _, [listener], _, _ = socket.recv_fds(self.ours, 1, 1)
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        while True:
            # The process has ended when nobody is left under its filter.
            if any(events & select.POLLHUP for _, events in poll.poll()):
                os.close(listener)
                return
            told = bytearray(TOLD.size)
            try:
                fcntl.ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, told)
                call = TOLD.unpack(told)[0]
                if self.awaited and TOLD.unpack(told)[ENTER_FLAGS] & ENTER_EXT_ARG:
                    self.refuse(self.awaited)
                self.refused += self.number != 0
                answer = (call, 0, -self.number, 0) if self.number else (call, 0, 0, GO_ON)
                fcntl.ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, ANSWER.pack(*answer))
            except FileNotFoundError:
                # Its thread was killed, or a signal came.
                pass


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


__all__ = ["Supervised", "all_of", "errno", "limit", "only_cpu", "refuse", "unprivileged"]
