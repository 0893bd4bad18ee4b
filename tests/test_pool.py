"""The worker pool: whatever a verifier does costs its own task, and nothing outlives the run."""

import functools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import hostile_verifiers
import pytest

from dppo_jax.prompts.examples import Example
from dppo_jax.rewards.code import code_tests
from dppo_jax.rewards.pool import Pool
from dppo_jax.rewards.verdicts import Limits, Verdict, declared, grade, in_worker, isolated
from dppo_jax.rewards.verifiers import numeric_answer

EXAMPLE = Example("q", "How many?", "42", "")

# What a response makes the verifier do, and what is said of it. Which of its two limits a busy loop
# meets first depends on how busy the machine is.
HARM = {
    "spin": ("timeout", " s"),
    "spin in C": ("timeout", " s"),
    "sleep": ("timeout", "no verdict within 1.5 s"),
    "ignore signals": ("timeout", "no verdict within 1.5 s"),
    "segmentation fault": ("crash", "SIGSEGV"),
    "exit": ("crash", "ended with status 3"),
    "sys.exit": ("error", "SystemExit: 3"),
    "memory": ("crash", "ran out of memory"),
    "fork": ("error", "os.fork in a verifier"),
    "subprocess": ("error", "subprocess.Popen in a verifier"),
    "daemon": ("crash", "ended with status 5"),
    "recursion": ("error", "RecursionError"),
    "close pipes": ("crash", "died of SIGKILL"),
}
# Two of these end no process: the exception is the verdict.
KILLS = len(HARM) - 4


WORK = "import time\nwhile time.process_time() < 0.2: pass\nprint('done')"


def judged(pool: Pool, responses: list[str], verifier=hostile_verifiers.obedient) -> list[Verdict]:
    count = len(responses)
    return pool.grade(verifier, [EXAMPLE] * count, responses, [True] * count)


def descendants(pid: int) -> set[int]:
    found = {pid}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(") ")[2].split()[:2]
        except OSError:
            continue
        if int(parent) in found and int(path.parent.name) != pid:
            found |= {int(path.parent.name)}
    return found - {pid}


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids: set[int]) -> set[int]:
    for _ in range(600):
        if not (left := {pid for pid in pids if running(pid)}):
            break
        time.sleep(0.05)
    return left


def test_harm_costs_its_own_task_and_the_pool_heals():
    with Pool(2) as pool:
        responses = [text for harm in HARM for text in ("42", harm, "41")]
        for _ in range(2):
            before = pool.killed
            verdicts = judged(pool, responses)
            for response, verdict in zip(responses, verdicts, strict=True):
                if response in HARM:
                    failure, reason = HARM[response]
                    assert (verdict.score, verdict.failure) == (0.0, failure), response
                    assert verdict.reason.startswith("verifier failed") and reason in verdict.reason
                else:
                    assert verdict[0::2] == (float(response == "42"), "compared", {})[0:2] + ({},)
            assert pool.killed - before == KILLS
        assert pool._process is not None
        supervisor = pool._process.pid
        assert len(descendants(supervisor)) <= 2  # nothing hangs about but idle workers
        alive = {supervisor} | descendants(supervisor)
    assert not wait_until_gone(alive)


def test_results_are_those_without_a_pool_and_in_order():
    numbers = [str(n) for n in range(300)]
    examples = [Example(n, "", str(int(n) // 2 * 2), "") for n in numbers]
    with Pool(3) as pool:
        verdicts = pool.grade(in_worker(numeric_answer), examples, numbers, [True] * 300)
    assert verdicts == grade(numeric_answer, examples, numbers, [True] * 300)
    assert sum(verdict.score for verdict in verdicts) == 150


def test_one_percent_of_hangs_costs_one_percent_of_the_answers():
    """The share of kills, not seconds: machines differ. 400 answers, 4 of which hang."""
    responses = ["42" if n % 2 else "41" for n in range(400)]
    for n in range(50, 400, 100):
        responses[n] = "sleep" if n % 200 == 50 else "spin"
    with Pool(2) as pool:
        verdicts = judged(pool, responses)
        assert pool.killed == 4
    assert sum(v.failure == "timeout" for v in verdicts) == 4
    assert sum(v.score for v in verdicts) == 200
    # A verifier that sleeps gives up its place: others went on meanwhile, in more than two workers.
    assert len({v.extracted for v in verdicts if not v.failure}) >= 3


def test_workers_do_not_collect_what_they_share():
    """A collection of all that the algebra loads would take a third of a task's limit."""
    with Pool(1) as pool:
        (verdict,) = judged(pool, [""], hostile_verifiers.counts_frozen)
    assert verdict.score > 1000


def test_the_shared_pool_is_chosen_by_declaration(caplog):
    assert declared(hostile_verifiers.obedient, "isolate") == Limits(0.3, 1.5, 200)
    assert declared(numeric_answer, "isolate") is None
    verdicts = grade(hostile_verifiers.obedient, [EXAMPLE] * 3, ["42", "print", "exit"], [True] * 3)
    assert [v.score for v in verdicts] == [1, 0, 0]
    assert verdicts[0].extracted != str(os.getpid())
    assert [r.getMessage() for r in caplog.records] == [
        "verifier failed on example q: verifier failed: its process ended with status 3"
    ]


def test_a_wait_for_a_processor_is_not_the_verifiers():
    """Six others want the only processor: 0.2 s of work take over a second, the limit is 0.6 s."""
    mine = os.sched_getaffinity(0)
    busy = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    others: list[subprocess.Popen] = []
    try:
        os.sched_setaffinity(0, {min(mine)})  # what is started from here on inherits it
        with Pool(1) as pool:
            judged(pool, [""], hostile_verifiers.works_a_little)
            # Sessions of their own: the kernel shares a processor out among sessions.
            others = [
                subprocess.Popen(busy, stdout=subprocess.PIPE, start_new_session=True)
                for _ in range(6)
            ]
            for other in others:
                assert other.stdout is not None and other.stdout.readline()
            start = time.monotonic()
            (verdict,) = judged(pool, [""], hostile_verifiers.works_a_little)
            assert time.monotonic() - start > 0.6, "nothing was waited for"
            assert (verdict.score, verdict.failure) == (1.0, ""), verdict.reason
            (verdict,) = pool.grade(
                functools.partial(code_tests, seconds=0.2, require_isolation=False),
                [Example("q", "", '{"inputs": [""], "outputs": ["done"]}', "")],
                [f"```python\n{WORK}\n```"], [True],
            )  # fmt: skip
            assert verdict.score == 1, verdict.reason
    finally:
        os.sched_setaffinity(0, mine)
        for other in others:
            other.kill()
            other.communicate()


def test_processes_that_a_verifier_may_start_do_not_outlive_it():
    with Pool(1) as pool:
        verdicts = judged(pool, ["", ""], hostile_verifiers.starts_processes)
        assert not wait_until_gone({int(v.extracted) for v in verdicts if v.extracted})
        assert [v.score for v in verdicts] == [1, 1]


def test_a_lost_supervisor_is_replaced():
    with Pool(1) as pool:
        judged(pool, ["42"])
        assert pool._process is not None
        workers = descendants(pool._process.pid)
        os.kill(pool._process.pid, signal.SIGKILL)
        assert judged(pool, ["42"])[0].score == 1
        assert workers and not wait_until_gone(workers)


def test_verifiers_that_cannot_be_sent_are_refused(tmp_path, monkeypatch):
    (tmp_path / "mixes_in_jax.py").write_text(
        "import jax\nfrom dppo_jax.rewards.verdicts import *\n"
        "@isolated(Limits())\ndef verifier(example, response, finished): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import mixes_in_jax

    with Pool(1) as pool:
        with pytest.raises(ValueError, match="must be a function at the top of a module"):
            judged(pool, ["42"], isolated(Limits())(lambda e, r, f: Verdict(1.0, None, "")))
        with pytest.raises(ValueError, match="imports jax: put the verifier in a module of its"):
            judged(pool, ["42"], mixes_in_jax.verifier)
        assert judged(pool, ["42"])[0].score == 1
    with pytest.raises(ValueError, match="workers=0 must be at least 1"):
        Pool(0)
    with pytest.raises(ValueError, match="Limits.seconds=0.0 must be positive"):
        in_worker(numeric_answer, seconds=0.0)


@pytest.mark.parametrize("end", ["return", "SIGKILL"])
def test_nothing_outlives_the_run(end):
    """A run that ends in the middle of a job, by itself or killed, leaves no process."""
    code = """
        import sys, threading, time, subprocess
        sys.path.insert(0, "tests")
        import hostile_verifiers
        from dppo_jax.rewards.pool import Pool
        from dppo_jax.prompts.examples import Example
        from dppo_jax.rewards.verdicts import in_worker
        from test_pool import descendants
        example, slow = Example("q", "", "42", ""), in_worker(hostile_verifiers.obedient,
            waiting_seconds=1000.0)
        pool = Pool(2)
        pool.grade(slow, [example], ["42"], [True])
        job = (slow, [example] * 4, ["sleep", "daemon", "sleep", "sleep"], [True] * 4)
        threading.Thread(target=pool.grade, args=job, daemon=True).start()
        for _ in range(300):
            time.sleep(0.1)
            if len(descendants(pool._process.pid)) >= 3:  # two that sleep, and the daemon's child
                break
        print(pool._process.pid, flush=True)
        if sys.argv[1] == "SIGKILL":
            time.sleep(1000)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), end], stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parent.parent, stderr=subprocess.DEVNULL,
    ) as run:  # fmt: skip
        assert run.stdout is not None
        supervisor = int(run.stdout.readline())
        alive = {supervisor} | descendants(supervisor)
        if end == "SIGKILL":
            assert len(alive) >= 3
            run.kill()
    assert not wait_until_gone(alive)
