"""The rollout engine's programs compiled for pod slices: do they fit, and what does a step read?"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dppo_jax.kernels.chips import CHIPS, ENVIRONMENT

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]


def compiled(
    topology: str, layers: int, *programs: str, tensor: int = 8, vocabulary: int = 151936
) -> dict:
    paths = [str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    sizes = [str(tensor), str(layers), str(vocabulary)]
    done = subprocess.run(
        [sys.executable, HERE / "compile_engine.py", topology, *sizes, *programs],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    return found


def check(found: dict, layers: int) -> None:
    chip = CHIPS[found["topology"].split(":")[0]]
    assert found["decode"]["kernels"] == layers  # one ragged paged attention in each
    floor = sum(found["floor"].values())
    # A vocabulary's tile may stay on the chip; compile_engine.py says what is counted beside it.
    # The head reads its matrix whole along D, twice what the floor has, and its logits several
    # times: most of what a model of one layer reads.
    most = 3.2 if layers == 1 else 2.5
    assert 0.9 * floor < found["decode"]["step_bytes"] < most * floor
    assert found["decode"]["waits"]
    # The top-20 candidates of 8 shards of the vocabulary, for 128 slots: never their logits.
    assert 0 < found["decode"]["gathered"] <= 128 * 8 * 20
    for program in {"decode", "prefill"} & set(found):
        assert found[program]["bytes_a_chip"] < chip.hbm_bytes


def test_decoding_of_one_layer_fits():
    """Qwen3-8B's shape with a single layer; the tests marked slow have them all."""
    check(compiled("v5e:4x4", 1, "decode"), 1)


def test_chips_with_a_copy_each_decode_alone():
    found = compiled("v5e:2x2", 1, "decode", tensor=1, vocabulary=8192)["decode"]
    assert found["kernels"] == 1 and not found["waits"]


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:4x4x4"])
def test_the_whole_model_fits(topology):
    check(compiled(topology, 36, "decode", "prefill"), 36)
