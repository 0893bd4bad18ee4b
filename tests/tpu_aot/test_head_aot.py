"""The fused head through libtpu's compiler: does it fit, and is it the work we think it is?"""

import importlib.util

import pytest
from table import LARGEST_SHARE, line

from dppo_jax.kernels.plan import SHAPES, compile_table

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]


# The other chips and shapes take minutes: tests/tpu_aot/table.py.
@pytest.mark.parametrize("chip", ["v5e", "7x"])
def test_forward_and_backward_need_a_tenth_of_the_logits_memory(chip):
    tokens, width, vocabulary = SHAPES[-1]
    forward, both = compile_table((chip,), (SHAPES[-1],))
    print(line(forward), line(both), sep="\n")
    for row, units in ((forward, 2), (both, 8)):
        assert row["temporary_share"] <= LARGEST_SHARE
        # Chunks of the backward are rounded up to whole tiles; nothing else may be added.
        assert 1 <= row["flops"] / (units * tokens * width * vocabulary) < 1.05
    assert both["temporary_bytes"] > 0


def test_names_are_checked_before_anything_is_compiled():
    with pytest.raises(ValueError, match="unknown chip 'v9'; known: v4, v5e"):
        compile_table(("v9",))
    with pytest.raises(ValueError, match="unknown form 'dense'; known: forward"):
        compile_table(("v5e",), forms=("dense",))
