"""The fused head through libtpu's compiler: does it fit, and is it the work we think it is?"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dppo_jax.kernels.plan import ENVIRONMENT, FORWARD, SHAPES, compile_table

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]

LARGEST_SHARE = 0.1  # of N x V float32 logits


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "7x"])
def test_forward_and_backward_need_a_tenth_of_the_logits_memory(chip):
    units = {FORWARD: 2, "pallas_tpu": 8, "single_pass": 6}
    rows = compile_table((chip,), SHAPES, units)
    assert len(rows) == len(SHAPES) * len(units)
    for row in rows:
        print(row)
        assert row["fits"] and row["temporary_share"] <= LARGEST_SHARE
        # Chunks of the backward are rounded up to whole tiles; nothing else may be added.
        made = units[row["form"]] * row["tokens"] * row["width"] * row["vocabulary"]
        assert 1 <= row["flops"] / made < 1.05
        assert row["compiler_seconds"] > row["roofline_seconds"] * 0.99
        assert row["temporary_bytes"] > 0 or row["form"] == FORWARD


def test_what_does_not_fit_is_said():
    (row,) = compile_table(("v5e",), ((131072, 128, 151936),), ("naive",))
    assert not row["fits"] and row["needed_bytes"] > 4 * 131072 * 151936


def test_on_a_mesh_no_logit_crosses_and_the_matrix_is_gathered_once():
    """Four chips, (fsdp, tensor) = (2, 2): the collectives of the compiled program."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "sharded.py")],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for found in json.loads(done.stdout):
        print(found)
        counts = found["collectives"]
        # Along D, once; back out as it is stored, once; never in the loop over chunks.
        assert counts["all-gather"] == counts["reduce-scatter"] == 1
        assert counts["all-to-all"] == found["looped_gathers"] == 0
        # Maxima, sums and found logits of tokens; hidden's gradient; the loss.
        assert 2 <= counts["all-reduce"] <= 6
        assert found["loops"] and not found["whole_logits"]


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_vocabulary_parallel_needs_a_tenth_of_the_logits_memory(topology):
    """The vocabulary over all devices of four chips, forward and backward in both forms."""
    paths = [str(Path(__file__).parent.parent.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "compile_sharded_head.py", topology],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2 * len(SHAPES)
    for row in found:
        print(row)
        assert row["devices"] >= 4 and 0 < row["temporary_share"] <= LARGEST_SHARE


def test_names_are_checked_before_anything_is_compiled():
    with pytest.raises(ValueError, match="unknown chip 'v9'; known: v4, v5e"):
        compile_table(("v9",))
    with pytest.raises(ValueError, match="unknown form 'dense'; known: naive"):
        compile_table(("v5e",), forms=("dense",))
