"""Published data sets and anyone's own files: how rows become examples, and what is refused."""

import functools
import gzip
import http.server
import json
import re
import threading
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from dppo_jax.prompts import store
from dppo_jax.prompts.examples import Example, PromptFileError
from dppo_jax.prompts.fields import Fields
from dppo_jax.prompts.overlap import find_overlap
from dppo_jax.prompts.rows import Row
from dppo_jax.prompts.sets import PUBLIC, read_own, read_public


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PROBLEM = {"problem": "What is 1+1?", "answer": "2"}
DAPO = {"prompt": [{"role": "user", "content": "Find x."}], "reward_model": {"ground_truth": "34"}}
WRAPPED = (
    "Solve the following math problem step by step. The last line of your response should be of"
    " the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    'Find x.\n\nRemember to put your answer on its own line after "Answer:".'
)


@pytest.mark.parametrize(
    ("name", "file", "row", "expected"),
    [
        ("gsm8k", "train.jsonl", {"question": "Q", "answer": "1+1\n#### 1,002"},
         Example("train-1", "Q", "1002", "1+1\n#### 1,002")),
        ("math", "train.jsonl", {"problem": "Q", "solution": r"so $\boxed{\frac{1}{2}}$.",
                                 "level": "Level 3", "type": "Algebra"},
         Example("train-1", "Q", r"\frac{1}{2}", r"so $\boxed{\frac{1}{2}}$.", "Algebra", "3")),
        ("math", "math_train_answers.jsonl", {"problem": "Q", "answer": "7", "difficulty": 2.0,
                                              "type": "Geometry"},
         Example("train-1", "Q", "7", "", "Geometry", "2")),
        ("math500", "test.jsonl", {"problem": "Q", "answer": "x", "solution": r"\boxed{y}",
                                   "level": 5, "subject": "Algebra"},
         Example("test-1", "Q", "x", r"\boxed{y}", "Algebra", "5")),
        ("dapo_math_17k", "dapo-math-17k.jsonl", DAPO, Example("train-1", "Find x.", "34", "")),
        ("dapo_math_17k", "train.jsonl",
         DAPO | {"prompt": [{"content": WRAPPED}]}, Example("train-1", "Find x.", "34", "")),
        ("aime24", "aime24.jsonl", PROBLEM, Example("test-1", "What is 1+1?", "2", "")),
        ("aime25", "aime25.jsonl", PROBLEM, Example("test-1", "What is 1+1?", "2", "")),
        ("amc", "amc.jsonl", PROBLEM | {"answer": 142.0}, Example("test-1", "What is 1+1?", "142",
                                                                  "")),
        ("sanity_math_1k5", "train.jsonl", PROBLEM, Example("train-1", "What is 1+1?", "2", "")),
    ],
)  # fmt: skip
def test_rows_of_every_set(tmp_path, name, file, row, expected):
    jsonl(tmp_path / file, row)
    splits, dropped, _ = read_public(name, tmp_path)
    assert splits == {expected.id.split("-")[0]: [expected]} and not dropped
    assert read_public(name, tmp_path / file)[0] == splits  # the file alone


def test_a_file_of_another_set_is_refused(tmp_path):
    file = jsonl(tmp_path / "aime25.jsonl", PROBLEM)
    with pytest.raises(PromptFileError, match=r"aime25.jsonl: by its name this is aime25, not amc"):
        read_public("amc", file)
    for name in ("mine.jsonl", "test.jsonl"):
        assert read_public("amc", jsonl(tmp_path / name, PROBLEM))[0].keys() == {"test"}


def test_every_public_set_has_a_home_for_each_split():
    for name, known in PUBLIC.items():
        assert known.homes.keys() == known.stems.keys(), name


real = functools.cache(read_public)


@pytest.mark.parametrize(
    ("name", "folder", "sizes", "dropped"),
    [
        ("math", "math", {"train": 7469, "test": 5000},
         {"train": {"no answer": 4, "also in test": 1}}),
        ("math500", "math", {"test": 500}, {}),
        ("dapo_math_17k", "rl_prompts", {"train": 17243},
         {"train": {"duplicate": 650, "contradicting answers": 24}}),
        ("sanity_math_1k5", "rl_prompts", {"train": 1460}, {}),
        ("aime24", "eval", {"test": 30}, {}),
        ("aime25", "eval", {"test": 30}, {}),
        ("amc", "eval", {"test": 83}, {}),
    ],
)  # fmt: skip
def test_the_real_files(shared_data, name, folder, sizes, dropped):
    splits, left_out, unfit = real(name, shared_data / folder)
    assert len(unfit) == left_out.get("train", {}).get("no answer", 0)
    assert {split: len(rows) for split, rows in splits.items()} == sizes and left_out == dropped
    for rows in splits.values():
        assert len({row.prompt for row in rows}) == len({row.id for row in rows}) == len(rows)
        assert all(row.answer for row in rows)


def test_the_training_set_of_the_papers_holds_problems_of_amc_but_none_of_aime(shared_data):
    train = real("dapo_math_17k", shared_data / "rl_prompts")[0]["train"]
    found = {}
    for name in ("aime24", "aime25", "amc"):
        overlap = find_overlap(train, real(name, shared_data / "eval")[0]["test"])
        found[name] = (len(overlap.exact), len(overlap.normalised))
    assert found == {"aime24": (0, 0), "aime25": (0, 0), "amc": (8, 6)}


def test_what_is_prepared_is_found_again(tmp_path):
    jsonl(tmp_path / "aime24.jsonl", PROBLEM, PROBLEM)
    prepared = store.prepare("aime24", tmp_path / "data", tmp_path)
    assert prepared.dropped == {"test": {"duplicate": 1}}
    # Without a source, what is there is taken and nothing is downloaded.
    assert store.prepare("aime24", tmp_path / "data") == prepared._replace(reused=True, dropped={})
    assert store.splits_of("aime24", tmp_path / "data") == ["test"]


def test_the_last_box_of_a_solution_is_the_answer_of_math500(shared_data):
    with gzip.open(shared_data / "math/math500.jsonl.gz") as file:
        for line in file:
            fields = json.loads(line)
            answer = fields.pop("answer")
            row = Row(Path(), "", 1, fields)
            assert (
                Fields(("problem",), ("answer",), "solution").example("test", row).answer == answer
            )


def test_a_solution_without_a_box_has_no_answer():
    row = Row(Path(), "", 1, {"problem": "Q", "solution": "so it is 5"})
    assert Fields(("problem",), ("answer",), "solution").example("test", row).answer == ""


def test_what_is_left_out_is_counted(tmp_path):
    def row(problem, answer):
        return {"problem": problem, "answer": answer, "difficulty": 1.0}

    rows = [row(f"p{n}", "1") for n in range(200)]
    rows += [row("p0 ", "1"), row("p1", "2"), row("p2", None), row("p3", " ")]
    jsonl(tmp_path / "train.jsonl", *rows)
    jsonl(tmp_path / "test.jsonl", row("p5", "1"))
    splits, dropped, unfit = read_public("math", tmp_path)
    assert unfit == {"train-203": "no answer", "train-204": "no answer"}
    assert dropped == {
        "train": {"no answer": 2, "contradicting answers": 2, "also in test": 1, "duplicate": 1}
    }
    assert [row.prompt for row in splits["train"]] == [
        f"p{n}" for n in range(200) if n not in (1, 5)
    ]


FIELDS = Fields(("q",), ("meta.gold",), level=("meta.level",))
OWN = {"q": "Q", "meta": {"gold": 4, "level": "hard"}}


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "json.gz", "parquet"])
def test_your_own_file_in_every_format(tmp_path, ending):
    rows = [OWN, OWN | {"q": "Ü?"}]
    path = tmp_path / f"mine.{ending}"
    if ending == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        lines = "\n".join(map(json.dumps, rows)) if "jsonl" in ending else json.dumps(rows)
        path.write_bytes(gzip.compress(lines.encode()) if "gz" in ending else lines.encode())
    prepared = store.prepare_own("mine", tmp_path / "data", path, FIELDS)
    assert prepared.splits == {"train": 2}
    assert list(store.load("mine", tmp_path / "data", "train")) == [
        Example("train-1", "Q", "4", "", "", "hard"),
        Example("train-2", "Ü?", "4", "", "", "hard"),
    ]
    assert list(read_own("mine", path, FIELDS, "dev")[0]) == ["dev"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("m.jsonl", b'{"q": "Q"}', "line 1: field 'meta.gold' is missing .the row has 'q'"),
        ("m.jsonl", b'{"q": ["Q"], "meta": {"gold": 1}}', "line 1: field 'q' is \\['Q'\\]"),
        ("m.jsonl", b'{"q": "Q", "meta": {"gold": [1]}}', "'meta.gold' is a list"),
        ("m.jsonl", b'\n{"q": ', "line 2: not JSON"),
        (
            "m.jsonl",
            b'{"q": "Q", "meta": {"gold": null}}',
            "1 of 1 problems have no answer.*train-1",
        ),
        (
            "m.jsonl",
            b'{"q": "Q", "meta": {"gold": NaN}}',
            "1 of 1 problems have no answer.*train-1",
        ),
        ("m.jsonl", b'{"q": "\\ud800", "meta": {"gold": 1}}', "line 1: field 'q' is no Unicode"),
        ("m.jsonl", b'{"q": "Q", "meta": {"gold": "\\ud800"}}', "line 1: .*gold' is no Unicode"),
        ("m.json", b'{"q": 1}', "a JSON dict, not a list"),
        ("m.json", b"[1]", "row 1: a JSON int"),
        ("m.json", b"[]", "holds no rows"),
        ("m.jsonl.gz", b"not gzip", "damaged or cut off"),
        ("m.json.gz", b"not gzip", "damaged or cut off"),
        ("m.parquet", b"not parquet", "damaged or cut off"),
        ("m.txt", b"", "give a file that ends in"),
    ],
)
def test_bad_files_are_refused_and_leave_nothing(dppo, tmp_path, file, content, message):
    (tmp_path / file).write_bytes(content)
    done = dppo("data", "prepare", "mine", "--jsonl", tmp_path / file, "--prompt-field", "q",
                "--answer-field", "meta.gold", "--data-dir", tmp_path / "data")  # fmt: skip
    assert done.status == 2 and len(done.err.splitlines()) == 1
    assert re.search(message, done.err) and file in done.err
    assert not (tmp_path / "data").exists()


def test_a_folder_that_cannot_be_written_is_told(dppo, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("a file")
    result = dppo("data", "prepare", "arithmetic", "--data-dir", taken)
    assert result.status == 2 and result.err.count("\n") == 1
    assert f"cannot be written to {taken} (" in result.err and "another data folder" in result.err
    assert taken.read_text() == "a file"


def test_the_command_prepares_your_own_rows(dppo, tmp_path):
    jsonl(tmp_path / "q.jsonl", OWN, OWN)
    flags = ("--jsonl", tmp_path / "q.jsonl", "--prompt-field", "q", "--data-dir", tmp_path)
    done = dppo("data", "prepare", "mine", *flags, "--answer-field", "meta.gold", "--json")
    assert json.loads(done.out)["dropped"] == {"train": {"duplicate": 1}}
    assert json.loads(done.out)["unfit"] == {}
    done = dppo("data", "prepare", "mine", *flags, "--answer-field", "meta.gold")
    assert done.out.splitlines()[0].endswith("train 1 (already there)")
    assert done.out.splitlines()[1] == "left out of train: 1 duplicate"
    for arguments, message in [
        (("mine", *flags), "needs --prompt-field and --answer-field"),
        (("amc", *flags, "--answer-field", "meta.gold"), "'amc' is a set of the project"),
        (("My-Set", *flags, "--answer-field", "meta.gold"), "'My-Set' is no name"),
        (("amc", "--answer-field", "a"), "give --jsonl FILE"),
        (("mine",), "no data set is called 'mine'"),
        (("new", *flags, "--answer-field", "meta.gold", "--split", "a/b"), "--split 'a/b': a name"),
    ]:
        done = dppo("data", "prepare", *arguments)
        assert done.status == 2 and message in done.err


def test_a_row_is_read_once():
    class Records(list):
        def __getitem__(self, row):
            asked.append(row)
            return super().__getitem__(row)

    asked: list[int] = []
    fields = dict.fromkeys(Example._fields, b"")
    source = store.PromptSource(Records([fields | {"id": b"0"}, fields | {"id": b"1"}]))
    asked.clear()  # the check of argument types looks into sequences
    assert [source[n].id for n in (1, 0, -1, -2)] == ["1", "0", "1", "0"] and asked == [1, 0]


def test_answers_that_a_verifier_cannot_judge_are_counted_and_listed(dppo, tmp_path):
    rows = [{"q": f"q{n}", "a": n} for n in range(1200)]
    for n in range(11):
        rows[n]["a"] = "seven"
    rows.append({"q": "last", "a": " "})
    flags = ("--jsonl", jsonl(tmp_path / "q.jsonl", *rows), "--prompt-field", "q", "--answer-field",
             "a", "--data-dir", tmp_path)  # fmt: skip
    done = dppo("data", "prepare", "mine", *flags, "--verifier", "numeric_answer")
    assert done.out.splitlines()[0].endswith("train 1189")
    assert done.out.splitlines()[1:] == [
        "left out of train: 1 no answer, 11 unfit answer",
        "  train-1201: no answer",
        *(f"  train-{n}: answer 'seven' is not a number" for n in range(1, 10)),
        "  and 2 more; --json lists all",
    ]
    jsonl(tmp_path / "q.jsonl", *rows[:500])
    done = dppo("data", "prepare", "mine", *flags, "--verifier", "numeric_answer")
    assert done.status == 2 and re.search(
        r"q.jsonl: 11 of 500 problems have no answer that can be used: train-1 \(answer 'seven' is"
        r" not a number\); .*; remove them, or name the field and verifier that fit$", done.err
    )  # fmt: skip
    assert dppo("data", "prepare", "mine", *flags, "--verifier", "numeric").status == 2


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of our own on this machine that serves `tmp_path / "hub"`."""
    root = tmp_path / "hub"

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(root))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield root
        server.shutdown()
        thread.join()


def test_without_files_a_set_comes_from_its_home(hub, tmp_path):
    home = hub / PUBLIC["aime24"].homes["test"]
    home.parent.mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist([PROBLEM]), home)
    assert store.prepare("aime24", tmp_path / "data").splits == {"test": 1}
    with pytest.raises(PromptFileError, match=r"cannot download .*aime25.*404.*--from FILE_OR_DIR"):
        store.prepare("aime25", tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["aime24"]


def test_offline_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PromptFileError, match="refused.*get its files and give them: --from"):
        store.prepare("gsm8k", tmp_path)
    assert not list(tmp_path.iterdir())
