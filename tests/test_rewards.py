"""Verifiers and grading: what counts, why, and that no text and no verifier can stop a run."""

import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_jax.prompts import gsm8k
from dppo_jax.prompts.examples import Example
from dppo_jax.prompts.rows import read_rows
from dppo_jax.rewards.numbers import first_number, last_number, number_text, parse_number
from dppo_jax.rewards.verdicts import Verdict, grade
from dppo_jax.rewards.verifiers import arithmetic_answer, numeric_answer, story_word

PRODUCT = Example("47*86", "47*86=", "4042", "282+3760=4042")
BALL = Example("Lily-ball-0", "Once upon a time", "ball", "")
GSM8K = Path(__file__).parents[2] / "shared/data/gsm8k"


def question(answer: str) -> Example:
    return Example("q", "How many?", answer, "")


@pytest.mark.parametrize(
    ("response", "finished", "score", "extracted", "reason"),
    [
        ("282+3760=4042", True, 1, "4042", "correct"),
        ("nonsense=4042", True, 1, "4042", "correct"),  # the working is not judged
        ("4042=4042", True, 1, "4042", "correct"),
        ("282+3760=4042", False, 0, "4042", "ran out of tokens"),
        ("282+3760=4043", True, 0, "4043", "expected 4042"),
        ("282+3760=4042=1", True, 0, "1", "expected 4042"),
        ("282+3760=04042", True, 0, "04042", "expected 4042"),
        ("282+3760=4042 ", True, 0, "4042 ", "expected 4042"),
        ("282+3760=", True, 0, "", "expected 4042"),
        ("4042", True, 0, None, "no '='"),
        ("", True, 0, None, "no '='"),
    ],
)
def test_arithmetic_answer(response, finished, score, extracted, reason):
    verdict = arithmetic_answer(PRODUCT, response, finished)
    assert (verdict.score, verdict.extracted, verdict.error) == (score, extracted, False)
    assert reason in verdict.reason


@pytest.mark.parametrize(
    ("response", "finished", "score"),
    [
        ("She threw the ball. The ball came back.", True, 1),
        ("Ball! BALL!", True, 1),
        ("the ball's ball", True, 1),
        ("The ball, the balls, the football.", True, 0),
        ("ball_one ball_two", True, 0),
        ("The ball and the ball", False, 0),
        ("", True, 0),
    ],
)
def test_story_word(response, finished, score):
    assert story_word(BALL, response, finished).score == score


def test_story_word_counts_as_often_as_asked():
    verdict = story_word(BALL, "ball ball", True, min_count=3)
    assert verdict == Verdict(0.0, "2 x ball", "needs 'ball' 3 times")
    assert story_word(question("a.b"), "a.b axb a.b", True).extracted == "2 x a.b"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 18", "18"),
        ("18.", "18"),
        ("it is $1,234.50.", "1234.5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("= -5", "-5"),
        ("= \N{MINUS SIGN}5", "-5"),
        ("10-5", "5"),
        ("(3)-4", "4"),
        ("pages 3 - 4", "4"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("1,2,3", "3"),
        ("12,345,678", "12345678"),
        ("1,23456", "23456"),
        ("\\boxed{18}", "18"),
        ("7 km", "7"),
        ("no digits", None),
        ("\N{ARABIC-INDIC DIGIT FIVE}", None),
        ("- . , $", None),
        ("", None),
    ],
)
def test_last_number(text, number):
    found = last_number(text)
    assert (found is None) if number is None else (found == Decimal(number))


@pytest.mark.parametrize(
    ("answer", "response", "score"),
    [
        ("18", "9 * 2 = $<<9*2=18>>18.\n#### 18", 1),
        ("18", "The answer is 18.0", 1),
        ("1000", "#### 1,000", 1),
        ("1,000", "1000 dollars", 1),
        ("18", "#### 18 or 20", 1),  # the marker asks for what follows it
        ("18", "18 #### none", 0),
        ("18", "18 then 19", 0),
        ("0.1", "0.1000000000000000055511151231257827", 0),  # decimals, not floats
        ("-3", "3", 0),
        ("18", "", 0),
    ],
)
def test_numeric_answer(answer, response, score):
    assert numeric_answer(question(answer), response, True).score == score


def test_numeric_answer_of_an_unfinished_response():
    verdict = numeric_answer(question("18"), "so 18", False)
    assert verdict.score == 0 and "ran out of tokens" in verdict.reason
    assert numeric_answer(question("18"), "so 18", False, require_finished=False).score == 1


def test_a_gold_answer_that_is_no_number_is_an_error_of_the_data():
    with pytest.raises(ValueError, match="example q: answer 'x' is not a number"):
        numeric_answer(question("x"), "18", True)


@settings(deadline=None)
@given(st.text() | st.text("0123456789.,$-+#= ") | st.binary().map(lambda b: b.decode("latin1")))
def test_no_text_raises(text):
    for verifier in (arithmetic_answer, numeric_answer, story_word):
        assert verifier(PRODUCT, text, True).score in (0.0, 1.0)


def test_long_hostile_text_is_read_in_linear_time():
    assert last_number("1,234" + ",234" * 50_000 + "5") is not None
    assert last_number("9" * 200_000) == Decimal("9" * 200_000)
    assert last_number("-$" * 100_000 + "." * 100_000) is None


@settings(deadline=None)
@given(st.decimals(allow_nan=False, allow_infinity=False, places=4), st.booleans(), st.booleans())
def test_a_written_number_is_read_back(number, commas, dollar):
    text = format(number, ",f" if commas else "f")
    if dollar:
        text = text.replace("-", "-$") if text.startswith("-") else "$" + text
    assert last_number(f"1 and so {text}.") == number
    assert first_number(f"so {text} and 1") == number
    assert parse_number(text) == number
    assert parse_number(number_text(number)) == number


def test_number_text_is_the_same_for_equal_numbers():
    assert [number_text(Decimal(t)) for t in ("1000", "18.50", "18.00", "-0.0", "-3", "1E+3")] == [
        "1000", "18.5", "18", "0", "-3", "1000"
    ]  # fmt: skip


def test_grade_judges_in_order_and_survives_every_verifier(caplog):
    def verifier(example, response, finished):
        if response == "raise":
            raise KeyError("gone")
        return {"nan": Verdict(float("nan"), None, ""), "other": 1.0}.get(
            response, Verdict(0.5, response, "fine")
        )

    verdicts = grade(verifier, [BALL] * 5, ["a", "raise", "nan", "other", "b"], [True] * 5)
    assert [verdict.extracted for verdict in verdicts] == ["a", None, None, None, "b"]
    assert [verdict.score for verdict in verdicts] == [0.5, 0, 0, 0, 0.5]
    assert sum(verdict.error for verdict in verdicts) == 3
    assert verdicts[1].reason == "verifier failed: KeyError: 'gone'"
    assert "not a finite number" in verdicts[2].reason
    assert "not a Verdict" in verdicts[3].reason
    assert len(caplog.records) == 1 and "Lily-ball-0" in caplog.text


def test_grade_refuses_sequences_of_different_lengths():
    with pytest.raises(ValueError, match="zip"):
        grade(story_word, [BALL], ["a", "b"], [True])


@pytest.mark.skipif(not GSM8K.is_dir(), reason="shared/data/gsm8k is not beside the repository")
def test_every_gsm8k_gold_answer_is_graded_correct():
    for split, count in (("train", 7473), ("test", 1319)):
        path = GSM8K / f"{split}.jsonl.gz"
        rows = [gsm8k.example(split, row) for row in read_rows(path)]
        assert len(rows) == count
        verdicts = grade(numeric_answer, rows, [row.solution for row in rows], [True] * len(rows))
        wrong = [(r.id, v) for r, v in zip(rows, verdicts, strict=True) if v.score != 1]
        assert not wrong
        without_marker = [f"The answer is ${row.answer}." for row in rows]
        verdicts = grade(numeric_answer, rows, without_marker, [True] * len(rows))
        assert all(verdict.score == 1 for verdict in verdicts)


def test_rewards_never_import_jax():
    code = (
        "import sys, json, dppo_jax.rewards.verdicts, dppo_jax.rewards.verifiers;"
        "print(json.dumps([m for m in ('jax', 'grain', 'tensorflow') if m in sys.modules]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout) == []
