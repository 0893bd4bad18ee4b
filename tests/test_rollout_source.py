"""Training through the seam: an engine elsewhere, divided steps, dynamic sampling."""

import json
import shutil

import pytest
from remote_engine import serving

REMOTE = """
from __gin__ import dynamic_registration
from dppo_jax import train
import remote_engine
include "{toy}"
train.train.rollouts = @remote_engine.over_http()
remote_engine.over_http.url = "{url}"
"""
DYNAMIC = """
from __gin__ import dynamic_registration
from dppo_jax import dynamic_sampling
from dppo_jax import train
import toy_rewards
include "{toy}"
train.train.verifier = @toy_rewards.begins_even
train.train.rollout_batches = 2
train.train.dynamic_sampling = @dynamic_sampling.DynamicSampling()
DATA_DIR = "{data}"
"""


def numbers(workdir):
    """The metrics of each step that do not depend on the clock."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith("time/")}
        for line in lines
    ]


def test_an_engine_elsewhere_trains_the_same_policy(dppo, toy_recipe, tmp_path):
    """Prompts go out, tokens with log-probabilities come back, a step ahead while the step before
    is trained: no number is another. New weights are sent once a step and once for each evaluation.
    """
    flags = ("--gin.STEPS=2", "--gin.train.train.async_depth=1")
    home = dppo("train", toy_recipe, "--workdir", tmp_path / "home", *flags)
    assert home.status == 0, home.err
    with serving() as (server, url):
        recipe = tmp_path / "remote.gin"
        recipe.write_text(REMOTE.format(toy=toy_recipe, url=url))
        away = dppo("train", recipe, "--workdir", tmp_path / "away", *flags)
        assert away.status == 0, away.err
        assert server.asked.count("weights") == 2 + 2
        evaluated = 2 * 2  # 12 problems, 8 at a time
        assert server.asked.count("generate") == 2 + evaluated
        again = dppo("eval", recipe, "--checkpoint", tmp_path / "away", "--json")
        assert again.status == 0 and server.asked.count("weights") == 5
    for ours, theirs in zip(numbers(tmp_path / "away"), numbers(tmp_path / "home"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
        assert ours["staleness/max"] == ours["step"]
    assert (tmp_path / "away/answers.jsonl").read_text() == (
        tmp_path / "home/answers.jsonl"
    ).read_text()


@pytest.fixture(scope="module")
def dynamic(dppo, toy_recipe, tmp_path_factory):
    """A recipe with dynamic sampling over divided steps, and a finished run of it."""
    folder = tmp_path_factory.mktemp("dynamic")
    (folder / "dynamic.gin").write_text(DYNAMIC.format(toy=toy_recipe, data=folder / "data"))
    done = dppo("train", folder / "dynamic.gin", "--workdir", folder / "run")
    assert done.status == 0 and "recompiled" not in done.out, done.err
    return folder


def test_dynamic_sampling_in_a_run(dynamic):
    written = numbers(dynamic / "run")
    assert sum(line["groups/replaced"] for line in written) > 0
    for line in written:
        assert 1 <= line["rollout/batches"] <= 3
        assert line["prompts/consumed"] == 8 * line["rollout/batches"]
        drawn = line["reward/groups_with_spread"] * line["prompts/consumed"]
        assert drawn == pytest.approx(8 - line["groups/without_spread"] + line["groups/unused"])
        assert line["groups/without_spread"] == 0 or line["rollout/batches"] == 3
    assert len({line["prompts/consumed"] for line in written}) > 1
    compiled = [
        json.loads(line)["time/compilations"]
        for line in (dynamic / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert compiled[1:] == [0] * 3


def test_dynamic_sampling_resumes_at_the_very_prompt(dppo, dynamic, tmp_path):
    """Stopped after step 2 of 4, with another number of prompts consumed than 2 x 8."""
    stopped = tmp_path / "stopped"
    shutil.copytree(dynamic / "run", stopped)
    shutil.rmtree(stopped / "checkpoints" / "4")
    (stopped / "summary.json").unlink()
    done = dppo("train", dynamic / "dynamic.gin", "--workdir", stopped)
    assert done.status == 0 and "after step 2 of 4" in done.out, done.err
    assert numbers(stopped) == numbers(dynamic / "run")
    samples = [(each / "samples.jsonl").read_text() for each in (stopped, dynamic / "run")]
    assert samples[0] == samples[1]


def test_the_operative_configuration_repeats_dynamic_sampling(dppo, dynamic, tmp_path):
    operative = dynamic / "run" / "operative_config.gin"
    done = dppo("train", operative, "--workdir", tmp_path / "again", "--gin.STEPS=2")
    assert done.status == 0, done.err
    assert "max_batches = 3" in operative.read_text()
    for ours, theirs in zip(numbers(tmp_path / "again"), numbers(dynamic / "run"), strict=False):
        assert ours == theirs


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gin.train.train.rollout_batches=3"], "prompts_per_step=8 does not divide into roll"),
        (["--gin.train.train.rollout_batches=0"], "rollout_batches=0 must be at least 1"),
        (["--gin.dynamic_sampling.DynamicSampling.max_batches=1"], "max_batches=1"),
    ],
)
def test_divisions_that_make_no_sense(dppo, dynamic, tmp_path, flags, message):
    done = dppo("train", dynamic / "dynamic.gin", "--workdir", tmp_path / "run", *flags)
    assert done.status == 2 and message in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


CONTINUOUS = """
from __gin__ import dynamic_registration
from dppo_jax import train
from dppo_jax.sampling import engine
from dppo_jax.sampling import rollouts
include "{toy}"
train.train.rollouts = @rollouts.continuous()
rollouts.continuous.engine = @engine.EngineConfig()
engine.EngineConfig.slots = 16
engine.EngineConfig.max_context = 16
engine.EngineConfig.chunk = 4
engine.EngineConfig.page_size = 8
engine.EngineConfig.prefill_buckets = (16,)
"""


@pytest.fixture(scope="module")
def continuous(dppo, toy_recipe, tmp_path_factory):
    """A recipe that samples by the engine, and a run of two steps."""
    folder = tmp_path_factory.mktemp("continuous")
    (folder / "continuous.gin").write_text(CONTINUOUS.format(toy=toy_recipe))
    done = dppo("train", folder / "continuous.gin", "--workdir", folder / "run", "--gin.STEPS=2")
    assert done.status == 0 and "recompiled" not in done.out, done.err
    return folder


def test_the_engine_trains_and_a_divided_step_is_the_whole_one(dppo, continuous, tmp_path):
    """On policy to rounding; each request has its own seed, so that a division changes nothing."""
    whole = numbers(continuous / "run")
    for line in whole:
        assert line["mismatch/logp_abs_max"] < 1e-4 and line["update/gradient_norm"] > 0
    flags = ("--gin.STEPS=2", "--gin.train.train.rollout_batches=4")
    done = dppo("train", continuous / "continuous.gin", "--workdir", tmp_path / "run", *flags)
    assert done.status == 0, done.err
    for ours, theirs in zip(numbers(tmp_path / "run"), whole, strict=True):
        assert {name: value or 0.0 for name, value in ours.items()} == pytest.approx(
            {name: value or 0.0 for name, value in theirs.items()}, rel=1e-3, abs=1e-5
        )


def test_the_engine_replays_what_it_truncated(dppo, continuous, tmp_path):
    done = dppo(
        "train", continuous / "continuous.gin", "--workdir", tmp_path / "run", "--gin.STEPS=1",
        "--gin.generate.SamplingConfig.top_p=0.7",
    )  # fmt: skip
    assert done.status == 0, done.err
    (line,) = numbers(tmp_path / "run")
    assert line["mismatch/logp_abs_max"] < 1e-4 and 1 <= line["truncation/kept"] <= 4


def test_what_the_engine_cannot_do_is_said_at_once(dppo, continuous, tmp_path):
    flag, message = "--gin.engine.EngineConfig.max_context=13", "max_context=13 is less than max_p"
    done = dppo("train", continuous / "continuous.gin", "--workdir", tmp_path / "run", flag)
    assert done.status == 2 and message in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
