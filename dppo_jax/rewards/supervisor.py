"""The pool's own process: forks workers, hands out tasks, kills what passes its limits.

`pool.py` starts it as a program of its own, so it shares nothing with the run: no
accelerator, no threads, and forking it is safe and takes milliseconds, verifier loaded. It ends
when the run closes the pipe, however the run ended, and its workers end with it.
"""

import ctypes
import gc
import os
import pickle
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NamedTuple, NoReturn

from dppo_jax.rewards import worker
from dppo_jax.rewards.verdicts import Limits, Verdict, Verifier, declared, failed
from dppo_jax.rewards.worker import Task

_PR_SET_CHILD_SUBREAPER = 36
_BATCH = 16  # tasks sent to a worker at a time
_PATIENCE = 0.1  # seconds after which a task that waits no longer holds one of the pool's places
_CROWD = 8, 64  # workers at most: so many a place, or so many in all if that is more


class Job(NamedTuple):
    """What the run sends."""

    verifier: bytes  # pickled by the run
    tasks: list[Task]
    places: int  # workers that should be busy
    path: list[str]  # the run's sys.path, so that its own modules are found


class Done(NamedTuple):
    """What it gets back."""

    verdicts: list[Verdict]
    killed: int  # workers that had to be killed or died
    refused: str = ""  # why the verifier cannot run here; then nothing was judged


class _Worker:
    """A child process and the tasks it was sent."""

    def __init__(self, verifier: Verifier, limits: Limits, others: Sequence[Connection]):
        self.connection, theirs = Pipe()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for connection in (self.connection, *others):
                    connection.close()  # else the others' pipes would outlive their workers
                worker.run(theirs, verifier, limits, parent)
            finally:
                os._exit(70)
        theirs.close()
        self.batch: deque[Task] = deque()
        self.since = 0.0  # when the first task of the batch was begun
        self._unserved = 0.0  # seconds without a processor until then

    def send(self, batch: Sequence[Task]) -> None:
        self.batch.extend(batch)
        self.begin()
        self.connection.send(list(batch))

    def begin(self) -> None:
        """The first task of the batch begins now."""
        self.since, self._unserved = time.monotonic(), worker.unserved_seconds(self.pid)

    def holds_a_place(self) -> bool:
        """Whether it has just begun, or it or a process that it started computes."""
        return time.monotonic() - self.since < _PATIENCE or worker.computes(self.pid)

    def late(self, seconds: float) -> bool:
        """Whether the first task is not done after so long.

        A wait for a processor does not count, nor one for this process to read the verdict: a
        machine that is busy must not cost a task its score.
        """
        spent = time.monotonic() - self.since
        if spent <= seconds or self.connection.poll():
            return False
        return spent - (worker.unserved_seconds(self.pid) - self._unserved) > seconds

    def dead(self) -> bool:
        """Whether it ended and all it said was read; its children may hold the pipe open."""
        peek = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.pid, peek) is not None and not self.connection.poll()

    def end(self) -> int:
        """Kills the worker and its group; the status it ended with, by itself or now."""
        ended, status = os.waitpid(self.pid, os.WNOHANG)
        try:
            os.killpg(self.pid, signal.SIGKILL)  # its group may live on without it
        except ProcessLookupError:
            pass  # it had no group yet
        if not ended:
            try:
                os.kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            _, status = os.waitpid(self.pid, 0)
        self.connection.close()
        return status


class Supervisor:
    """Holds the workers of the verifier that was asked for last."""

    def __init__(self, run: Connection):
        self.run = run
        self.key = b""
        self.verifier: Any = None
        self.limits = Limits()
        self.workers: list[_Worker] = []

    def serve(self) -> NoReturn:
        """Jobs until the run goes away."""
        while True:
            try:
                job: Job = self.run.recv()
            except (EOFError, OSError):
                self._leave()
            refused = self._load(job)
            done = Done([], 0, refused) if refused else self._grade(job)
            try:
                self.run.send(done)
            except OSError:
                self._leave()

    def _load(self, job: Job) -> str:
        """Makes the job's verifier the current one; why not, where it cannot be."""
        if job.verifier == self.key:
            return ""
        self._end_all()
        self.key = b""
        sys.path[:] = list(dict.fromkeys([*job.path, *sys.path]))
        try:
            self.verifier = pickle.loads(job.verifier)
            warm_up = declared(self.verifier, "warm_up")
            if warm_up is not None:
                warm_up()
        except Exception as error:  # imports of a user's module: anything
            return f"the verifier cannot be loaded in a worker: {type(error).__name__}: {error}"
        if "jax" in sys.modules:
            return "the verifier's module imports jax: put the verifier in a module of its own"
        self.limits = declared(self.verifier, "isolate") or Limits()
        self.key = job.verifier
        # Workers share what is loaded by now. Their collectors must not go through it: a tenth of a
        # second of some task's limit, and a copy of every page.
        gc.collect()
        gc.freeze()
        return ""

    def _grade(self, job: Job) -> Done:
        verdicts: list[Verdict | None] = [None] * len(job.tasks)
        waiting = deque(job.tasks)
        left, killed = len(job.tasks), 0
        while left:
            self._staff(waiting, job.places)
            for ready in wait([self.run, *(w.connection for w in self.workers)], 0.05):
                if ready is self.run:  # nothing is expected: the run has closed it
                    self._leave()
                mine = next((w for w in self.workers if w.connection is ready), None)
                if mine is None:
                    continue
                try:
                    row, verdict = mine.connection.recv()
                except (EOFError, OSError):
                    killed += 1
                    left -= self._bury(mine, verdicts, waiting, None)
                    continue
                assert row == mine.batch.popleft().row
                mine.begin()
                verdicts[row] = verdict
                left -= 1
                if verdict.failure == "crash":  # it says so and leaves; who is next is not to blame
                    killed += 1
                    waiting.extendleft(reversed(mine.batch))
                    mine.batch.clear()
                    self._bury(mine, verdicts, waiting, None)
            for mine in [w for w in self.workers if w.batch]:
                seconds = self.limits.waiting_seconds
                late = mine.late(seconds)
                if late or mine.dead():
                    why = failed("timeout", f"no verdict within {seconds:g} s") if late else None
                    killed += 1
                    left -= self._bury(mine, verdicts, waiting, why)
        for mine in self.workers[job.places :]:
            mine.end()
        del self.workers[job.places :]
        worker.kill_children(spare=[w.pid for w in self.workers])
        return Done([verdict for verdict in verdicts if verdict is not None], killed)

    def _staff(self, waiting: deque[Task], places: int) -> None:
        """Gives tasks to idle workers, and starts workers for places that nobody holds."""
        holding = sum(w.holds_a_place() for w in self.workers if w.batch)
        idle = [w for w in self.workers if not w.batch]
        most = max(places * _CROWD[0], _CROWD[1])
        while waiting and holding < places and (idle or len(self.workers) < most):
            if not idle:
                others = [self.run, *(w.connection for w in self.workers)]
                idle.append(_Worker(self.verifier, self.limits, others))
                self.workers.append(idle[0])
            self._send(idle.pop(), waiting, places)
            holding += 1

    def _send(self, mine: _Worker, waiting: deque[Task], places: int) -> None:
        size = max(1, min(_BATCH, len(waiting) // (2 * places)))
        batch = [waiting.popleft() for _ in range(size)]
        try:
            mine.send(batch)
        except OSError:
            pass  # it has died: its end of the pipe says so at the next wait

    def _bury(
        self,
        mine: _Worker,
        verdicts: list[Verdict | None],
        waiting: deque[Task],
        why: Verdict | None,
    ) -> int:
        """Ends a worker; its task gets a failure, the tasks behind it go back. Tasks decided."""
        self.workers.remove(mine)
        status = mine.end()
        worker.kill_children(spare=[w.pid for w in self.workers])
        if not mine.batch:
            return 0
        task = mine.batch.popleft()
        waiting.extendleft(reversed(mine.batch))
        verdicts[task.row] = why or _post_mortem(status, self.limits)
        return 1

    def _end_all(self) -> None:
        for mine in self.workers:
            mine.end()
        self.workers.clear()
        worker.kill_children()

    def _leave(self) -> NoReturn:
        self._end_all()
        os._exit(0)


def _post_mortem(status: int, limits: Limits) -> Verdict:
    """The verdict on the task at which a worker died by itself."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGPROF:
            return failed("timeout", f"more than {limits.seconds:g} s of processor time")
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        return failed("crash", f"its process died of {name}")
    return failed("crash", f"its process ended with status {os.WEXITSTATUS(status)}")


def main() -> NoReturn:
    """Serves the run at the other end of the pipe whose number is the first argument."""
    # Orphans of killed workers become this process's children, so that none escapes.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Supervisor(Connection(int(sys.argv[1]))).serve()
