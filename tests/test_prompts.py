"""The data sets, and their way to disk and back."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_jax.prompts import arithmetic, store, stories
from dppo_jax.prompts.examples import Example, PromptFileError
from dppo_jax.prompts.sets import read_public
from dppo_jax.rewards.verifiers import arithmetic_answer

GSM8K = Path(__file__).parents[2] / "shared/data/gsm8k"


def test_arithmetic_solutions():
    assert arithmetic.prompt(47, 86) == "47*86="
    assert arithmetic.solution(47, 86) == "282+3760=4042"
    assert arithmetic.solution(47, 80) == "0+3760=3760"
    assert arithmetic.solution(7, 8) == "56=56"
    assert arithmetic.solution(123, 456) == "738+6150+49200=56088"


def test_arithmetic_holds_out_whole_pairs():
    splits = arithmetic.examples()
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 7588, "test": 512}
    pairs = {
        split: {frozenset(row.id.split("*")) for row in rows} for split, rows in splits.items()
    }
    assert not pairs["train"] & pairs["test"]  # in neither order
    everything = splits["train"] + splits["test"]
    assert {row.id for row in everything} == {
        f"{a}*{b}" for a in range(10, 100) for b in range(10, 100)
    }
    assert all(arithmetic_answer(row, row.solution, True).score == 1 for row in everything)
    assert set("".join(row.prompt + row.solution for row in everything)) == set(arithmetic.ALPHABET)


def test_arithmetic_split_is_the_same_everywhere():
    test = arithmetic.examples()["test"]
    assert [row.id for row in test[:5]] == ["10*31", "10*40", "10*51", "10*67", "10*68"]
    assert arithmetic.examples(seed=1)["test"] != test


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(0, 6), st.data())
def test_arithmetic_of_any_range(smallest, width, data):
    largest = smallest + width
    total = (width + 1) ** 2
    if total < 2:
        return
    held_out = data.draw(st.integers(1, total - 1))
    try:
        splits = arithmetic.examples(smallest, largest, held_out, seed=3)
    except ValueError as error:
        assert "cannot hold out exactly" in str(error)
        return
    assert len(splits["test"]) == held_out and len(splits["train"]) == total - held_out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smallest": 0}, "1 <= smallest"),
        ({"smallest": 12, "largest": 11}, "1 <= smallest"),
        ({"held_out": 8100}, "held_out is 8100"),
        ({"held_out": 0}, "held_out is 0"),
    ],
)
def test_arithmetic_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        arithmetic.examples(**options)


@settings(deadline=None)
@given(st.integers(1, 999), st.integers(1, 999), st.integers(0, 2**32))
def test_a_slip_makes_one_number_wrong_and_the_rest_follow(a, b, seed):
    careless = arithmetic.careless_solution(a, b, np.random.default_rng(seed), 1.0)
    again = arithmetic.careless_solution(a, b, np.random.default_rng(seed), 1.0)
    assert careless == again
    partials, total = careless.split("=")
    numbers = [int(number) for number in partials.split("+")]
    wrong = [n for n, right in zip(numbers, arithmetic.partial_products(a, b), strict=True)
             if n != right]  # fmt: skip
    assert int(total) != a * b
    if wrong:
        assert len(wrong) == 1 and int(total) == sum(numbers)  # the slip propagates
    right = arithmetic.solution(a, b)
    if not wrong:
        assert len(careless) == len(right) and sum(map(str.__ne__, careless, right)) == 1


def test_slips_come_at_their_rate():
    rng = np.random.default_rng(0)
    right = arithmetic.solution(47, 86)
    slips = sum(arithmetic.careless_solution(47, 86, rng, 0.45) != right for _ in range(4000))
    assert abs(slips / 4000 - 0.45) < 0.03  # four standard errors
    assert arithmetic.careless_solution(47, 86, rng, 0.0) == right


def test_stories_mention_their_word_and_hold_out_hero_and_word():
    splits = stories.examples()
    assert len(splits["train"]) > 1000 and len(splits["test"]) >= 256
    heroes = {}
    for split, rows in splits.items():
        heroes[split] = {tuple(row.id.split("-")[:2]) for row in rows}
        for row in rows:
            assert re.search(rf"\b{row.answer}\b", row.prompt)
            assert row.prompt.startswith("Once upon a time, there was a little ")
            assert row.prompt.endswith(".")
    assert not heroes["train"] & heroes["test"]
    ids = [row.id for rows in splits.values() for row in rows]
    prompts = [row.prompt for rows in splits.values() for row in rows]
    assert len(set(ids)) == len(ids) and len(set(prompts)) == len(prompts)
    with pytest.raises(ValueError, match="openings for both splits"):
        stories.examples(held_out=10**6)


def test_prepare_and_load(tmp_path):
    prepared = store.prepare("arithmetic", tmp_path, smallest=2, largest=9, held_out=8)
    assert prepared.splits == {"train": 56, "test": 8} and not prepared.reused
    splits = arithmetic.examples(2, 9, 8)
    for split, rows in splits.items():
        source = store.load("arithmetic", tmp_path, split)
        assert list(source) == rows  # in their order
        assert source[-1] == rows[-1] and source[np.int64(0)] == rows[0]
        with pytest.raises(IndexError):
            source[len(rows)]
    assert [path.name for path in tmp_path.iterdir()] == ["arithmetic"]
    assert [path.name for path in (tmp_path / "arithmetic").iterdir()] == [store.VERSION]


def test_prepare_again_reuses_and_a_change_is_refused(tmp_path, capsys):
    small = {"smallest": 2, "largest": 9, "held_out": 8}
    first = store.prepare("arithmetic", tmp_path, **small)
    before = {path: path.stat().st_mtime_ns for path in first.path.iterdir()}
    again = store.prepare("arithmetic", tmp_path, **small)
    assert again == first._replace(reused=True)
    with pytest.raises(PromptFileError, match="other arithmetic examples.*remove that folder"):
        store.prepare("arithmetic", tmp_path, **small | {"seed": 1})
    assert {path: path.stat().st_mtime_ns for path in first.path.iterdir()} == before
    assert capsys.readouterr().out == ""  # --json prints one object and nothing else


def test_a_race_to_prepare_is_won_by_the_first(tmp_path, monkeypatch):
    small = {"smallest": 2, "largest": 9, "held_out": 8}
    write = store._write

    def beaten(*arguments):
        write(*arguments)
        raise OSError("Directory not empty")

    monkeypatch.setattr(store, "_write", beaten)
    assert store.prepare("arithmetic", tmp_path, **small).splits["test"] == 8


@pytest.mark.parametrize(
    ("name", "source", "options", "message"),
    [
        ("gsm9k", None, {}, r"'gsm9k' \(did you mean gsm8k\?\); there are arithmetic, stories"),
        ("gsm8k", "x.jsonl", {"seed": 1}, "has no options, got seed"),
        ("gsm8k", "x.jsonl", {}, "x.jsonl: no such file or folder"),
        ("stories", "x.jsonl", {}, "takes no --from"),
    ],
)
def test_prepare_refuses(tmp_path, name, source, options, message):
    with pytest.raises(ValueError, match=message):
        store.prepare(name, tmp_path, source and tmp_path / source, **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_tfds_did_not_finish_is_refused(tmp_path):
    (tmp_path / "arithmetic" / store.VERSION).mkdir(parents=True)
    for use in (store.prepare, lambda name, data_dir: store.load(name, data_dir, "train")):
        with pytest.raises(PromptFileError, match="not a whole data set; remove that folder"):
            use("arithmetic", tmp_path)


def test_load_says_what_to_do(tmp_path):
    with pytest.raises(PromptFileError, match=r"dppo data prepare gsm8k \[--from FILE"):
        store.load("gsm8k", tmp_path, "train")
    with pytest.raises(ValueError, match="did you mean gsm8k"):
        store.load("gsm9k", tmp_path, "train")
    store.prepare("arithmetic", tmp_path, smallest=2, largest=9, held_out=8)
    with pytest.raises(PromptFileError, match="no split 'dev'; there is test, train"):
        store.load("arithmetic", tmp_path, "dev")


def row(question="How many?", answer="2+2\n#### 1,004"):
    return json.dumps({"question": question, "answer": answer})


def test_gsm8k_folder_and_file(tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    (files / "train.jsonl").write_text(row() + "\n\n" + row("Où ?") + "\n", encoding="utf-8")
    (files / "test.jsonl.gz").write_bytes(gzip.compress(row("Who?").encode()))
    store.prepare("gsm8k", tmp_path / "data", files)
    train = store.load("gsm8k", tmp_path / "data", "train")
    assert list(train) == [
        Example("train-1", "How many?", "1004", "2+2\n#### 1,004"),
        Example("train-3", "Où ?", "1004", "2+2\n#### 1,004"),
    ]
    assert store.load("gsm8k", tmp_path / "data", "test")[0].id == "test-1"
    assert list(read_public("gsm8k", files / "test.jsonl.gz")[0]) == ["test"]
    assert list(read_public("gsm8k", files / "train.jsonl")[0]) == ["train"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no rows"),
        (b"\n \n", "holds no rows"),
        (row().encode() + b"\n{'question'", "line 2: not JSON"),
        (row().encode() + b"\n\xff\n", "line 2: not JSON"),
        (b"[1]", "line 1: a JSON list"),
        (b"{}", "line 1: field 'answer' is missing.*no fields"),
        (b'{"answer": "#### 1", "q": 1}', "field 'question' is missing.*has 'answer', 'q'"),
        (b'{"answer": 4}', "field 'answer' is 4; it must be a non-empty string"),
        (b'{"answer": "#### 1", "question": " "}', "field 'question' is ' '"),
        (
            row(answer="4").encode(),
            "1 of 1 problems have no answer that can be used: train-1 .no a",
        ),
        (row(answer="#### four").encode(), "1 of 1 problems have no answer"),
    ],
)
def test_malformed_gsm8k_files_leave_nothing_behind(tmp_path, content, message):
    file = tmp_path / "train.jsonl"
    file.write_bytes(content)
    with pytest.raises(PromptFileError, match=message) as caught:
        store.prepare("gsm8k", tmp_path / "data", file)
    assert str(file) in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_damaged_and_doubtful_gsm8k_files(tmp_path):
    whole = gzip.compress("\n".join(row(str(n)) for n in range(999)).encode())
    (tmp_path / "train.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PromptFileError, match="damaged or cut off"):
        read_public("gsm8k", tmp_path)
    (tmp_path / "train.jsonl").write_text(row())
    with pytest.raises(PromptFileError, match="both exist"):
        read_public("gsm8k", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PromptFileError, match="no gsm8k files"):
        read_public("gsm8k", tmp_path / "empty")


@pytest.mark.skipif(not GSM8K.is_dir(), reason="shared/data/gsm8k is not beside the repository")
def test_the_real_gsm8k(tmp_path):
    assert store.prepare("gsm8k", tmp_path, GSM8K).splits == {"train": 7473, "test": 1319}
    source = store.load("gsm8k", tmp_path, "test")
    assert source[0].prompt.startswith("Janet") and source[0].answer == "18"


def test_prepare_and_load_need_no_tensorflow_and_no_network(tmp_path):
    code = f"""
import socket, sys
def refuse(*arguments): raise AssertionError("a connection was tried")
socket.socket.connect = socket.getaddrinfo = refuse
from dppo_jax.prompts import store
store.prepare("arithmetic", {str(tmp_path)!r}, smallest=2, largest=9, held_out=8)
assert store.load("arithmetic", {str(tmp_path)!r}, "test")[0].answer
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
