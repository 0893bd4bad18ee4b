"""Programs that are run against tests, in a process that can do little else; see sandbox.py."""

import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dppo_jax.prompts.examples import Example
from dppo_jax.rewards import sandbox
from dppo_jax.rewards.verdicts import Limits, Verdict, isolated
from dppo_jax.rewards.worker import children_of, unserved_seconds

_BLOCK = re.compile(r"```(?:python|py|Python)?[ \t]*\n(.*?)```", re.DOTALL)
_SHOWN = 200
_MOST_UNSERVED = 7  # times the wall time that is added to it on a busy machine


class _Run(NamedTuple):
    status: int
    output: str
    late: bool


@isolated(Limits(seconds=30.0, waiting_seconds=180.0, processes=True))
def code_tests(
    example: Example,
    response: str,
    finished: bool,
    *,
    seconds: float = 2.0,
    total_seconds: float = 60.0,
    memory_mb: int = 512,
    output_kb: int = 1024,
    partial: bool = False,
    require_isolation: bool = True,
) -> Verdict:
    """1 if the response's program passes every test, else 0; the share that passes with `partial`.

    The program is the last fenced block of the response. The example's answer is JSON: either
    {"inputs": [text, ...], "outputs": [text, ...]}, where the program reads standard input and its
    output is compared but for space at the ends of lines; or {"asserts": [statement, ...]}, which
    run after it. Text that is no JSON object is one such statement list. Each test may use
    `seconds` of processor time (whole seconds, rounded up) and five times that of wall time, in
    which a wait for a processor does not count.

    Network, memory, processes and files are as `sandbox.py` says. Where the system allows no
    namespaces nothing is run and the verifier fails, unless `require_isolation=False`. A program
    under `asserts` shares its process with them, so one that is written to cheat can: use inputs
    and outputs where that matters. Raises ValueError for an answer that holds no tests.
    """
    tests = _tests(example)
    blocks = _BLOCK.findall(response)
    if not blocks:
        return Verdict(0.0, None, "no fenced block of code in the response")
    program = blocks[-1]
    limits = {
        "seconds": math.ceil(seconds),
        "memory_mb": memory_mb,
        "output_kb": output_kb,
        "isolated": require_isolation,
    }
    passed, why = 0, ""
    end = time.monotonic() + total_seconds
    for number, (given, expected, statements) in enumerate(tests, start=1):
        wall = min(5 * seconds, end - time.monotonic())
        nonce = secrets.token_hex(8)
        ending = "".join(f"\n{s}" for s in statements) + (
            f"\nprint({nonce!r}, flush=True)\n" if statements else "\n"
        )
        run = _run(program + ending, given, limits, wall)
        fine = _passes(run, nonce if statements else None, expected)
        passed += fine
        if not fine:
            why = why or f"test {number} of {len(tests)}: {_why(run, seconds, expected)}"
            if not partial or time.monotonic() >= end:
                break
    score = passed / len(tests) if partial else float(passed == len(tests))
    return Verdict(score, _short(program), why or f"passed {passed} of {len(tests)} tests")


def _tests(example: Example) -> list[tuple[str, str, Sequence[str]]]:
    """(standard input, expected output, statements) of each test."""
    try:
        answer = json.loads(example.answer)
    except ValueError:
        answer = {"asserts": [example.answer]} if example.answer.strip() else {}
    if isinstance(answer, dict) and (asserts := answer.get("asserts")):
        statements = asserts if isinstance(asserts, list) else [asserts]
        return [("", "", [str(statement)]) for statement in statements]
    inputs, outputs = (answer.get(k, []) if isinstance(answer, dict) else []
                       for k in ("inputs", "outputs"))  # fmt: skip
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(
            f"example {example.id}: the answer must be JSON with inputs and outputs of one length, "
            "or asserts"
        )
    return [(str(given), str(wanted), ()) for given, wanted in zip(inputs, outputs, strict=True)]


def _run(source: str, given: str, limits: dict, wall: float) -> _Run:
    """Runs a program in a folder of its own, made anew: what it leaves there is never opened.

    A program may put a link to any file, or a pipe, in the place of each file that it finds. So
    its input and output have no names.
    """
    if wall <= 0:
        return _Run(1, "", True)
    with (
        tempfile.TemporaryDirectory(prefix="code-tests-") as folder,
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as out,
    ):
        program = Path(folder, "program.py")
        program.write_text(source, encoding="utf-8", errors="replace")
        stdin.write(given.encode("utf-8", "replace"))
        stdin.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", sandbox.__file__, json.dumps(limits), str(program)],
            stdin=stdin,
            stdout=out,  # a file: its size is limited, a pipe would have to be emptied
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={},
        )
        try:
            late = not _ends(process, wall)
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        if process.returncode == sandbox.NO_NAMESPACE:
            raise PermissionError(
                "this system allows no network namespace, so nothing was run: "
                "code_tests.require_isolation=False runs without"
            )
        out.seek(0)
        text = out.read(limits["output_kb"] * 1024 + 1).decode("utf-8", "replace")
    return _Run(process.returncode, text, late)


def _ends(process: subprocess.Popen, wall: float) -> bool:
    """Whether it ends within so many seconds; that its program waits for a processor costs none.

    Up to a limit: a program can keep itself from the processor by forking.
    """
    start, unserved = time.monotonic(), 0.0
    while (left := wall + min(unserved, _MOST_UNSERVED * wall) - (time.monotonic() - start)) > 0:
        try:
            process.wait(left)
            return True
        except subprocess.TimeoutExpired:
            waits = [unserved_seconds(child) for child in children_of(process.pid)]
            unserved = unserved_seconds(process.pid) + max(waits, default=0.0)
    return False


def _passes(run: _Run, nonce: str | None, expected: str) -> bool:
    if run.late or run.status != 0:
        return False
    if nonce is not None:
        return run.output.rstrip().endswith(nonce)
    return _lines(run.output) == _lines(expected)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _why(run: _Run, seconds: float, expected: str) -> str:
    if run.late or run.status == 128 + signal.SIGXCPU or run.status == 128 + signal.SIGKILL:
        return f"ran for more than {seconds:g} s or out of memory"
    if run.status == 128 + signal.SIGXFSZ:
        return "wrote too much"
    if run.status:
        return f"ended with status {run.status}"
    return f"wrote {_short(run.output)!r}" + (
        f", expected {_short(expected)!r}" if expected else ""
    )


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
