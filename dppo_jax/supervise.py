"""The parent of a process that is one of several: a lost host becomes one line and a status.

When another process dies, JAX's client aborts this one from a thread of its own, with a stack
trace; no handler in the process can put that into words, so its parent does. It imports no jax.
"""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO

SUPERVISED = "DPPO_SUPERVISED"  # set for the child
_PR_SET_PDEATHSIG = 1
# Of JAX's coordination service and of gloo: what warnings and a stack trace of theirs look like.
_NOISE = re.compile(
    r"[EFW]\d{4} [\d:.]+ +\d+ (client\.h|coordination_\w+\.cc|preemption_\w+\.cc)"
    r"|(INTERNAL|:UNKNOWN|Barrier result|RPC|Additional GRPC error[^:]*):"
    r"|This suggests that|\*\*\* Check failure|    @ +0x|=== Source Location|external/xla"
    r"|\[Gloo\] Rank|The tasks have crashed|\d*\s*$"
)
_GLOO = re.compile(r".*(\[Gloo\] Rank|peer ranks)")  # on standard output; of threads, in pieces
_LOST = re.compile(r"Task (\d+) heartbeat timeout|stopped sending heartbeats\):\n(\d+)\n")


def supervise(arguments: Sequence[str], *, debug: bool = False) -> int:
    """Runs `dppo ARGUMENTS` as a child and returns the exit status; signals are passed on.

    A child that JAX aborted, or that a signal ended, is told in one line: status 1. With `debug`
    everything that it writes is shown.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "dppo_jax", *arguments],
        env=os.environ | {SUPERVISED: "1"},
        stdout=None if sys.stdout.isatty() else subprocess.PIPE,  # a terminal's lines are redrawn
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        process_group=0,  # a terminal's interrupt comes here alone, and is passed on once
        preexec_fn=_die_with_parent,
    )
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: child.send_signal(number))
    assert child.stderr is not None
    out = threading.Thread(target=_copy, args=(child.stdout, sys.stdout, _GLOO, debug), daemon=True)
    if child.stdout is not None:
        out.start()
    hidden = _copy(child.stderr, sys.stderr, _NOISE, debug)
    status = child.wait()
    if child.stdout is not None:
        out.join()
    if status >= 0:
        return status
    print(f"dppo: {_explained(-status, hidden)}", file=sys.stderr)
    return 1


def _copy(stream: IO[str], out: IO[str], noise: re.Pattern[str], debug: bool) -> str:
    """Passes the child's lines on as they come, without JAX's own; returns JAX's own.

    Where nobody reads any more the child's next line fails, as it would without a parent.
    """
    hidden = []
    with stream, contextlib.suppress(BrokenPipeError):
        for line in stream:
            if noise.match(line):
                hidden.append(line)
                if not debug:
                    continue
            out.write(line)
            out.flush()
    return "".join(hidden)


def _explained(number: int, said: str) -> str:
    rest = "the same command with the same --workdir goes on from the newest checkpoint, if any"
    if number != signal.SIGABRT or "JAX distributed service" not in said:
        name = signal.Signals(number).name
        return f"this process was ended by {name}; {rest} (--debug shows all it said)"
    lost = sorted({int(task or other) for task, other in _LOST.findall(said)})
    who = f"process {', '.join(map(str, lost))}" if lost else "another process"
    if not lost and "Failed to send RPC to coordination service" in said:
        who = "process 0, the coordinator,"
    return f"{who} died or lost its network, so that this one ends too; {rest}"


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
