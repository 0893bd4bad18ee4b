"""Rollouts drawn while the step before is trained, on other devices: numbers and resumption."""

import json
import shutil

import pytest
from test_mesh import MESH, metrics, with_eight_devices

from dppo_jax.ahead import check_ahead, divide

pytestmark = pytest.mark.multidevice

DEPTH = "--gin.train.train.async_depth=1"
SPLIT = "--gin.train.train.sampler_devices=4"
STALE = """
from __gin__ import dynamic_registration
from dppo_jax import rollout_policy
from dppo_jax import train
include "{toy}"
train.train.rollout_policy = @rollout_policy.stale()
rollout_policy.stale.steps = 1
"""


def run(recipe, workdir, *flags):
    command = ["-m", "dppo_jax", "train", recipe, "--workdir", workdir, *flags]
    done = with_eight_devices(*command)
    assert done.returncode == 0, done.stderr
    return metrics(workdir)


def numbers(line):
    return {name: value for name, value in line.items() if not name.startswith("time/")}


@pytest.fixture(scope="module")
def ahead(toy_recipe, tmp_path_factory):
    """Four steps, four devices that sample and four that train."""
    folder = tmp_path_factory.mktemp("ahead") / "run"
    return folder, run(toy_recipe, folder, DEPTH, SPLIT)


def test_staleness_is_the_depth(ahead):
    _, lines = ahead
    assert [line["staleness/max"] for line in lines] == [0, 1, 1, 1]
    assert all(line["time/trainer_idle"] >= 0 <= line["time/sampler_idle"] for line in lines)


def test_the_numbers_are_those_of_stale_rollouts_in_turn(ahead, toy_recipe, tmp_path):
    """Eight devices that sample and train in turn, with the parameters of the step before."""
    (tmp_path / "stale.gin").write_text(STALE.format(toy=toy_recipe))
    in_turn = run(tmp_path / "stale.gin", tmp_path / "run", *MESH)
    for ours, theirs in zip(ahead[1], in_turn, strict=True):
        for name, value in numbers(theirs).items():
            if name.startswith(("mismatch/", "prompts/")):  # prompts are a step ahead
                continue
            if value is None:  # a mean of nothing
                assert ours[name] is None, name
            else:
                assert ours[name] == pytest.approx(value, rel=2e-3, abs=2e-6), name


def test_a_resumed_run_draws_again_what_was_in_flight(ahead, toy_recipe, tmp_path):
    folder, lines = ahead
    again = shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "4")
    (again / "summary.json").unlink()
    found = run(toy_recipe, again, DEPTH, SPLIT)
    assert [numbers(line) for line in found] == [numbers(line) for line in lines]
    first, second = (json.loads((f / "summary.json").read_text()) for f in (folder, again))
    assert first["after"] == second["after"]


def test_bad_settings():
    with pytest.raises(ValueError, match="async_depth=-1"):
        check_ahead(-1, None, 1, None)
    with pytest.raises(ValueError, match="none of dynamic_sampling"):
        check_ahead(1, None, 2, None)
    check_ahead(0, object(), 2, None)
    assert divide([1, 2, 3], 1) == ([1], [2, 3])
    with pytest.raises(ValueError, match="leave at least one to train"):
        divide([1, 2], 2)
