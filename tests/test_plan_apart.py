"""Plans of runs whose rollouts are drawn on devices of their own: seconds by hand, and the verb."""

import functools
import json

import plan_verb
import pytest

from dppo_jax.plan.apart import Sides
from dppo_jax.plan.compiling import Compiled

TINY = ["PROMPTS_PER_STEP=16", "decoder.DecoderConfig.layers=2", "MAX_NEW_TOKENS=9"]
dppo_plan = functools.partial(plan_verb.dppo_plan, TINY)


def devices(sampler: int, depth: int) -> list[str]:
    names = {"sampler_devices": sampler, "async_depth": depth}
    return [f"--gin.train.train.{name}={number}" for name, number in names.items()]


def test_both_sides_work_at_once_or_in_turn():
    def program(name, runs, seconds):
        return Compiled(name, runs, 1, None, 0.0, 0.0, roofline_seconds=seconds)

    programs = [
        program("weight sync", 1, 1.0),
        program("weights out", 1, 2.0),
        program("weights in", 1, 3.0),
        program("prefill", 2, 4.0),
        program("decode", 2, 10.0),
        program("scoring", 1, 5.0),
        program("update", 4, 2.0),
    ]
    ahead = Sides(training=6, sampling=2, depth=1, sent=8.0, copy_seconds=1.0).seconds(programs)
    trainer, sampler = 1 + 2 + 5 + 4 * 2, 1 + 3 + 2 * 4 + 2 * 10
    assert (ahead["trainer"], ahead["sampler"], ahead["step"]) == (trainer, sampler, sampler)
    assert (ahead["trainer_idle"], ahead["sampler_idle"]) == (0.5, 0.0)
    turns = Sides(training=6, sampling=2, depth=0, sent=8.0, copy_seconds=1.0).seconds(programs)
    assert turns["step"] == trainer + sampler
    assert turns["trainer_idle"] == pytest.approx(sampler / (trainer + sampler))
    assert turns["sampler_idle"] == pytest.approx(trainer / (trainer + sampler))


def test_a_plan_of_two_sides():
    """Of six cards two train and four sample, each side with its own arrays."""
    plan = json.loads(dppo_plan("--topology", "h100:6", "--json", *devices(4, 1)).stdout)
    programs, sides = plan["programs"], plan["sides"]
    assert (sides["training"], sides["sampling"], plan["mesh"]) == (2, 4, {"fsdp": 2})
    found = {name: each["side"] for name, each in programs.items()}
    # They leave in halves, as they lie: no program lays them out.
    assert found == {
        "weight sync": "trainer",
        "weights in": "sampler",
        "prefill": "sampler",
        "decode": "sampler",
        "scoring": "trainer",
        "update": "trainer",
    }
    weights = 4 * (2 * 128 * (4 * 128 + 3 * 384) + 16 * 128)
    assert 1 < sides["sent"] / (2 * weights) < 1.01  # to each of four a half: divided there
    assert programs["weights in"]["arguments"] == weights / 2
    assert 1 <= programs["weights in"]["output"] / (weights / 4) < 1.01
    # The trainer holds parameters, two moments and the version that the next rollout is drawn with;
    # the sampler the weights of this rollout, beside it those of the next.
    assert 1 < programs["update"]["arguments"] / (4 * weights / 2) < 1.1
    assert 1 < programs["decode"]["resident"] / (weights / 4) < 1.1
    assert programs["decode"]["cache"] == 2 * 2 * 4 * 32 * 4 * 4 * (6 + 8 * 9)
    seconds = sides["seconds"]
    assert plan["step_seconds"] == seconds["step"] == max(seconds["trainer"], seconds["sampler"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--topology", "h100:2", *devices(2, 0)], "sampler_devices=2 of a host's 2 devices"),
        (
            ["--topology", "h100:8", *devices(6, 0)],
            "width=128 is not divisible by the mesh's fsdp=6",
        ),
        (["--scaling", "h100:2,h100:4", *devices(1, 0)], "leave sampler_devices at 0"),
    ],
)
def test_a_division_that_no_run_takes_is_one_line(options, said):
    told = dppo_plan(*options, status=2).stderr
    assert said in told and len(told.splitlines()) == 1
