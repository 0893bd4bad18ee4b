"""One worker of the pool: takes tasks from its pipe and sends verdicts back until it is killed.

Runs in a process forked from the supervisor, which holds no threads and no accelerator.
"""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple, NoReturn

from dppo_jax.prompts.examples import Example
from dppo_jax.rewards.verdicts import Limits, Verifier, judge

_PR_SET_PDEATHSIG = 1
# What starts another process, by the names of Python's audit events.
_STARTS_PROCESS = ("os.fork", "os.forkpty", "os.posix_spawn", "os.system", "subprocess.Popen")


class Task(NamedTuple):
    """One response to judge."""

    row: int  # in the job
    example: Example
    response: str
    finished: bool
    tokens: int | None


def run(connection: Connection, verifier: Verifier, limits: Limits, parent: int) -> NoReturn:
    """The life of a worker: (row, verdict) for every task of every batch that comes in.

    The process ends itself by SIGPROF when one task has used `limits.seconds` of processor time,
    in Python or below it.
    """
    os.setsid()  # a process group of its own, so that what it starts dies with it
    die_with_parent(parent)
    for signal_number in (signal.SIGPROF, signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, signal.SIG_DFL)
    _silence()
    limit_memory(limits.memory_mb)
    if not limits.processes:
        sys.addaudithook(_forbid_processes)
    while True:
        try:
            batch: Sequence[Task] = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        for task in batch:
            signal.setitimer(signal.ITIMER_PROF, limits.seconds)
            verdict = judge(verifier, task.example, task.response, task.finished, task.tokens)
            signal.setitimer(signal.ITIMER_PROF, 0)
            if limits.processes:
                kill_children()
            connection.send((task.row, verdict))
            if verdict.failure == "crash":  # out of memory, which may stay so: the pool starts anew
                os._exit(0)


def limit_memory(megabytes: int) -> None:
    """Lets the process have that much address space more than it has now."""
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    limit = held + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when the one that made it ends, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def children_of(pid: int) -> set[int]:
    """A process's children, adopted ones too."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return {int(child) for child in file.read().split()}
    except OSError:  # it has gone, or a kernel that does not list them
        return set()


def computes(pid: int) -> bool:
    """Whether a process, or one that it started, is running now or ready to run."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            state = file.read().rpartition(") ")[2][:1]
    except OSError:
        return False
    return state in "RD" or any(computes(child) for child in children_of(pid))


def unserved_seconds(pid: int) -> float:
    """How long a process was ready to run and had no processor, in all its life.

    0 where the kernel does not say: then a wall limit is what it is.
    """
    try:
        with open(f"/proc/{pid}/schedstat") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def kill_children(spare: Sequence[int] = ()) -> None:
    """Kills this process's children, adopted ones too, and takes their exit statuses."""
    for child in children_of(os.getpid()) - set(spare):
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            continue


def _forbid_processes(event: str, arguments: tuple) -> None:
    if event in _STARTS_PROCESS:
        raise PermissionError(
            f"{event} in a verifier: declare it with isolated(Limits(processes=True))"
        )


def _silence() -> None:
    """A verifier's prints would mix with the run's, line by line."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.close(null)
