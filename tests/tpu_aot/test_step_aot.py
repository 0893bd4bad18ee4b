"""Training steps of true model sizes, compiled for pod slices: do they fit a chip's memory?"""

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
    pytest.mark.slow,  # a minute of libtpu's compiler on two quiet cores, many on busy ones
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]


@pytest.mark.parametrize(
    ("model", "parameters"), [("qwen3_8b", 8_190_735_360), ("qwen3_30b_a3b", 30_532_122_624)]
)
def test_a_step_fits(model, parameters):
    paths = [str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, HERE / "compile_step.py", model, "v5p:4x4x4"],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert (found["chips"], found["parameters"]) == (64, parameters)
    assert found["bytes_a_chip"] < MEMORY["v5p"]
    splash = {"splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"}
    assert set(found["kernels"]) == splash | ({"ragged_dot"} if model.endswith("a3b") else set())
