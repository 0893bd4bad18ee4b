"""Worker processes for verifiers that may hang, crash, or eat memory.

The run talks to one supervisor process, which forks the workers and replaces those that die. A
verifier that passes its limits costs its own task and nothing else: score 0, a reason, and a
`failure` that is counted. Workers never see the run's memory, and end when the run ends, even by
SIGKILL. Linux only.
"""

import atexit
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from dppo_jax.prompts.examples import Example
from dppo_jax.rewards.supervisor import Done, Job
from dppo_jax.rewards.verdicts import Verdict, Verifier
from dppo_jax.rewards.worker import Task

# Not `-m`: what it sends must be pickled by the module's name, not as __main__'s.
_SUPERVISOR = "from dppo_jax.rewards import supervisor; supervisor.main()"


class Pool:
    """A pool of verifier processes; started by its first job, safe to share between threads."""

    def __init__(self, workers: int | None = None):
        """`workers` are busy at a time: by default one for each processor of this process."""
        if workers is not None and workers < 1:
            raise ValueError(f"workers={workers} must be at least 1")
        self.workers = workers or len(os.sched_getaffinity(0))
        self.killed = 0  # workers that had to be killed or died, so far
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None

    def grade(
        self,
        verifier: Verifier,
        examples: Sequence[Example],
        responses: Sequence[str],
        finished: Sequence[bool],
        tokens: Sequence[int] | None = None,
    ) -> list[Verdict]:
        """The verifier's verdict on every response, in order; see `verdicts.grade`.

        Raises ValueError where the verifier cannot be sent to another process.
        """
        counts: Sequence[int | None] = tokens if tokens is not None else [None] * len(responses)
        rows = zip(examples, responses, map(bool, finished), counts, strict=True)
        tasks = [Task(number, *row) for number, row in enumerate(rows)]
        try:
            sent = pickle.dumps(verifier)
        except Exception as error:
            raise ValueError(
                f"an isolated verifier must be a function at the top of a module: {error}"
            ) from error
        with self._lock:
            done = self._ask(Job(sent, tasks, self.workers, [*sys.path]))
        if done.refused:
            self.close()  # what it imported stays in that process
            raise ValueError(done.refused)
        self.killed += done.killed
        return done.verdicts

    def close(self) -> None:
        """Ends the supervisor and all workers; a later job starts them again."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            # Also wakes a thread that waits for an answer, which closing alone would not.
            with socket.socket(fileno=os.dup(connection.fileno())) as pipe:
                pipe.shutdown(socket.SHUT_RDWR)
            connection.close()
        if process is not None:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(self, job: Job) -> Done:
        for last_try in (False, True):
            connection = self._connection or self._start()
            try:
                connection.send(job)
                return connection.recv()
            except (EOFError, OSError) as error:
                if self._connection is not connection:
                    raise RuntimeError("the pool was closed while it graded") from error
                self.close()  # the supervisor is gone: the kernel's doing
                if last_try:
                    raise RuntimeError(
                        "the process that supervises the verifiers died twice on one batch"
                    ) from error
        raise AssertionError("unreachable")

    def _start(self) -> Connection:
        ours, theirs = socket.socketpair()
        package = Path(__file__).parents[2]
        search = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SUPERVISOR, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # the run's output is the run's
                start_new_session=True,  # Ctrl-C is for the run, which then closes the pipe
                env=os.environ | {"PYTHONPATH": os.pathsep.join(search)},
            )
        self._connection = Connection(ours.detach())
        atexit.register(self.close)
        return self._connection


shared = Pool()
"""The pool that `verdicts.grade` uses."""
