"""`dppo grade`: anyone's answers, a verdict a row, and bad input in one line."""

import gzip
import json

import pytest

from dppo_jax.rewards.grading import VERIFIERS, verifier_named

ROWS = [
    {"gold": "1/2", "pred": "so \\boxed{0.5}", "equal": True},
    {"gold": "7", "pred": "it is 8", "equal": True},
    {"gold": 42, "pred": "Answer: 42", "equal": False},
    {"gold": "3", "pred": "", "equal": False},
    {"gold": "1/3", "pred": "\\boxed{0.33}", "equal": True, "digits": 2},
]
FIELDS = ("--gold-field", "gold", "--pred-field", "pred")


@pytest.fixture
def answers(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_a_line_for_each_row_and_the_totals(dppo, answers):
    done = dppo("grade", answers, *FIELDS, "--expect-field", "equal")
    assert done.status == 0
    lines = [line.split() for line in done.out.splitlines()]
    assert [line[:3] for line in lines[:5]] == [
        ["1", "1", "0.5"], ["2", "0", "8"], ["3", "1", "42"], ["4", "0", "-"], ["5", "0", "0.33"],
    ]  # fmt: skip
    assert lines[1][3:] == ["expected", "7"]
    assert done.out.splitlines()[5:] == [
        "2 of 5 correct, mean score 0.4000",
        "no answer found in 1: line 4",
        "agreement 0.4000; false positives [3], false negatives [2, 5]",
    ]


def test_an_answer_cannot_steer_the_terminal(dppo, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"gold": "7", "pred": "\\boxed{\x1b[31m\u202e\ud800 7\n8}"}) + "\n")
    done = dppo("grade", path, *FIELDS)
    assert done.status == 0 and done.out.splitlines()[0].split()[2:5] == ["?[31m??", "7", "8"]


def test_json_is_one_object_and_settings_come_from_flags_and_rows(dppo, answers, tmp_path):
    packed = tmp_path / "answers.jsonl.gz"
    packed.write_bytes(gzip.compress(answers.read_bytes()))
    done = dppo(
        "grade", packed, *FIELDS, "--json", "--setting-field", "precision=digits",
        "--gin.math_answer.symbolic=True",
    )  # fmt: skip
    result = json.loads(done.out)
    assert result["verifier"] == "math_answer" and result["settings"] == {"symbolic": True}
    assert [row["score"] for row in result["rows"]] == [1, 0, 1, 0, 1]
    assert result["rows"][3] == {
        "line": 4, "score": 0.0, "extracted": None,
        "reason": "no answer found (final, boxed, hashes, answer, anywhere)",
    }  # fmt: skip
    assert result["totals"] == {
        "rows": 5, "correct": 3, "mean_score": 0.6, "unparsed": 1, "unparsed_lines": [4],
        "failed": 0, "failed_lines": [], "timeouts": 0, "crashes": 0,
    }  # fmt: skip


def test_other_verifiers_by_name_by_module_and_by_recipe(dppo, answers):
    def scores(*arguments):
        return [r["score"] for r in json.loads(dppo("grade", answers, *FIELDS, "--json",
                                                    *arguments).out)["rows"]]  # fmt: skip

    assert scores("--verifier", "exact_match") == [0, 0, 0, 0, 0]
    after = ("--verifier", "exact_match", "--gin.exact_match.after=Answer: ")
    assert scores(*after) == [0, 0, 1, 0, 0]
    lenient = scores("--verifier", "toy_rewards.even_digits")
    assert lenient[1] == pytest.approx(1 / 7)
    recipe = ("--recipe", "configs/recipes/gsm8k_cpu.gin", "--max-failed", "1")
    assert scores(*recipe) == [0, 0, 1, 0, 0]
    assert all(callable(verifier_named(name)) for name in VERIFIERS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gold-field", "answer", "--pred-field", "pred"),
         "line 1: field 'answer' is missing (the row has 'gold', 'pred', 'equal')"),
        ((*FIELDS, "--verifier", "math_anser"), "no verifier 'math_anser'; did you mean math_answ"),
        ((*FIELDS, "--verifier", "nowhere.f"), "no verifier 'nowhere.f': No module named"),
        ((*FIELDS, "--gin.math_answer.precison=2"), "no parameter 'precison'; did you mean precis"),
        ((*FIELDS, "--gin.precision"), "--gin.precision: write --gin.math_answer.PARAMETER=VALUE"),
        ((*FIELDS, "--setting-field", "precision"), "write PARAMETER=FIELD"),
        ((*FIELDS, "--setting-field", "precison=p"), "no parameter 'precison'; did you mean prec"),
        ((*FIELDS, "--max-failed", "-1"), "--max-failed -1: a share of rows, from 0 to 1"),
        ((*FIELDS, "--max-failed", "nan"), "--max-failed nan: a share of rows, from 0 to 1"),
        ((*FIELDS, "--expect-field", "pred"), "neither true, false nor a score"),
        ((*FIELDS, "--verifier", "numeric_answer"),
         "2 of 5 rows cannot be judged, more than --max-failed 0.1: lines 1, 5; the first: veri"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(dppo, answers, arguments, message):
    done = dppo("grade", answers, *arguments)
    assert done.status == 2 and done.out == ""
    assert message in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"gold": "1", "pred": "1"}\n{"gold": \n', "line 2: not JSON"),
        ("", "the file holds no rows"),
        ("[1]\n", "line 1: a JSON list, not an object"),
        ('{"gold": ["1"], "pred": "1"}\n', "line 1: field 'gold' is a list, not text or a number"),
    ],
)
def test_broken_files_are_one_line(dppo, tmp_path, content, message):
    path = tmp_path / "broken.jsonl"
    path.write_text(content)
    done = dppo("grade", path, *FIELDS)
    assert done.status == 2 and done.out == "" and message in done.err
    assert "no such file" in dppo("grade", tmp_path / "absent.jsonl", *FIELDS).err
