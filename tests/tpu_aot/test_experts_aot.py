"""A layer's experts over a mesh axis, through libtpu's compiler: both ways for tokens to travel."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dppo_jax.kernels.plan import ENVIRONMENT

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.slow,  # a minute of libtpu's compiler for each chip
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]


@pytest.mark.parametrize("topology", ["v5p:2x2x2", "v6e:2x4"])
def test_experts_of_qwen3_30b_a3b_over_eight_chips(topology):
    paths = [str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, HERE / "compile_experts.py", topology, "ragged", "gathered"],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for found in json.loads(done.stdout.splitlines()[-1]):
        print(found)
        assert found["chips"] == 8
        # There and back, made again, and their gradients; weights stay where they are.
        ragged = found["collectives"]["ragged-all-to-all"]
        assert (ragged > 0) == (found["transport"] == "ragged")
        # Without pieces it would be rows of k tokens a token from eight chips, thrice: 3.2 GB.
        assert found["temporary_bytes"] < 1.5e9
