"""Rollouts drawn while earlier steps are trained: the bits of runs in turn, and resumption."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dppo_jax import rollout_policy
from dppo_jax.ahead import check_ahead
from dppo_jax.elsewhere import divide

pytestmark = pytest.mark.multidevice
HERE = Path(__file__).parent

RECIPE = """
from __gin__ import dynamic_registration
from dppo_jax import rollout_policy
from dppo_jax import train
include "{toy}"
"""
STALE = "--gin.train.train.rollout_policy=@rollout_policy.stale() --gin.rollout_policy.stale.steps="
DEPTH, APART = "--gin.train.train.async_depth=", "--gin.train.train.sampler_devices=4"


def start(devices, recipe, folder, *runs):
    folder.mkdir()
    paths = [str(HERE.parent.parent), str(HERE.parent)]
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(paths),
        "JAX_COMPILATION_CACHE_DIR": str(recipe.parent / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, HERE / "ahead_runs.py", recipe, folder, *runs]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def found(toy_recipe, tmp_path_factory):
    """Runs of four devices, and of four that sample with four that train."""
    folder = tmp_path_factory.mktemp("ahead")
    recipe = folder / "ahead.gin"
    recipe.write_text(RECIPE.format(toy=toy_recipe))
    home = ["in_turn=", f"stale={STALE}2", f"ahead={DEPTH}2"]
    apart = [
        f"apart={DEPTH}0 {APART}",
        f"far={DEPTH}2 {APART}",
        f"again=resume far {DEPTH}2 {APART}",
    ]
    running = [start(4, recipe, folder / "4", *home), start(8, recipe, folder / "8", *apart)]
    errors = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    files = [folder / devices / "found.json" for devices in "48"]
    return json.loads(files[0].read_text()) | json.loads(files[1].read_text())


def exactly(run):
    """Parameters, texts, evaluation and numbers of a run, without seconds and staleness."""
    unlike = "time/", "staleness/", "weights/"
    lines = [
        {name: x for name, x in line.items() if not name.startswith(unlike)}
        for line in run["metrics"]
    ]
    for line in lines:
        line.pop("prompts/epoch")  # those ahead have been drawn from the data
    return {**run, "metrics": lines}


def test_depth_0_on_other_devices_is_the_run_in_turn(found):
    """Weights go there and rollouts come back without the change of a bit."""
    assert len(found["in_turn"]["metrics"]) == 4
    assert exactly(found["apart"]) == exactly(found["in_turn"])
    line = found["apart"]["metrics"][0]
    assert "staleness/max" not in line
    assert line["weights/bytes_sent"] > 0 < line["time/weight_transfer"]


@pytest.mark.parametrize("name", ["ahead", "far"])
def test_depth_2_is_the_run_in_turn_with_stale_parameters(found, name):
    """Whatever runs at the same time, at home and on other devices."""
    assert exactly(found[name]) == exactly(found["stale"])
    assert found[name]["params"] != found["in_turn"]["params"]
    lines = found[name]["metrics"]
    assert [line["staleness/max"] for line in lines] == [0, 1, 2, 2]
    assert all(line["time/trainer_idle"] >= 0 <= line["time/sampler_idle"] for line in lines)
    assert all(line["time/compilations"] == 0 for line in lines[2:])


def test_a_resumed_run_draws_again_what_was_in_flight(found):
    assert exactly(found["again"]) == exactly(found["far"])


def test_bad_settings():
    now, before = rollout_policy.current(), rollout_policy.stale(1)
    with pytest.raises(ValueError, match="async_depth=-1"):
        check_ahead(-1, None, 1, None, now)
    for refused in [(object(), 1, None), (None, 2, None), (None, 1, object())]:
        with pytest.raises(ValueError, match="none of dynamic_sampling"):
            check_ahead(1, *refused, now)
    with pytest.raises(ValueError, match="async_depth makes rollouts stale by itself"):
        check_ahead(1, None, 1, None, rollout_policy.chained([now, before]))
    check_ahead(0, object(), 2, None, before)
    devices = [SimpleNamespace(id=i, process_index=i // 3) for i in range(6)]
    assert [[d.id for d in side] for side in divide(devices, 1)] == [[0, 3], [1, 2, 4, 5]]
    with pytest.raises(ValueError, match="leave at least one to train"):
        divide(devices, 3)
