"""Verifiers that do what the response tells them to: the worst that a user's code could."""

import ctypes
import gc
import os
import signal
import subprocess
import sys
import time

from dppo_jax.prompts.examples import Example
from dppo_jax.rewards.verdicts import Limits, Verdict, isolated


@isolated(Limits(seconds=0.3, waiting_seconds=1.5, memory_mb=200))
def obedient(example: Example, response: str, finished: bool) -> Verdict:
    """1 if the response is the answer; anything that the response names, it does first."""
    match response:
        case "spin":
            while True:
                pass
        case "spin in C":
            return Verdict(float(9**9**9 > 0), None, "never")
        case "sleep":
            time.sleep(1000)
        case "ignore signals":
            for number in (signal.SIGTERM, signal.SIGPROF, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            time.sleep(1000)
        case "segmentation fault":
            ctypes.string_at(0)
        case "exit":
            os._exit(3)
        case "sys.exit":
            sys.exit(3)
        case "memory":
            held = []
            while True:
                held.append(bytes(2**26))  # untouched: a busy kernel takes seconds for pages
        case "fork":
            os.fork()
        case "subprocess":
            subprocess.run(["sleep", "1000"])
        case "daemon":  # below Python, out of the group, then dead: the child is an orphan
            if ctypes.CDLL(None).fork() == 0:
                os.setsid()
                time.sleep(1000)
            os._exit(5)
        case "recursion":
            return obedient(example, response, finished)
        case "close pipes":
            os.closerange(3, 1000)
            time.sleep(1000)
        case "print":
            print("noise on standard output", flush=True)
    return Verdict(float(response == example.answer), str(os.getpid()), "compared")


@isolated(Limits(seconds=2.0, processes=True))
def starts_processes(example: Example, response: str, finished: bool) -> Verdict:
    """Leaves a process behind, as it may."""
    process = subprocess.Popen(["sleep", "1000"])
    return Verdict(1.0, str(process.pid), "started one")


@isolated(Limits(seconds=5.0, waiting_seconds=0.6))
def works_a_little(example: Example, response: str, finished: bool) -> Verdict:
    """Computes for 0.2 s of its own processor time, which is well within both limits."""
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    return Verdict(1.0, None, "done")


@isolated(Limits())
def counts_frozen(example: Example, response: str, finished: bool) -> Verdict:
    """How many objects the collector of its process leaves alone."""
    return Verdict(float(gc.get_freeze_count()), None, "counted")
