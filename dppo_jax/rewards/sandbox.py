"""Runs one untrusted Python program: `python -I -S sandbox.py LIMITS PROGRAM`, nothing of ours.

What holds on Linux where user namespaces are allowed: no network (an empty network namespace), no
process left behind (a process namespace, whose first process takes the others with it), no more
than the given memory, processor time and file size a process, a clean environment, nothing on
standard error. What does not: the program reads any file that its user may read and writes where
its user may write; memory is limited for each of at most 64 processes, not for their sum; the
kernel is shared. For hostile code run the whole training in a container or a virtual machine.
"""

import ctypes
import json
import os
import resource
import signal
import sys

NO_NAMESPACE = 97  # exit status: nothing was run
_NEW_IPC, _NEW_USER, _NEW_PID, _NEW_NET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Exits with the program's status, or 128 and its signal's number."""
    limits, program = json.loads(sys.argv[1]), sys.argv[2]
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if library.unshare(_NEW_USER | _NEW_NET | _NEW_PID | _NEW_IPC) and limits["isolated"]:
        os._exit(NO_NAMESPACE)
    child = os.fork()  # only a child is in the new process namespace: its first process
    if child == 0:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _limit(limits)
        os.chdir(os.path.dirname(program))
        environment = {"PATH": "/usr/bin:/bin", "HOME": os.getcwd(), "LANG": "C.UTF-8"}
        os.execve(sys.executable, [sys.executable, "-I", "-S", "-B", program], environment)
    _, status = os.waitpid(child, 0)
    os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


def _limit(limits: dict) -> None:
    memory, output = limits["memory_mb"] * 2**20, limits["output_kb"] * 2**10
    for what, most in (
        (resource.RLIMIT_CPU, limits["seconds"]),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, output),
        (resource.RLIMIT_NPROC, 64),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


if __name__ == "__main__":
    main()
