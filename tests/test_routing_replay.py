"""Routing replay: what the sampler or the scorer recorded decides, and the router still learns."""

import dataclasses
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_collect import Words

from dppo_jax.batches import make_batch_of
from dppo_jax.metrics import reduce_metrics
from dppo_jax.models.block import normed
from dppo_jax.models.decoder import Decoder, DecoderConfig, Model, rope_tables
from dppo_jax.models.moe import differing_choices, route, stored_ids
from dppo_jax.objectives import dppo_binary_tv
from dppo_jax.records import Batch
from dppo_jax.sampling.engine import Engine, EngineConfig
from dppo_jax.sampling.generate import SamplingConfig, generate
from dppo_jax.sampling.requests import Completion, SamplingParams, Timings
from dppo_jax.sampling.rollouts import Continuous, RolloutContext, from_completions
from dppo_jax.scoring import score_and_routing, with_own_routing
from dppo_jax.sharding import MeshConfig
from dppo_jax.update import init_state, make_update

SETTINGS = SamplingConfig(
    max_new_tokens=7, samples_per_prompt=2, top_k_capture=3, end_ids=(3, 11), record_experts=True
)


@pytest.fixture(scope="module")
def mixture():
    config = DecoderConfig(
        vocab_size=37,
        width=12,
        layers=2,
        heads=2,
        kv_heads=1,
        head_size=4,
        mlp_width=6,
        experts=5,
        experts_per_token=2,
        normalised_gates=True,
    )
    model = Model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    return model, jax.tree.map(lambda p: p * 1.6, params)


@pytest.fixture(scope="module")
def rollout(mixture, prompts):
    return generate(*mixture, prompts, jax.random.key(2), settings=SETTINGS)


@pytest.fixture(scope="module")
def moved(mixture):
    """Other routers: they choose other experts."""
    _, params = mixture
    router = params["blocks"]["router"]
    noise = jax.random.normal(jax.random.key(5), router.shape)
    return params | {"blocks": params["blocks"] | {"router": router + 0.3 * noise}}


@pytest.fixture(scope="module")
def scored(mixture):
    """(parameters, rollout) -> (log-probabilities, routing, gradient of their sum)."""
    model, _ = mixture

    def total(params, rollout):
        stats, routing = score_and_routing(model, params, rollout, temperature=1.0)
        logp = jnp.where(rollout.response_mask, stats.logp, 0.0)
        return jnp.sum(jnp.sin(logp)), (logp, routing)

    jitted = jax.jit(jax.value_and_grad(total, has_aux=True))

    def run(params, rollout):
        (_, (logp, routing)), gradient = jitted(params, rollout)
        return logp, routing, gradient

    return run


def unrecorded(rollout):
    return dataclasses.replace(rollout, prompt_experts=None, experts=None)


def forgotten(rollout):
    """Nothing recorded of any token: the routers choose."""
    prompts, responses = (jnp.full_like(e, -1) for e in (rollout.prompt_experts, rollout.experts))
    return dataclasses.replace(rollout, prompt_experts=prompts, experts=responses)


class Rows(NamedTuple):
    """Each prompt and response as one row, real tokens first."""

    tokens: np.ndarray  # [B, S]
    experts: np.ndarray  # [B, S, layers, k], -1 where none is recorded
    asked: np.ndarray  # [B]: tokens of the prompt
    lengths: np.ndarray  # [B]


@pytest.fixture(scope="module")
def rows(rollout) -> Rows:
    samples = len(rollout.response_tokens) // len(rollout.prompt_tokens)

    def side_by_side(prompts, responses):
        prompts, responses = np.asarray(prompts), np.asarray(responses)
        return np.concatenate([np.repeat(prompts, samples, axis=0), responses], axis=1)

    mask = side_by_side(rollout.prompt_mask, rollout.response_mask)
    order = np.argsort(~mask, axis=1, kind="stable")
    tokens = side_by_side(rollout.prompt_tokens, rollout.response_tokens)
    experts = side_by_side(rollout.prompt_experts, rollout.experts)
    asked = np.repeat(np.asarray(rollout.prompt_mask).sum(1), samples)
    at = np.arange(len(mask))[:, None]
    return Rows(tokens[at, order], experts[at, order], asked, mask.sum(1))


def plain_logp(decoder: Decoder, tokens, experts):
    """log π of each token after the first, every expert run on every token, and the experts that
    the routers would choose; those of `experts` that are not negative take their place."""
    c, chosen = decoder.config, []
    length = len(tokens)
    rope = rope_tables(c, length)[0]
    x = decoder.embed(tokens)
    causal = jnp.tril(jnp.ones((length, length), bool))
    for i in range(c.layers):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], decoder.blocks)
        q, k, v = block.queries_keys_values(x, rope)
        k, v = (jnp.repeat(t, c.heads // c.kv_heads, axis=1) for t in (k, v))
        scores = jnp.einsum("shd,thd->hst", q, k) * c.head_size**-0.5
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
        attended = jnp.einsum("hst,thd->shd", weights, v).reshape(length, -1)
        x = x + attended @ block.o[...]
        y = normed(c, x, block.mlp_norm)
        p = jax.nn.softmax(y @ block.router[...], axis=-1)
        native = jnp.argsort(-p, axis=-1)[:, : c.experts_per_token]
        ids = jnp.where(experts[:, i] < 0, native, experts[:, i])
        gates = jnp.where(jax.nn.one_hot(ids, c.experts).sum(1) > 0, p, 0.0)
        gates /= gates.sum(-1, keepdims=True)
        opened = jax.nn.silu(jnp.einsum("nd,edf->nef", y, block.gate[...]))
        hidden = opened * jnp.einsum("nd,edf->nef", y, block.up[...])
        x = x + jnp.einsum("ne,nef,efd->nd", gates, hidden, block.down[...])
        chosen.append(native)
    logp = jax.nn.log_softmax(decoder.logits(decoder.normed(x)))
    return logp[jnp.arange(length - 1), tokens[1:]], jnp.stack(chosen, axis=1)


@pytest.fixture(scope="module")
def plain(mixture, rows):
    """(parameters, experts) -> (sum as `scored` has it, (log-probabilities, choices)), gradient."""
    model, _ = mixture
    columns = np.arange(rows.tokens.shape[1] - 1)
    answered = (columns >= rows.asked[:, None] - 1) & (columns < rows.lengths[:, None] - 1)

    def total(params, experts):
        decoder = model.bind(params)
        logp, chosen = jax.vmap(lambda *row: plain_logp(decoder, *row))(rows.tokens, experts)
        logp = jnp.where(answered, logp, 0.0)
        return jnp.sum(jnp.sin(logp)), (logp, chosen)

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def test_the_sampler_records_the_experts_of_every_fed_token(mixture, rollout, rows, plain):
    _, params = mixture
    assert rollout.experts.dtype == rollout.prompt_experts.dtype == jnp.int8
    assert rollout.experts.shape == (6, 7, 2, 2)
    (_, (_, native)), _ = plain(params, -np.ones_like(rows.experts))
    recorded = rows.experts >= 0
    np.testing.assert_array_equal(
        np.sort(rows.experts), np.sort(np.where(recorded, native, -1).astype(np.int8))
    )
    # Every token that another one follows, no padding, no last token.
    expected = np.arange(rows.tokens.shape[1]) < rows.lengths[:, None] - 1
    assert (recorded.all((2, 3)) == expected).all() and (recorded.any((2, 3)) == expected).all()


def test_replay_of_the_same_parameters_changes_nothing(mixture, rollout, scored):
    _, params = mixture
    native, nothing, native_gradient = scored(params, forgotten(rollout))
    replayed, routing, gradient = scored(params, rollout)
    assert nothing["routing/differing_fraction"].count == 0
    np.testing.assert_allclose(replayed, native, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(*map(jax.tree.leaves, (gradient, native_gradient)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(replayed, rollout.logp_rollout, atol=2e-5)
    assert reduce_metrics(routing)["routing/differing_fraction"] == 0.0


def test_moved_routers_are_overruled_in_values_and_gradients(rollout, rows, moved, scored, plain):
    logp, routing, gradient = scored(moved, rollout)
    native, _, _ = scored(moved, forgotten(rollout))
    assert np.abs(logp - native).max() > 1e-2  # the routers would have chosen otherwise
    (_, (theirs, chosen)), their_gradient = plain(moved, rows.experts)
    for row, (first, end) in enumerate(zip(rows.asked, rows.lengths, strict=True)):
        np.testing.assert_allclose(
            logp[row, : end - first], theirs[row, first - 1 : end - 1], atol=2e-5
        )
    for ours, other in zip(*map(jax.tree.leaves, (gradient, their_gradient)), strict=True):
        np.testing.assert_allclose(ours, other, atol=2e-5 * np.abs(other).max())
    assert np.abs(gradient["blocks"]["router"]).max() > 1e-3

    differing = recorded = 0
    for row, (first, end) in enumerate(zip(rows.asked, rows.lengths, strict=True)):
        start = first if row % SETTINGS.samples_per_prompt else 0  # a prompt counts once
        for ours, other in zip(
            rows.experts[row, start : end - 1].reshape(-1, 2).tolist(),
            np.asarray(chosen[row, start : end - 1]).reshape(-1, 2).tolist(),
            strict=True,
        ):
            differing += len(set(ours) - set(other))
            recorded += 2
    assert 0 < differing < recorded
    counted = routing["routing/differing_fraction"]
    assert (int(counted.sum), int(counted.count)) == (differing, recorded)


def test_choices_that_differ_are_counted_as_sets():
    """By hand: {1, 2} against {2, 1}, {0, 3} against {3, 4}, {0, 1} against {2, 3}, and a token of
    which nothing is recorded."""
    recorded = jnp.array([[1, 2], [0, 3], [0, 1], [-1, -1]], jnp.int8)
    native = jnp.array([[2, 1], [3, 4], [2, 3], [0, 1]], jnp.int8)
    differing, known = differing_choices(recorded, native)
    assert differing.tolist() == [0, 1, 2, 0]
    assert known.tolist() == [2, 2, 2, 0]


@pytest.mark.parametrize("normalised", [True, False])
def test_gates_by_hand(normalised):
    """p = (1, 2, 3, 4)/10: experts 0 and 2 replayed weigh 0.1 and 0.3, or 1/4 and 3/4."""
    router = jnp.log(jnp.array([[1.0, 2.0, 3.0, 4.0]]))
    replayed = jnp.array([[0, 2], [-1, -1]], jnp.int8)
    routing = route(jnp.ones((2, 1)), router, 2, normalised, replayed)
    assert routing.chosen.tolist() == [[0, 2], [3, 2]]
    assert routing.native.tolist() == [[3, 2], [3, 2]]
    expected = [[0.25, 0.75], [4 / 7, 3 / 7]] if normalised else [[0.1, 0.3], [0.4, 0.3]]
    np.testing.assert_allclose(routing.gates, expected, rtol=1e-6)


def test_gates_of_impossible_experts_are_finite():
    """Recorded experts that this router gives no weight at all."""
    router = jnp.array([[0.0, -400.0, -401.0]])
    routing = route(jnp.ones((1, 1)), router, 2, True, jnp.array([[1, 2]], jnp.int8))
    np.testing.assert_allclose(routing.gates, [[1 / (1 + np.exp(-1)), 1 / (1 + np.e)]], rtol=1e-6)


def test_ids_are_stored_in_what_holds_them():
    assert (stored_ids(128), stored_ids(129)) == (jnp.int8, jnp.int16)


def test_updates_replay_either_record(mixture, rollout, moved, scored):
    """R2 records what the scorer chose before the update; microbatches count as the whole does."""
    model, _ = mixture
    objective, optimizer = dppo_binary_tv(), optax.sgd(0.1)
    batch_of = make_batch_of(
        model, objective, lambda rewards: rewards, temperature=1.0, replay_own_routing=True
    )
    state = init_state(jax.tree.map(jnp.copy, moved), optimizer)
    batch, _ = batch_of(state, None, unrecorded(rollout), jnp.arange(6.0).reshape(3, 2) - 2.0)
    native, _, _ = scored(moved, forgotten(rollout))
    again, routing, _ = scored(moved, batch.rollout)
    np.testing.assert_allclose(again, native, rtol=1e-6, atol=1e-6)
    assert reduce_metrics(routing)["routing/differing_fraction"] == 0.0
    np.testing.assert_array_equal(batch.rollout.experts >= 0, rollout.experts >= 0)
    np.testing.assert_array_equal(batch.rollout.prompt_experts >= 0, rollout.prompt_experts >= 0)

    update = make_update(model, objective, optimizer, temperature=1.0, microbatches=3)
    for each in (batch, Batch(rollout, batch.advantages)):
        state = init_state(jax.tree.map(jnp.copy, moved), optimizer)
        after, metrics = update(state, each)
        assert np.abs(after.params["blocks"]["router"] - moved["blocks"]["router"]).max() > 1e-4
        _, whole, _ = scored(moved, each.rollout)
        for name in ("routing/differing_fraction", "mismatch/experts"):
            assert metrics[name] == whole[name]
    assert whole["mismatch/experts"].sum > 0


def test_no_record_no_metrics(mixture, rollout):
    model, params = mixture
    routing = jax.eval_shape(
        lambda p, r: score_and_routing(model, p, r, temperature=1.0)[1], params, unrecorded(rollout)
    )
    assert routing.keys() == {"moe/aux_loss", "moe/max_load"}


MIXTURE = """
from __gin__ import dynamic_registration
from dppo_jax import train
from dppo_jax.models import decoder
include "{toy}"
STEPS = 2
decoder.DecoderConfig.experts = 4
decoder.DecoderConfig.experts_per_token = 2
train.train.eval_prompts = 4
"""


def test_a_recipe_chooses(dppo, toy_recipe, tmp_path):
    recipe = tmp_path / "mixture.gin"
    recipe.write_text(MIXTURE.format(toy=toy_recipe))
    result = dppo("train", recipe, "--workdir", tmp_path / "a", "--gin.train.train.routing=replay")
    assert result.status == 0, result.err
    lines = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert 0 <= line["mismatch/experts"] < 0.01  # rounding alone
        assert 0 <= line["routing/differing_fraction"] < 0.2
    result = dppo(
        "train", toy_recipe, "--workdir", tmp_path / "b", "--gin.train.train.routing=replay"
    )
    assert result.status == 2
    assert 'routing="replay" needs a model with experts' in result.err
    result = dppo("train", recipe, "--workdir", tmp_path / "b", "--gin.train.train.routing=r3")
    assert result.status == 2 and "routing" in result.err
    assert not (tmp_path / "b").exists()


def test_the_engine_records_what_the_scorer_would_choose(mixture, prompts):
    """Six samples on four slots, in chunks of two tokens: as the scorer routes the same tokens.

    A prompt's samples share its computation, and one is taken out and put back.
    """
    model, params = mixture
    mesh = MeshConfig().build()
    config = EngineConfig(slots=4, max_context=16, chunk=2, page_size=4, prefill_buckets=(16,))
    context = RolloutContext(model, mesh, Words(), prompts.tokens.shape[1], SETTINGS)
    source = Continuous(context, config)
    drawn = source.rollout(params, prompts, jax.random.key(4), SETTINGS)
    own = with_own_routing(model, params, unrecorded(drawn))
    np.testing.assert_array_equal(drawn.prompt_experts, own.prompt_experts)
    np.testing.assert_array_equal(drawn.experts, own.experts)
    assert drawn.experts.dtype == stored_ids(5) and np.any(np.asarray(drawn.experts) >= 0)
    engine = source.engine(params, SETTINGS)
    asked = SamplingParams(max_new_tokens=5, seed=3)
    [[whole]] = engine.generate(params, [[5, 6, 7]], asked)
    engine.submit([5, 6, 7], asked)
    engine.advance(params)
    engine.resume(*engine.take_unfinished())
    events = []
    while engine.pending:
        events += engine.advance(params)
    resumed = events[-1].completion
    np.testing.assert_array_equal(resumed.tokens, whole.tokens)
    assert whole.experts.shape == (5, 2, 2) and whole.prompt_experts.shape == (3, 2, 2)
    np.testing.assert_array_equal(resumed.experts, whole.experts)
    np.testing.assert_array_equal(resumed.prompt_experts, whole.prompt_experts)


def test_experts_that_nobody_records(mixture, tiny, prompts):
    with pytest.raises(ValueError, match="this model has no experts"):
        Engine(tiny[0], EngineConfig(record_experts=True, prefix_cache=False))
    with pytest.raises(ValueError, match="set prefix_cache to False"):
        EngineConfig(record_experts=True)
    ids, floats = np.zeros(1, np.int32), np.zeros(1, np.float32)
    topk = np.zeros((1, 3), np.int32), np.zeros((1, 3), np.float32)
    foreign = Completion(ids, floats, *topk, floats, ids, 0, Timings(0.0, 0.0, 0.0))
    mesh = MeshConfig().build()
    with pytest.raises(ValueError, match="the sampler does not record experts: set routing"):
        from_completions(prompts, [foreign] * 2 * len(prompts.tokens), SETTINGS, mesh)
