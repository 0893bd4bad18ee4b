"""Training steps compiled for pod slices: do they fit a chip's memory, and what do they send?"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dppo_jax.kernels.plan import ENVIRONMENT

HERE = Path(__file__).parent
MEMORY = {"v5p": 95e9}  # bytes a chip

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]


def printed_by(script, *arguments):
    paths = [str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, HERE / script, *arguments],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.usefixtures("least_effort")
def test_microbatches_sum_their_gradients_over_data_once():
    """An all-reduce over 4 chips sends 2·3/4 of what it sums, here float32 gradients."""
    found = printed_by("compile_microbatches.py", "data", "dppo_binary_tv")
    assert found["sent"] == pytest.approx(1.5 * found["parameters"], rel=0.01), found


def test_microbatches_of_two_passes_compile():
    """With XLA's whole effort, which moves sums out of loops: libtpu ended in doing so."""
    assert printed_by("compile_microbatches.py", "fsdp", "kl_cov")["sent"] > 0


@pytest.mark.slow  # a minute of libtpu's compiler on two quiet cores, many on busy ones
@pytest.mark.parametrize(
    ("model", "parameters"), [("qwen3_8b", 8_190_735_360), ("qwen3_30b_a3b", 30_532_122_624)]
)
def test_a_step_fits(model, parameters):
    found = printed_by("compile_step.py", model, "v5p:4x4x4")
    print(found)
    assert (found["chips"], found["parameters"]) == (64, parameters)
    assert found["bytes_a_chip"] < MEMORY["v5p"]
    splash = {"splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"}
    assert set(found["kernels"]) == splash | ({"ragged_dot"} if model.endswith("a3b") else set())
