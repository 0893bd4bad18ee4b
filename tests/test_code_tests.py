"""Programs under test: what passes, and what a program cannot do."""

import errno
import functools
import json
import os
import socket
import threading
import time

import pytest

from dppo_jax.prompts.examples import Example
from dppo_jax.rewards.code import code_tests
from dppo_jax.rewards.pool import Pool

DOUBLE = {"inputs": ["2\n", "21\n"], "outputs": ["4\n", "42"]}
ASSERTS = {"asserts": ["assert double(2) == 4", "assert double(-1) == -2"]}


def judged(program: str, tests: dict | str = DOUBLE, **options):
    answer = tests if isinstance(tests, str) else json.dumps(tests)
    return code_tests(
        Example("q", "", answer, ""), f"Here:\n```python\n{program}\n```\nDone.", True, **options
    )


@pytest.fixture(scope="module", autouse=True)
def isolation():
    """Namespaces are the system's to give; where it gives none, the verifier says so."""
    try:
        judged("pass")
    except PermissionError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("program", "tests", "score", "reason"),
    [
        ("print(int(input()) * 2)", DOUBLE, 1, "passed 2 of 2"),
        ("print(int(input()) + 2)", DOUBLE, 0, "test 2 of 2: wrote '23"),
        ("print(4)\nprint()", {"inputs": [""], "outputs": ["4"]}, 1, "passed"),
        ("raise SystemExit(3)", DOUBLE, 0, "test 1 of 2: ended with status 3"),
        ("not python", DOUBLE, 0, "ended with status 1"),
        ("def double(x): return 2 * x", ASSERTS, 1, "passed 2 of 2"),
        ("def double(x): return x * x", ASSERTS, 0, "test 2 of 2: ended with status 1"),
        ("def double(x): return 2 * x", "assert double(3) == 6", 1, "passed 1 of 1"),
        ("raise SystemExit(0)", ASSERTS, 0, "test 1 of 2: wrote ''"),
    ],
)
def test_programs(program, tests, score, reason):
    verdict = judged(program, tests)
    assert verdict.score == score and reason in verdict.reason


def test_partial_credit_and_answers_without_code():
    assert judged("print(int(input()) + 2)", partial=True).score == 0.5
    none = code_tests(Example("q", "", json.dumps(DOUBLE), ""), "print(4)", True)
    assert none.score == 0 and "no fenced block" in none.reason
    with pytest.raises(ValueError, match="example q: the answer must be JSON with inputs"):
        judged("pass", "")
    with pytest.raises(ValueError, match="of one length"):
        judged("pass", {"inputs": ["1"], "outputs": []})


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("while True: pass", "ran for more than 1 s"),
        ("x = [0] * 10**9", "ended with status 1"),
        ("print('x' * 10**7)", "e"),
        ("import os\nwhile True: os.fork()", "e"),
        ("import os, time\nif os.fork():\n  time.sleep(1000)\ntime.sleep(1000)", "ran for more"),
    ],
)
def test_what_a_program_may_not_use(program, reason):
    test = {"inputs": [""], "outputs": ["fine"]}
    verdict = judged(program, test, seconds=1.0, total_seconds=1.0, memory_mb=128, output_kb=64)
    assert verdict.score == 0 and reason in verdict.reason


def test_no_network_and_a_clean_environment(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        called = threading.Event()

        def answer() -> None:
            server.accept()[0].close()
            called.set()

        threading.Thread(target=answer, daemon=True).start()
        port = server.getsockname()[1]
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\nprint('in')"
        verdict = judged(connect, {"inputs": [""], "outputs": ["in"]})
        assert verdict.score == 0 and "ended with status 1" in verdict.reason
        assert not called.is_set()
        with socket.create_connection(("127.0.0.1", port), 1):  # it was there to be reached
            assert called.wait(5)
    environment = "import os\nprint(sorted(set(os.environ) - {'LC_CTYPE'}))"
    expected = {"inputs": [""], "outputs": [str(["HOME", "LANG", "PATH"])]}
    assert judged(environment, expected).score == 1


WRITER = """
import os
done = []
for change in (lambda: open({path!r}, "w"), lambda: os.unlink({path!r}), lambda: open("own", "w")):
    try:
        change()
    except OSError as error:
        done.append(error.errno)
print(done)
"""


def test_files_are_written_in_its_own_folder_alone(tmp_path):
    if tuple(int(part) for part in os.uname().release.split(".")[:2]) < (5, 12):
        pytest.skip("the kernel cannot make mounts read-only recursively")
    file = tmp_path / "kept"
    file.write_text("as it was")
    expected = {"inputs": [""], "outputs": [str([errno.EROFS] * 2)]}
    assert judged(WRITER.format(path=str(file)), expected).reason == "passed 1 of 1 tests"
    assert file.read_text() == "as it was"


LINKER = """
import os
answer = int(input()) * 2
for name in os.listdir("."):
    os.unlink(name)
    {instead}
print(answer)
"""


@pytest.mark.parametrize("instead", ["os.symlink({path!r}, name)", "os.mkfifo(name)", "pass"])
def test_what_a_program_leaves_in_the_place_of_its_files_is_not_opened(instead, tmp_path):
    file = tmp_path / "kept"
    file.write_text("as it was")
    verdict = judged(LINKER.format(instead=instead.format(path=str(file))))
    assert verdict.reason == "passed 2 of 2 tests"
    assert file.read_text() == "as it was"


def test_there_are_not_more_processes_than_the_limit_even_for_root():
    start = "import os, time\nfor _ in range(200):\n  if not os.fork(): time.sleep(1000)"
    test = {"inputs": [""], "outputs": [""]}
    began = time.monotonic()
    verdict = judged(start + "\nprint('all')\ntime.sleep(1000)", test, seconds=10.0)
    assert verdict.score == 0 and time.monotonic() - began < 30
    assert "ended with status 1" in verdict.reason or "out of memory" in verdict.reason


def test_in_the_pool():
    examples = [Example("q", "", json.dumps(DOUBLE), "")] * 3
    blocks = ["print(int(input()) * 2)", "import time; time.sleep(1000)", "print(4)"]
    with Pool(2) as pool:
        quick = functools.partial(code_tests, seconds=0.2)
        verdicts = pool.grade(quick, examples, [f"```\n{b}\n```" for b in blocks], [True] * 3)
    assert [v.score for v in verdicts] == [1, 0, 0] and not any(v.failure for v in verdicts)
