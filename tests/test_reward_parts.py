"""Exact matches, choices, forms, lengths, and several rewards as one."""

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dppo_jax.prompts.examples import Example
from dppo_jax.rewards import lengths
from dppo_jax.rewards.combined import weighted
from dppo_jax.rewards.matches import exact_match, format_match, multiple_choice
from dppo_jax.rewards.mathematics import math_answer
from dppo_jax.rewards.verdicts import Limits, Verdict, check_examples, grade, in_worker
from dppo_jax.rewards.verifiers import numeric_answer


def example(answer: str) -> Example:
    return Example("q", "", answer, "")


@pytest.mark.parametrize(
    ("answer", "response", "options", "score"),
    [
        ("Paris", " Paris\n", {}, 1),
        ("Paris", "paris", {}, 0),
        ("Paris", "paris", {"ignore_case": True}, 1),
        ("a  b", "a\n b", {}, 1),
        ("a  b", "a b", {"ignore_space": False}, 0),
        ("Paris", "Madrid. So: Rome. So: Paris", {"after": "So:"}, 1),
        ("Paris", "Paris", {"after": "So:"}, 0),
        ("", "", {}, 1),
    ],
)
def test_exact_match(answer, response, options, score):
    assert exact_match(example(answer), response, True, **options).score == score


@pytest.mark.parametrize(
    ("response", "choice"),
    [
        ("C", "C"),
        ("c.", "C"),
        ("(C)", "C"),
        (r"so \boxed{C}", "C"),
        (r"so \boxed{\text{(C)}}", "C"),
        ("The answer is C, not A or B", "C"),
        ("The answer is not A? Answer: B", "B"),
        ("B. because A is wrong", "B"),
        ("I weighed A against D", "D"),
        ("答案：B。不是 A", "B"),
        ("CAB is at the door", None),
        ("the answer is 7", None),
        ("", None),
    ],
)
def test_multiple_choice(response, choice):
    verdict = multiple_choice(example("C"), response, True)
    assert verdict.extracted == choice and verdict.score == float(choice == "C")


def test_multiple_choice_wants_a_letter_to_compare_with():
    assert multiple_choice(example("(D) Alina"), "D", True).score == 1
    with pytest.raises(ValueError, match="example q: answer 'x' holds none of the letters AB"):
        multiple_choice(example("x"), "A", True, letters="AB")
    with pytest.raises(ValueError, match="letters='ab': give capital letters"):
        multiple_choice(example("A"), "A", True, letters="ab")


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("<think>so</think>\n<answer>7</answer>", 1),
        ("<think></think><answer></answer>\n", 1),
        ("<think>a\nb</think> <answer>7</answer> bye", 0),
        ("<answer>7</answer>", 0),
        ("<think>a<think>b</think></think><answer>7</answer>", 0),
        ("<think>a</think><answer>7</answer><answer>8</answer>", 0),
        ("", 0),
    ],
)
def test_format_match(response, score):
    assert format_match(example(""), response, True).score == score
    assert format_match(example(""), response, False).score == 0
    assert format_match(example(""), response, False, require_finished=False).score == score


def test_format_match_with_a_pattern():
    assert format_match(example(""), "abc", True, pattern="a.c").score == 1
    with pytest.raises(ValueError, match="not a regular expression"):
        format_match(example(""), "abc", True, pattern="(")
    hostile = "<think>" * 20_000 + "</think><answer>" * 20_000
    assert format_match(example(""), hostile, True).score == 0


@pytest.mark.parametrize(
    ("tokens", "score"),
    [(0, 0), (80, 0), (81, -0.05), (90, -0.5), (100, -1), (95, -0.75)],
)
def test_overlong_by_hand(tokens, score):
    """max_tokens 100, buffer 20: free up to 80, then -1/20 a token."""
    verdict = lengths.overlong(example(""), "", True, tokens=tokens, max_tokens=100, buffer=20)
    assert verdict.score == pytest.approx(score)
    half = lengths.overlong(
        example(""), "", True, tokens=tokens, max_tokens=100, buffer=20, factor=0.5
    )
    assert half.score == pytest.approx(score / 2)


def test_length_and_uncounted_tokens():
    within = functools.partial(lengths.length, shortest=2, longest=4)
    verdicts = grade(within, [example("")] * 5, [""] * 5, [True] * 5, [1, 2, 4, 5, 0])
    assert [v.score for v in verdicts] == [0, 1, 1, 0, 0]
    (verdict,) = grade(within, [example("")], [""], [True])
    assert verdict.failure == "error" and "were not counted" in verdict.reason
    with pytest.raises(ValueError, match="leave no length between"):
        lengths.length(example(""), "", True, tokens=3, shortest=4, longest=2)
    with pytest.raises(ValueError, match="buffer=200 must be positive and at most max_tokens=100"):
        lengths.overlong(example(""), "", True, tokens=3, max_tokens=100, buffer=200)


def test_weighted_adds_and_keeps_its_parts():
    overlong = functools.partial(lengths.overlong, max_tokens=100, buffer=20)
    reward = weighted(
        {"right": numeric_answer, "form": format_match, "overlong": overlong},
        {"form": 0.5, "overlong": 2.0},
    )
    response = "<think>6*7</think><answer>42</answer>"
    (verdict,) = grade(reward, [example("42")], [response], [True], [90])
    assert verdict.score == pytest.approx(1 + 0.5 - 2 * 0.5)
    assert verdict.parts == {"right": 1.0, "form": 1.0, "overlong": -0.5}
    assert verdict.extracted == "42"
    assert verdict.reason.startswith("correct; form: has the required form; overlong: 10 tokens")
    assert reward.isolate is None
    (verdict,) = grade(reward, [example("no number")], [response], [True], [90])
    assert (verdict.score, verdict.failure) == (0.0, "error")


def test_weighted_runs_where_its_strictest_part_must():
    slow = in_worker(numeric_answer, seconds=2.0, memory_mb=100)
    reward = weighted({"right": math_answer, "also": slow, "form": format_match})
    assert reward.isolate == Limits(2.3, 15.0, 2048)
    verdicts = grade(reward, [example("42")] * 2, ["\\boxed{42}", "41"], [True] * 2)
    assert [dict(v.parts) for v in verdicts] == [
        {"right": 1, "also": 1, "form": 0}, {"right": 0, "also": 0, "form": 0}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("parts", "weights", "message"),
    [
        ({}, {}, "at least one part"),
        ({"a": numeric_answer}, {"b": 1.0}, r"weights for \['b'\], but the parts are \['a'\]"),
        ({"mean": numeric_answer}, {}, "cannot be named 'mean'"),
        ({"verifier_errors": numeric_answer}, {}, "cannot be named"),
    ],
)
def test_weights_that_make_no_sense(parts, weights, message):
    with pytest.raises(ValueError, match=message):
        weighted(parts, weights)


def test_check_examples_allows_a_small_share_and_names_it():
    rows = [example("42")._replace(id=str(n)) for n in range(2000)]
    assert check_examples(numeric_answer, rows, "mine") == []
    for n in (0, 1, 1998):  # of which every other row is looked at
        rows[n] = rows[n]._replace(answer="forty-two")
    (line,) = check_examples(numeric_answer, rows, "mine")
    assert line.startswith("the verifier cannot judge 2 of 1000 examples of mine, such as 0 (")
    assert "; 1998 (answer 'forty-two' is not a number): what is" in line
    with pytest.raises(ValueError, match="cannot judge 2 of 20 examples of mine, .*: choose a ver"):
        check_examples(numeric_answer, rows[100:118] + rows[:2], "mine")


@given(st.text())
def test_no_text_is_an_error(text):
    for verifier in (exact_match, multiple_choice, format_match):
        verdict = verifier(example("C"), text, True)
        assert isinstance(verdict, Verdict) and verdict.score in (0.0, 1.0)
