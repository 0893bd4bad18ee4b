"""Runs one untrusted Python program: `python -I -S sandbox.py LIMITS PROGRAM`, nothing of ours.

What holds on Linux where user namespaces are allowed: no network (an empty network namespace), no
process left behind (a process namespace, whose first process takes the others with it), nothing
written but in the program's own folder (from kernel 5.12 on), no more than the given memory,
processor time and file size a process, a clean environment, nothing on standard error. What does
not: the program reads any file that its user may read; memory is limited for each of at most 64
processes, not for their sum, and files one by one; the kernel is shared. For hostile code run the
whole training in a container or a virtual machine.
"""

import ctypes
import json
import os
import resource
import signal
import sys

NO_NAMESPACE = 97  # exit status: nothing was run
_NEW_IPC, _NEW_USER, _NEW_PID, _NEW_NET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
_NEW_NS = 0x00020000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000  # the call's number everywhere
_PR_SET_PDEATHSIG = 1
_PROCESSES = 64


def main() -> None:
    """Exits with the program's status, or 128 and its signal's number."""
    limits, program = json.loads(sys.argv[1]), sys.argv[2]
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if library.unshare(_NEW_USER | _NEW_NET | _NEW_PID | _NEW_IPC) and limits["isolated"]:
        os._exit(NO_NAMESPACE)
    if not library.unshare(_NEW_NS):
        _write_only_in(os.path.dirname(program), library)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # `_watched` waits for it
    child = os.fork()  # only a child is in the new process namespace: its first process
    if child == 0:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        _limit(limits)
        os.chdir(os.path.dirname(program))
        environment = {"PATH": "/usr/bin:/bin", "HOME": os.getcwd(), "LANG": "C.UTF-8"}
        os.execve(sys.executable, [sys.executable, "-I", "-S", "-B", program], environment)
    status = _watched(child)
    os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


def _watched(child: int) -> int:
    """The child's exit status; killed, with all that it started, where those are too many.

    The kernel's own limit on processes does not hold for root.
    """
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if _family(child) > _PROCESSES:
            os.kill(child, signal.SIGKILL)
        signal.sigtimedwait([signal.SIGCHLD], 0.05)


def _family(pid: int) -> int:
    """A process and those below it; 1 where the kernel does not list them."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return 1 + sum(_family(int(child)) for child in file.read().split())
    except OSError:
        return 1


def _write_only_in(folder: str, library: ctypes.CDLL) -> None:
    """Makes every mount read-only but the folder's; nothing where the kernel does not do it."""
    here, path = _AT_FDCWD, folder.encode()
    read_only, writable = (ctypes.c_uint64 * 4)(1), (ctypes.c_uint64 * 4)(0, 1)  # to set, to clear
    library.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    library.mount(path, path, None, _MS_BIND, None)
    library.syscall(_MOUNT_SETATTR, here, b"/", _AT_RECURSIVE, ctypes.byref(read_only), 32)
    library.syscall(_MOUNT_SETATTR, here, path, 0, ctypes.byref(writable), 32)


def _limit(limits: dict) -> None:
    memory, output = limits["memory_mb"] * 2**20, limits["output_kb"] * 2**10
    for what, most in (
        (resource.RLIMIT_CPU, limits["seconds"]),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, output),
        (resource.RLIMIT_NPROC, _PROCESSES),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


if __name__ == "__main__":
    main()
