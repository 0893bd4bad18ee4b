"""`dppo plan` through libtpu's compiler, on a model that compiles in seconds."""

import functools
import importlib.util
import json

import plan_verb
import pytest

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]
MODEL = ["decoder.DecoderConfig.layers=2", "decoder.DecoderConfig.width=512"]
TINY = ["PROMPTS_PER_STEP=16", *MODEL, "MAX_NEW_TOKENS=9"]
dppo_plan = functools.partial(plan_verb.dppo_plan, TINY)


@pytest.fixture(scope="module")
def whole() -> dict:
    """A plan of all programs, compiled to their end."""
    return json.loads(dppo_plan("--topology", "v5e:2x2", "--json").stdout)


def test_every_program_of_a_step_compiles_for_a_tpu(whole):
    plan = whole
    print(plan)
    programs = plan["programs"]
    assert (plan["chips"], plan["mesh"], plan["fits"]) == (4, {"fsdp": 4}, True)
    assert list(programs) == ["weight sync", "prefill", "decode", "scoring", "update"]
    weights = 2 * 512 * (4 * 128 + 3 * 384)
    tokens = 16 * (6 + 8 * 8) / 4 / 4  # a chip, of a gradient step
    update = programs["update"]
    assert 1 < update["flops"] / (6 * tokens * weights) < 1.3
    state = 12 * (weights + 16 * 512) / 4
    assert 1 < update["arguments"] / state < 1.5  # TPUs pad what is small
    # Each chip gets its part of the gradients' sum, and no chip all of it.
    moved = {kind: each["bytes"] for kind, each in update["collectives"].items()}
    assert 1 < moved["reduce-scatter"] / (4 * weights * 3 / 4) < 1.05
    assert moved["all-reduce"] < 0.01 * moved["reduce-scatter"]
    assert 1 < moved["all-gather"] / (2 * weights * 3 / 4) < 1.05  # once, rounded for the product
    decoded = 8 * 16 * 8 / 4 * weights * 2  # tokens after the first, of 16 x 8 sequences
    assert 1 < programs["decode"]["flops"] / decoded < 1.3
    assert all(p["compiler_seconds"] > 0 for name, p in programs.items() if p["flops"])
    assert plan["step_seconds"] > 0 and plan["tokens_per_second_per_chip"] > 0


def test_a_plan_without_machine_code(whole, tmp_path):
    """Sooner, and what it tells is that of the whole compilation; each program is kept."""
    short = ["--topology", "v5e:2x2", "--json", "--no-code", "--kept", str(tmp_path)]
    part = json.loads(dppo_plan(*short).stdout)["programs"]
    assert list(part) == list(whole["programs"]) and len(list(tmp_path.glob("*.json"))) == len(part)
    for name, program in part.items():
        for number in ("arguments", "temporaries", "output", "flops", "moved", "sent"):
            assert program[number] == whole["programs"][name][number], (name, number)
        assert program["compiler_seconds"] is None


def test_an_unknown_slice_lists_the_known_ones():
    done = dppo_plan("--topology", "v5p:3x3x3", status=2)
    assert "known of v5p: 2x2x1, 2x2x2" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_work_falls_with_the_number_of_chips():
    """4 and 8 chips: as many prompts a gradient step, then half as many a chip."""
    longer = ["MAX_NEW_TOKENS=64", "MAX_PROMPT_TOKENS=8", "MINIBATCHES=2"]
    overrides = [f"--gin.{override}" for override in longer]
    done = dppo_plan("--scaling", "v5e:2x2,v5e:2x4", "--json", *overrides)
    rows = json.loads(done.stdout)["scaling"]
    print(rows)
    assert [(row["program"], row["chips"]) for row in rows] == [
        (program, chips) for program in ("decode", "update") for chips in (4, 8)
    ]
    assert all(abs(row["flops_share"] - 1) < 0.1 for row in rows)
    for four, eight in (rows[:2], rows[2:]):
        assert eight["bytes"] < four["bytes"] and eight["sent"] < 2 * four["sent"]


def test_chips_that_sample_and_chips_that_train():
    """Two of each host's four: both sides compile for their part of the slice."""
    split = ["--gin.train.train.sampler_devices=2", "--gin.train.train.async_depth=1"]
    plan = json.loads(dppo_plan("--topology", "v5p:2x2x2", "--json", "--no-code", *split).stdout)
    sides, programs = plan["sides"], plan["programs"]
    assert (sides["training"], sides["sampling"], plan["mesh"]) == (4, 4, {"fsdp": 4})
    weights = 4 * (2 * 512 * (4 * 128 + 3 * 384) + 16 * 512)
    assert 1 < sides["sent"] / weights < 1.05  # each piece to one chip
    assert programs["decode"]["flops"] and programs["update"]["flops"]
    # The same on both sides: what is sent needs to be laid out on neither.
    assert {p["side"] for p in programs.values()} == {"trainer", "sampler"}
    assert plan["step_seconds"] == sides["seconds"]["step"]


def test_chips_that_cannot_be_divided_are_told_in_a_line():
    split = ["--gin.train.train.sampler_devices=2"]
    done = dppo_plan("--topology", "v6e:2x4", "--no-code", *split, status=2)
    assert "the compiler ended for a part of the devices of v6e:2x4" in done.stderr
    assert "Traceback" not in done.stderr
