"""Rewards in the loop: worker processes change no number, parts are logged, unfit data refused."""

import json
import re

import pytest

# The toy's own reward, from worker processes, plus what must be logged and weigh nothing; DAPO's
# length penalty needs the count of tokens.
WEIGHTED = """
include "{toy}"
from dppo_jax.rewards import combined
from dppo_jax.rewards import lengths
from dppo_jax.rewards import verdicts
import toy_rewards
STEPS = 2
train.train.verifier = @combined.weighted()
combined.weighted.parts = {{"digits": @verdicts.in_worker(), "overlong": @lengths.overlong}}
combined.weighted.weights = {{"overlong": 0.0}}
verdicts.in_worker.verifier = @toy_rewards.even_digits
verdicts.in_worker.waiting_seconds = 60.0
lengths.overlong.max_tokens = 8
lengths.overlong.buffer = 6
"""


def metrics(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith("time/")}
        for line in lines
    ]


def test_worker_processes_and_parts_give_the_same_run(dppo, toy_recipe, tmp_path):
    recipe = tmp_path / "weighted.gin"
    recipe.write_text(
        "from __gin__ import dynamic_registration\nfrom dppo_jax import train\n"
        + WEIGHTED.format(toy=toy_recipe)
    )
    plain, weighted = tmp_path / "plain", tmp_path / "weighted"
    done = dppo("train", toy_recipe, "--workdir", plain, "--gin.STEPS=2")
    assert done.status == 0, done.err
    done = dppo("train", recipe, "--workdir", weighted)
    assert done.status == 0, done.err
    for line, other in zip(metrics(weighted), metrics(plain), strict=True):
        assert line["reward/digits"] == pytest.approx(other["reward/mean"], abs=1e-6)
        length = line["response/length"]
        assert line["reward/overlong"] < 0 if length > 2 else line["reward/overlong"] == 0
        assert line["reward/verifier_timeouts"] == line["reward/verifier_crashes"] == 0
        parts = ("reward/digits", "reward/overlong")
        assert {name: value for name, value in line.items() if name not in parts} == other


def test_data_that_the_verifier_cannot_judge_is_refused(dppo, toy_recipe, tmp_path):
    recipe = tmp_path / "unfit.gin"
    recipe.write_text(
        "from __gin__ import dynamic_registration\nfrom dppo_jax import train\n"
        f'include "{toy_recipe}"\nfrom dppo_jax.rewards import matches\n'
        "train.train.verifier = @matches.multiple_choice\n"
    )
    done = dppo("train", recipe, "--workdir", tmp_path / "run")
    assert done.status == 2 and not (tmp_path / "run").exists()
    (line,) = done.err.splitlines()
    assert re.match(
        r"dppo: the verifier cannot judge \d+ of \d+ examples of the training set", line
    )
    assert "holds none of the letters ABCDEFGHIJ" in done.err
