"""avg@k, pass@k and maj@k against hand-computed tables, and evaluation as a user runs it."""

import itertools
import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dppo_jax.answers import Answered, evaluation_of, read_answers, regrade, write_answers
from dppo_jax.evaluation_scores import bootstrap_interval, majority_score, pass_at_k
from dppo_jax.prompts.examples import Example
from dppo_jax.rewards.verdicts import Verdict
from dppo_jax.rewards.verifiers import numeric_answer
from dppo_jax.verbs.evaluation import table_of


@pytest.mark.parametrize(
    ("right", "n", "k", "expected"),
    [
        (0, 4, 1, 0.0), (1, 4, 1, 1 / 4), (2, 4, 1, 1 / 2), (4, 4, 1, 1.0),
        (0, 4, 2, 0.0), (1, 4, 2, 1 / 2), (2, 4, 2, 5 / 6), (3, 4, 2, 1.0),
        (1, 4, 3, 3 / 4), (2, 4, 3, 1.0), (1, 4, 4, 1.0), (0, 4, 4, 0.0),
        (3, 10, 5, 11 / 12),  # 1 - C(7,5) / C(10,5) = 1 - 21/252
        (1, 32, 8, 1 / 4),
    ],
)  # fmt: skip
def test_pass_at_k_by_hand(right, n, k, expected):
    assert pass_at_k(np.array([right]), n, k) == pytest.approx([expected], abs=1e-15)


@given(st.integers(1, 7), st.data())
def test_pass_at_k_is_the_mean_over_all_subsets(n, data):
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    answers = [True] * right + [False] * (n - right)
    subsets = list(itertools.combinations(answers, k))
    expected = sum(map(any, subsets)) / len(subsets)
    assert math.isclose(pass_at_k(np.array([right]), n, k)[0], expected, abs_tol=1e-12)


def test_pass_at_more_than_there_are():
    with pytest.raises(ValueError, match="pass@5 needs at least 5 answers a problem; there are 4"):
        pass_at_k(np.array([1]), 4, 5)


@pytest.mark.parametrize(
    ("extracted", "scores", "finished", "expected"),
    [
        (["7", "7", "3"], [1, 1, 0], [1, 1, 1], 1.0),
        (["7", "3", "3"], [1, 0, 0], [1, 1, 1], 0.0),
        (["7", "3"], [1, 0], [1, 1], 0.5),  # a tie shares
        (["7", "3", "4"], [1, 0, 0], [1, 1, 1], 1 / 3),
        ([" 1 / 2", "1/2", "3"], [1, 1, 0], [1, 1, 1], 1.0),  # blanks do not part
        (["1/2", "0.5", "3", "3"], [1, 1, 0, 0], [1, 1, 1, 1], 0.0),  # forms do
        ([None, None, "7"], [0, 0, 1], [1, 1, 1], 1.0),  # no answer, no vote
        (["3", "3", "7"], [0, 0, 1], [0, 0, 1], 1.0),  # nor one cut off
        (["7", "7", "3"], [1, 1, 0], [0, 0, 1], 1.0),  # unless it was judged right
        ([None], [0], [1], 0.0),
    ],
)
def test_majority_by_hand(extracted, scores, finished, expected):
    scores, finished = list(map(float, scores)), list(map(bool, finished))
    assert majority_score(extracted, scores, finished) == pytest.approx(expected)


def test_bootstrap_by_its_definition():
    values = np.array([0.0, 1.0, 1.0, 0.5])
    low, high = bootstrap_interval(values, seed=3)
    assert (low, high) == bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    rng = np.random.default_rng(3)
    means = sorted(float(rng_row.mean()) for rng_row in rng.choice(values, (1000, 4)))
    assert means[20] <= low <= means[30] and means[970] <= high <= means[980]
    assert bootstrap_interval(np.full(9, 0.25)) == (0.25, 0.25)


def answered(name, gold, responses, finished=None, level="", subject=""):
    example = Example(name, f"{name}?", gold, "", subject, level)
    finished = finished or [True] * len(responses)
    row = Answered("toy", example, responses, finished, [len(r) for r in responses],
                   [Verdict(0.0, None, "not graded")] * len(responses))  # fmt: skip
    return regrade([row], numeric_answer)[0]


ROWS = [
    answered("a", "7", ["is 7", "is 7", "is 3", "is 7"], level="1", subject="Algebra"),
    answered("b", "8", ["is 1", "is 1", "is 8", "is 2"], level="2", subject="Algebra"),
    answered("c", "9", ["9", "1", "2", "none"], [False, True, True, True], level="2"),
]
ROW_FIELDS = ("responses", "finished", "lengths", "verdicts")


def test_an_evaluation_by_hand():
    e = evaluation_of(ROWS, 4, [row.example for row in ROWS])
    # right: 3, 1 and 0 of 4 (the 9 was cut off)
    assert e.accuracy == pytest.approx((3 / 4 + 1 / 4 + 0) / 3)
    assert e.pass_at["1"][0] == pytest.approx(e.accuracy)
    assert e.pass_at["2"][0] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert e.pass_at["4"][0] == pytest.approx(2 / 3)
    assert e.majority[0] == pytest.approx(1 / 3)  # a; b votes for 1; c ties 1 and 2
    assert (e.k, e.prompts, e.verifier_errors) == (4, 3, 0)
    assert e.finished == pytest.approx(11 / 12) and e.truncated == pytest.approx(1 / 12)
    assert e.response_length == pytest.approx((4 * 8 + 1 + 1 + 1 + 4) / 12)
    assert e.levels["1"] == {"prompts": 1, "accuracy": 0.75, "pass_at_k": 1.0, "majority": 1.0}
    assert e.levels["2"] == {"prompts": 2, "accuracy": 0.125, "pass_at_k": 0.5, "majority": 0.0}
    assert e.subjects.keys() == {"Algebra"} and e.subjects["Algebra"]["prompts"] == 2
    assert json.loads(json.dumps(e.as_dict())) == e.as_dict()
    low, high = bootstrap_interval(np.array([0.75, 0.25, 0.0]))
    assert (e.accuracy_low, e.accuracy_high) == (low, high)
    table = table_of(e.as_dict())
    assert table["level 2"] == "avg 0.125, pass 0.500, maj 0.000  (2 prompts)"
    assert "maj@4" in table and "Algebra" in table
    greedy = [row._replace(**{f: getattr(row, f)[:1] for f in ROW_FIELDS}) for row in ROWS]
    table = table_of(evaluation_of(greedy, 1, [row.example for row in ROWS]).as_dict())
    assert table["level 1"] == "1.000  (1 prompt)" and "maj@1" not in table


def test_answers_come_back_from_their_file(tmp_path):
    rows = [(step, row) for step in (0, 4) for row in ROWS]
    write_answers(tmp_path / "new" / "answers.jsonl", rows)
    assert list(read_answers([tmp_path / "new" / "answers.jsonl"])) == rows
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["answers.jsonl"]


@pytest.fixture(scope="module")
def sets_recipe(toy_recipe, tmp_path_factory):
    """The toy recipe with two evaluation sets, one of them greedy, and evaluation on the way."""
    path = tmp_path_factory.mktemp("sets") / "sets.gin"
    path.write_text(f'''
from __gin__ import dynamic_registration
from dppo_jax import evaluate
from dppo_jax import train
from dppo_jax.sampling import generate
include "{toy_recipe}"
STEPS = 2
train.train.eval_every = 1
train.train.eval_sets = (@sampled/evaluate.EvalSet(), @greedy/evaluate.EvalSet())
sampled/evaluate.EvalSet.dataset = "arithmetic"
sampled/evaluate.EvalSet.prompts = 12
greedy/evaluate.EvalSet.dataset = "arithmetic"
greedy/evaluate.EvalSet.name = "greedy"
greedy/evaluate.EvalSet.prompts = 5
greedy/evaluate.EvalSet.prompts_per_batch = 2
greedy/evaluate.EvalSet.sampling = @greedy/generate.SamplingConfig()
greedy/generate.SamplingConfig.temperature = 0.0
greedy/generate.SamplingConfig.samples_per_prompt = 1
''')
    return path


@pytest.fixture(scope="module")
def sets_run(dppo, sets_recipe, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    done = dppo("train", sets_recipe, "--workdir", run)
    assert done.status == 0, done.err
    assert "arithmetic avg@4 before" in done.out and "greedy avg@1 after" in done.out
    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_named_sets_before_on_the_way_and_after(sets_run):
    summary = json.loads((sets_run / "summary.json").read_text())
    for when in ("before", "after"):
        assert summary[when].keys() == {"arithmetic", "greedy"}
        assert (summary[when]["greedy"]["k"], summary[when]["greedy"]["prompts"]) == (1, 5)
        assert summary[f"accuracy_{when}"] == summary[when]["arithmetic"]["accuracy"]
    first, second = lines(sets_run / "metrics.jsonl")
    assert {f"eval/{name}/{what}" for name in ("arithmetic", "greedy")
            for what in ("accuracy", "pass_at_k", "majority", "response_length", "truncated")
            } <= first.keys()  # fmt: skip
    assert not [name for name in second if name.startswith("eval/")]  # that is `after`
    kept = lines(sets_run / "answers.jsonl")
    assert [row["step"] for row in kept] == [0] * 17 + [1] * 17 + [2] * 17
    assert [row["set"] for row in kept[:17]] == ["arithmetic"] * 12 + ["greedy"] * 5
    assert all(len(row["answers"]) == {"arithmetic": 4, "greedy": 1}[row["set"]] for row in kept)


def test_regrading_what_was_kept_gives_the_same(dppo, sets_recipe, sets_run):
    done = dppo("eval", sets_recipe, "--regrade", sets_run / "answers.jsonl", "--json")
    results = json.loads(done.out)["evaluations"]
    assert [(r["step"], r["set"]) for r in results] == [
        (step, name) for step in range(3) for name in ("arithmetic", "greedy")
    ]
    assert all(r["changed"] == 0 for r in results)
    summary = json.loads((sets_run / "summary.json").read_text())
    for when, step in (("before", 0), ("after", 2)):
        for name in ("arithmetic", "greedy"):
            (again,) = [r for r in results if (r["step"], r["set"]) == (step, name)]
            assert summary[when][name].items() <= again.items()


def test_regrading_with_another_verifier(dppo, sets_recipe, sets_run, tmp_path):
    flags = ("--answers", tmp_path / "new.jsonl",
             "--gin.train.train.verifier=@verifiers.arithmetic_answer")  # fmt: skip
    done = dppo("eval", sets_recipe, "--regrade", sets_run / "answers.jsonl", *flags)
    assert done.status == 0 and "scores changed" in done.out and "pass@4" in done.out, done.err
    reasons = {a["reason"] for row in lines(tmp_path / "new.jsonl") for a in row["answers"]}
    assert "no '=' in the response" in reasons


def test_a_checkpoint_is_evaluated_and_its_answers_kept(dppo, sets_recipe, sets_run, tmp_path):
    done = dppo("eval", sets_recipe, "--checkpoint", sets_run, "--json", "--answers",
                tmp_path / "a.jsonl")  # fmt: skip
    result = json.loads(done.out)
    assert result["sets"] == json.loads((sets_run / "summary.json").read_text())["after"]
    assert result["answers"] == str(tmp_path / "a.jsonl")
    kept = [row for row in lines(sets_run / "answers.jsonl") if row["step"] == 2]
    assert lines(tmp_path / "a.jsonl") == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("example"), "line 1: not a line of an answers file .KeyError"),
        (lambda row: row["answers"][0].pop("score"), "line 1: .*KeyError: 'score'"),
        (lambda row: row["answers"].clear(), "line 1: .*a list of objects with a response"),
        (lambda row: row["example"].update(prompt=3), "fields must be strings"),
        (lambda row: row["answers"].pop(), "3 answers to some problems and 4 to others"),
    ],
)
def test_a_damaged_answers_file(dppo, sets_recipe, tmp_path, change, message):
    rows = [{"step": 1, **row.as_dict()} for row in ROWS]
    change(rows[0])
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = dppo("eval", sets_recipe, "--regrade", tmp_path / "a.jsonl")
    assert done.status == 2 and len(done.err.splitlines()) == 1
    assert re.search(message, done.err), done.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gin.greedy/evaluate.EvalSet.name='arithmetic'"], "two evaluation sets are called"),
        (["--gin.greedy/evaluate.EvalSet.dataset='arithmetics'"], "did you mean arithmetic"),
        (["--gin.greedy/evaluate.EvalSet.split='dev'"], "no split 'dev'.*bind train.train.eval_se"),
        (["--gin.greedy/evaluate.EvalSet.prompts=0"], "at least 1"),
        (["--gin.train.train.overlap='refuse'", "--gin.greedy/evaluate.EvalSet.split='train'"],
         "5 of the 5 problems of greedy are in the training set too"),
    ],
)  # fmt: skip
def test_sets_that_make_no_sense(dppo, sets_recipe, tmp_path, flags, message):
    done = dppo("train", sets_recipe, "--workdir", tmp_path / "run", *flags)
    assert done.status == 2 and re.search(message, done.err), done.err
    assert not (tmp_path / "run").exists()


def test_evaluation_of_nothing(dppo, toy_recipe, tmp_path):
    flags = ("--checkpoint", tmp_path, "--gin.train.train.eval_sets=()")
    done = dppo("eval", toy_recipe, *flags)
    assert done.status == 2 and "no evaluation set: bind train.train.eval_sets" in done.err
    done = dppo("eval", toy_recipe)
    assert done.status == 2 and "one of the arguments --checkpoint --regrade" in done.err
