"""Dynamic sampling over several processes: all drop the same groups, as one process does."""

from pathlib import Path

import pytest
from test_multihost import RECIPE, assert_same_numbers, metrics

import launch

pytestmark = [pytest.mark.multidevice, pytest.mark.slow]

DYNAMIC = """
from dppo_jax import dynamic_sampling
train.train.verifier = @toy_rewards.begins_even
train.train.rollout_batches = 2
train.train.dynamic_sampling = @dynamic_sampling.DynamicSampling()
train.train.eval_sets = ()
"""


def trained(recipe: Path, run: Path, processes: int) -> list[dict]:
    commands = launch.dppo(processes, "train", recipe, "--workdir", run, "--gin.STEPS=3")
    env = launch.environment(4 // processes)
    ended = launch.ends(launch.start(commands, env, [recipe.parent] * processes))
    assert {e.status for e in ended} == {0}, ended
    return metrics(run)


def test_two_processes_replace_the_groups_that_one_replaces(tmp_path):
    """Groups move between processes; samples and rewards stay together: the gradients agree."""
    recipe = tmp_path / "dynamic.gin"
    recipe.write_text(RECIPE.format(data=tmp_path / "data") + DYNAMIC)
    alone, together = (trained(recipe, tmp_path / f"run{n}", n) for n in (1, 2))
    assert sum(line["groups/replaced"] for line in alone) > 0
    assert_same_numbers(together, alone)
