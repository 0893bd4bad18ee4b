"""Samples carried over from step to step: whose they are, what is kept, what a resumption does."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_collect import Words
from test_rollout_source import CONTINUOUS, numbers

from dppo_jax.collect import Asking
from dppo_jax.elsewhere import Elsewhere
from dppo_jax.partial_rollouts import PartialCollector, PartialRollouts, check_partial
from dppo_jax.prompts.examples import Example
from dppo_jax.prompts.pipeline import PromptIterator
from dppo_jax.rewards.verdicts import Verdict
from dppo_jax.sampling.engine import EngineConfig
from dppo_jax.sampling.generate import SamplingConfig
from dppo_jax.sampling.rollouts import Continuous, Lockstep, RolloutContext, request_of
from dppo_jax.sharding import MeshConfig
from dppo_jax.timing import Stopwatch

MESH = MeshConfig().build()
SETTINGS = SamplingConfig(
    max_new_tokens=9, samples_per_prompt=2, top_k_capture=2, end_ids=(3, 4, 5, 6, 7)
)
STEPS, PROMPTS, EXTRA = 4, 2, 2


def length_of_text(example, response, finished):
    return Verdict(float(len(response.split())), response, "")


@pytest.fixture(scope="module")
def source(tiny):
    config = EngineConfig(slots=3, max_context=16, chunk=2, page_size=8, prefill_buckets=(16,))
    context = RolloutContext(tiny[0], MESH, Words(), 1, SETTINGS)
    return Continuous(context, config)


def collector(source):
    examples = [Example(str(n), str(n + 8), "", "") for n in range(24)]
    prompts = PromptIterator(
        examples, Words(), prompts_per_step=PROMPTS, max_prompt_tokens=1, seed=1
    )
    asking = Asking(MESH, Words(), length_of_text, SETTINGS, PROMPTS)
    return PartialCollector(source, prompts, asking, PartialRollouts(EXTRA)), prompts


@pytest.fixture(scope="module")
def collected(source, tiny):
    """Four steps with parameters that do not change, and what was in flight after each."""
    made, prompts = collector(source)
    steps, flight = [], []
    for step in range(STEPS):
        steps.append(made(tiny[1], jax.random.key(step), Stopwatch(), version=step))
        flight.append([Example(*fields).id for fields in json.loads(json.dumps(made.carried()))])
    return steps, flight, prompts


def rows(step):
    """(prompt, tokens, versions) of each response."""
    r = jax.tree.map(np.asarray, vars(step.rollout))
    for row, mask in enumerate(r["response_mask"]):
        prompt = int(r["prompt_tokens"][row // 2, -1])
        yield prompt, r["response_tokens"][row, mask].tolist(), r["policy_version"][row, mask]


def test_a_carried_sample_is_the_one_that_would_have_been(collected, source, tiny):
    """The same tokens as if nobody had interrupted it, though steps of other requests passed."""
    steps, flight, _ = collected
    engine = source.engine(tiny[1], SETTINGS)
    expected, stream = {}, iter(collector(source)[1].take(24).examples)
    for number, step in enumerate(steps):
        for place in range(int(step.numbers["prompts/consumed"])):
            prompt = int(next(stream).prompt)
            request = request_of(SETTINGS, jax.random.key(number), place)
            (answers,) = engine.generate(tiny[1], [[prompt]], request)
            expected[prompt] = [answer.tokens.tolist() for answer in answers]
    seen = [row for step in steps for row in rows(step)]
    assert len(seen) == STEPS * PROMPTS * 2
    for prompt in {prompt for prompt, _, _ in seen}:
        assert [tokens for p, tokens, _ in seen if p == prompt] == expected[prompt]


def test_tokens_keep_the_version_that_drew_them(collected):
    steps, flight, _ = collected
    mixed = 0
    for number, step in enumerate(steps):
        ages = []
        for prompt, _, versions in rows(step):
            assert (np.diff(versions) >= 0).all() and versions[-1] <= number
            mixed += len(set(versions.tolist())) > 1
            ages += (number - versions).tolist()
            if number and str(prompt - 8) not in flight[number - 1]:
                assert set(versions.tolist()) == {number}  # asked in this step
        assert step.numbers["staleness/mean"] == pytest.approx(np.mean(ages))
        assert step.numbers["staleness/max"] == max(ages)
        assert step.numbers["staleness/share"] == pytest.approx(np.mean(np.array(ages) > 0))
        assert step.numbers["groups/carried"] == len(flight[number]) <= PROMPTS + EXTRA
    assert mixed > 0 and steps[0].numbers["staleness/max"] == 0


def test_a_step_ends_with_enough_groups_and_asks_no_prompt_twice(collected):
    steps, flight, prompts = collected
    consumed = [int(step.numbers["prompts/consumed"]) for step in steps]
    assert consumed[0] == PROMPTS + EXTRA and consumed[1:] == [PROMPTS] * 3
    trained = [example.id for step in steps for example in step.examples]
    assert len(set(trained)) == STEPS * PROMPTS and not set(trained) & set(flight[-1])
    assert prompts.get_state()["ahead"] == EXTRA
    lengths = np.asarray(steps[1].rollout.response_mask).sum(axis=1).reshape(PROMPTS, 2)
    assert np.array_equal(np.asarray(steps[1].rewards), lengths)


def test_prompts_in_flight_are_asked_again_after_a_resumption(collected, source, tiny):
    """What was drawn for them is gone; no prompt is."""
    _, flight, prompts = collected
    made, position = collector(source)
    position.set_state(json.loads(json.dumps(prompts.get_state())))
    made.carry([[name, str(int(name) + 8), "", ""] for name in flight[-1]])
    assert [fields[0] for fields in made.carried()] == flight[-1]
    step = made(tiny[1], jax.random.key(9), Stopwatch(), version=4)
    asked = {e.id for e in step.examples} | {fields[0] for fields in made.carried()}
    assert asked >= set(flight[-1]) and step.numbers["staleness/max"] == 0
    assert int(step.numbers["prompts/consumed"]) == PROMPTS + EXTRA


def test_what_does_not_go_together(source, tiny, monkeypatch):
    context = RolloutContext(tiny[0], MESH, Words(), 1, SETTINGS)
    with pytest.raises(ValueError, match="bind train.train.rollouts = @rollouts.continuous()"):
        check_partial(Lockstep(context), None, 1)
    with pytest.raises(ValueError, match="neither dynamic_sampling nor rollout_batches"):
        check_partial(source, None, 2)
    apart = Elsewhere(lambda _: source, context, jax.devices()[:1])
    with pytest.raises(ValueError, match="set sampler_devices to 0"):
        check_partial(apart, None, 1)
    with pytest.raises(ValueError, match="extra_prompts=0"):
        PartialRollouts(0)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="partial_rollouts works in one process"):
        check_partial(source, None, 1)


PARTIAL = """
from dppo_jax import partial_rollouts
train.train.partial_rollouts = @partial_rollouts.PartialRollouts()
partial_rollouts.PartialRollouts.extra_prompts = 4
"""


def test_a_run_with_partial_rollouts(dppo, toy_recipe, tmp_path):
    """It trains, is on policy only where tokens are new, and goes on from a checkpoint."""
    recipe, run = tmp_path / "partial.gin", tmp_path / "run"
    recipe.write_text(CONTINUOUS.format(toy=toy_recipe) + PARTIAL)
    done = dppo("train", recipe, "--workdir", run)
    assert done.status == 0 and "recompiled" not in done.out, done.err
    written = numbers(run)
    assert written[0]["mismatch/logp_abs_max"] < 1e-4 < written[-1]["mismatch/logp_abs_max"]
    assert max(line["staleness/max"] for line in written) >= 1
    shutil.rmtree(run / "checkpoints" / "4")
    (run / "summary.json").unlink()
    done = dppo("train", recipe, "--workdir", run)
    assert done.status == 0 and "after step 2 of 4" in done.out, done.err
    again = numbers(run)
    assert again[:2] == written[:2] and again[2]["staleness/max"] == 0
    assert again[2]["prompts/consumed"] == 12 and jnp.isfinite(again[3]["loss/total"])
