"""The fused head through libtpu's compiler: does it fit, and is it the work we think it is?"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EFFORT

from dppo_jax.kernels.plan import (
    ENVIRONMENT,
    FORWARD,
    PARALLEL_FORWARD,
    SHAPES,
    compile_table,
)

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]

LARGEST_SHARE = 0.1  # of N x V float32 logits


CHIPS = ["v5e", "v5p", "v6e", "7x"]


@pytest.mark.usefixtures("least_effort")
@pytest.mark.parametrize("chip", CHIPS)
def test_forward_and_backward_need_a_tenth_of_the_logits_memory(chip):
    """On one device, and with the vocabulary over all devices of four chips."""
    check_every_form(chip, SHAPES if chip == "v5e" else SHAPES[:1])


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_so_do_the_programs_that_users_run(chip):
    """The same, every shape compiled with XLA's whole effort."""
    check_every_form(chip, SHAPES)


def check_every_form(chip, shapes):
    units = {FORWARD: 2, "pallas_tpu": 8, "single_pass": 6}
    units |= {PARALLEL_FORWARD: 2, "parallel": 8, "parallel_single_pass": 6}
    rows = compile_table((chip,), shapes, units)
    assert len(rows) == len(shapes) * len(units)
    for row in rows:
        print(row)
        assert row["fits"] and row["temporary_share"] <= LARGEST_SHARE
        parallel = "parallel" in row["form"]
        assert row["devices"] >= 4 if parallel else row["devices"] == 1
        made = units[row["form"]] * row["tokens"] * row["width"] * row["vocabulary"]
        # Chunks of the backward are rounded up to whole tiles; nothing else may be added.
        assert 1 <= row["flops"] / (made / row["devices"]) < (1.1 if parallel else 1.05)
        assert row["compiler_seconds"] > row["roofline_seconds"] * 0.99
        # Forwards, and a chunk of a part of the vocabulary, may lie in memory on the chip.
        assert row["temporary_bytes"] > 0 or parallel or row["form"] == FORWARD


def test_effort_takes_no_more_memory(least_effort, monkeypatch):
    """What is measured with the least of it bounds what is needed with the whole."""
    shape = (SHAPES[-1],)
    forms = ("pallas_tpu", "parallel_single_pass")
    quick = compile_table(("v5e",), shape, forms)
    monkeypatch.delenv(EFFORT)
    for row, whole in zip(quick, compile_table(("v5e",), shape, forms), strict=True):
        assert whole["temporary_bytes"] <= row["temporary_bytes"] > 0
        assert row["flops"] == pytest.approx(whole["flops"], rel=1e-4)


def test_what_does_not_fit_is_said():
    (row,) = compile_table(("v5e",), ((131072, 128, 151936),), ("naive",))
    assert not row["fits"] and row["needed_bytes"] > 4 * 131072 * 151936
    (row,) = compile_table(("v5e",), ((8, 128, 301),), ("parallel",))
    assert row["skipped"] == "a vocabulary of 301 is not divisible by 4 devices"


@pytest.mark.usefixtures("least_effort")
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


def test_names_are_checked_before_anything_is_compiled():
    with pytest.raises(ValueError, match="unknown chip 'v9'; known: v4, v5e"):
        compile_table(("v9",))
    with pytest.raises(ValueError, match="unknown form 'dense'; known: naive"):
        compile_table(("v5e",), forms=("dense",))
    with pytest.raises(ValueError, match=r"\(0, 8, 9\) with 20 stored ids: sizes are at least 1"):
        compile_table(("v5e",), ((0, 8, 9),))
