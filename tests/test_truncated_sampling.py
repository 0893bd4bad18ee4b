"""Training on tokens that top-k, top-p or min-p truncated: the kept sets recorded and replayed."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_jax import objectives
from dppo_jax.divergence import exact_kl, exact_tv
from dppo_jax.kernels.drawing import draw, numbers
from dppo_jax.kernels.filters import Filters, RowFilters
from dppo_jax.models.decoder import response_states
from dppo_jax.records import Batch, Rollout, TokenStats
from dppo_jax.sampling.engine import Engine, EngineConfig
from dppo_jax.sampling.generate import SamplingConfig, generate
from dppo_jax.sampling.requests import SamplingParams
from dppo_jax.scoring import kept_sizes, loss_and_score, renormalised, score, tightness

TEMPERATURE = 0.9
TRUNCATED = SamplingConfig(
    max_new_tokens=6,
    samples_per_prompt=6,
    top_k_capture=20,
    temperature=TEMPERATURE,
    top_p=0.8,
    end_ids=(3,),
)


# ---- what is drawn and recorded ---------------------------------------------------------------


def test_at_most_the_recorded_tokens_are_kept():
    """Uniform over 9 of 23: all tie, so the filter alone would keep 9; replay keeps the first 4."""
    z = jnp.where(jnp.arange(23) % 5 < 2, 2.0, -1.0)
    rows = jnp.broadcast_to(z, (500, 23))
    free = draw(rows, numbers(jax.random.key(0), 500), 1.0, 4, Filters(top_p=0.5))
    out = draw(rows, numbers(jax.random.key(0), 500), 1.0, 4, Filters(top_p=0.5), replay=True)
    assert len(np.unique(free.token)) > 4 and free.kept_count is None
    assert np.unique(out.token).tolist() == [0, 1, 5, 6] == out.topk_ids[0].tolist()
    np.testing.assert_allclose(out.logp, np.log(0.25), rtol=1e-6)
    np.testing.assert_allclose(out.entropy, np.log(4), rtol=1e-6)
    assert (out.kept_count == 4).all()


def test_rows_without_a_filter_are_not_cut():
    """By the row, and with room for more than is kept."""
    z = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (23,)), (3, 23))
    filters = RowFilters(jnp.array([0, 2, 0]), jnp.array([1.0, 1.0, 0.4]), jnp.zeros(3))
    keys = jax.random.split(jax.random.key(0), 3)
    out = draw(z, numbers(keys, 3), jnp.ones(3), 5, filters, replay=True)
    assert out.kept_count[:2].tolist() == [0, 2] and 1 <= out.kept_count[2] <= 5
    np.testing.assert_allclose(
        out.topk_logp[0], jax.nn.log_softmax(z[0])[out.topk_ids[0]], rtol=1e-5
    )
    assert (np.isfinite(out.topk_logp).sum(axis=1) == [5, 2, out.kept_count[2]]).all()


# ---- renormalising ----------------------------------------------------------------------------


def test_by_hand():
    """Kept probabilities 0.4, 0.1 of a policy: 0.8 and 0.2 of what they hold."""
    logp = jnp.log(jnp.array([[[0.1, 0.4, 0.1, 0.3]]]))
    stats = renormalised(logp, jnp.array([[2]]))
    np.testing.assert_allclose(np.exp(stats.logp), [[0.2]], rtol=1e-6)
    np.testing.assert_allclose(np.exp(stats.topk_logp), [[[0.8, 0.2, 0.0]]], rtol=1e-6)
    np.testing.assert_allclose(stats.entropy, [[-0.8 * np.log(0.8) - 0.2 * np.log(0.2)]], rtol=1e-6)
    one = renormalised(logp, jnp.array([[1]]))  # a certain token: no digits, no gradient
    assert one.topk_logp[0, 0, 0] == 0 and one.entropy[0, 0] == 0


def renormalised_rows(z, token, ids, counts, shift):
    chosen = jnp.take_along_axis(z, jnp.concatenate([token, ids], axis=1), axis=1) + shift
    stats = renormalised(chosen[:, None], counts[:, None])
    columns = jnp.where(jnp.arange(5) < counts[:, None], stats.topk_logp[:, 0], 0.0)
    return jnp.concatenate([stats.logp, stats.entropy, columns], axis=1)


def masked_softmax(z, token, ids, counts, shift):
    kept = jnp.arange(5) < counts[:, None]
    inside = jnp.zeros((4, 11), bool).at[jnp.arange(4)[:, None], ids].set(kept)
    logp = jax.nn.log_softmax(jnp.where(inside, z, -1e30))
    entropy = -jnp.sum(jnp.exp(logp) * logp, axis=1, keepdims=True)
    stored = jnp.where(kept, jnp.take_along_axis(logp, ids, axis=1), 0.0)
    return jnp.concatenate([jnp.take_along_axis(logp, token, axis=1), entropy, stored], axis=1)


@partial(jax.jit, static_argnums=0)
def value_and_gradient(form, weights, z, *more):
    value, pullback = jax.vjp(lambda z: form(z, *more), z)
    return value, *pullback(weights)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31), shift=st.sampled_from([0.0, -40.0, 300.0]))
def test_values_and_gradients_are_those_of_the_masked_softmax(seed, shift):
    rng = np.random.default_rng(seed)
    z = (rng.normal(size=(4, 11)) * 3).astype("float32")
    counts = rng.integers(1, 6, size=4)
    ids = np.argsort(-z, axis=1)[:, :5]
    token = np.take_along_axis(ids, rng.integers(0, counts)[:, None], axis=1)
    weights = rng.normal(size=(4, 7)).astype("float32")
    tolerance = dict(rtol=1e-4, atol=1e-5 + abs(shift) * 1e-6)
    arrays = weights, z, token, ids, counts, np.float32(shift)
    forms = renormalised_rows, masked_softmax
    ours, plain = (value_and_gradient(form, *arrays) for form in forms)
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


# ---- a policy that trains on what it sampled --------------------------------------------------


@pytest.fixture(scope="module")
def rollout(tiny, prompts):
    return generate(*tiny, prompts, jax.random.key(2), settings=TRUNCATED)


score_of = jax.jit(partial(score, temperature=TEMPERATURE), static_argnums=0)


@pytest.fixture(scope="module")
def scored(tiny, rollout):
    return score_of(*tiny, rollout)


def test_on_policy_ratios_are_one(tiny, rollout, scored):
    """And without replay the half of them leave [0.9, 1.1]."""
    mask = np.asarray(rollout.response_mask)

    def ratios(stats):
        return np.exp(np.asarray(stats.logp - rollout.logp_rollout))[mask]

    np.testing.assert_allclose(ratios(scored), 1, atol=1e-4)
    np.testing.assert_allclose(
        np.asarray(scored.entropy)[mask], np.asarray(rollout.entropy_rollout)[mask], atol=1e-4
    )
    ours, theirs = np.asarray(scored.topk_logp), np.asarray(rollout.topk_logp_rollout)
    np.testing.assert_array_equal(np.isfinite(ours)[mask], np.isfinite(theirs)[mask])
    np.testing.assert_allclose(np.exp(ours[mask]), np.exp(theirs[mask]), atol=1e-5)
    forgotten = dataclasses.replace(rollout, kept_count=None)
    unscored = ratios(score_of(*tiny, forgotten))
    assert np.mean((unscored < 0.9) | (unscored > 1.1)) >= 0.5
    sizes = kept_sizes(rollout)
    assert 1 < sizes["truncation/kept"].sum / mask.sum() < 20
    assert kept_sizes(forgotten) == {}


def test_the_engine_records_kept_sets_too(tiny, prompts):
    """And a request without a filter in the same batch is drawn from the whole vocabulary."""
    model, params = tiny
    engine = Engine(
        model,
        EngineConfig(
            slots=4, max_context=16, chunk=4, page_size=8, prefill_buckets=(16,),
            top_k_capture=20, replay=True,
        ),
    )  # fmt: skip
    asked = [
        np.asarray(row)[np.asarray(mask)]
        for row, mask in zip(prompts.tokens, prompts.mask, strict=True)
    ]
    cut = SamplingParams(max_new_tokens=6, temperature=TEMPERATURE, top_p=0.8)
    each = [cut, cut, dataclasses.replace(cut, top_p=1.0)]
    done = [completions[0] for completions in engine.generate(params, asked, each)]
    assert (done[2].kept_count == 0).all()
    for of in done[:2]:
        assert (of.kept_count == np.isfinite(of.topk_logp).sum(axis=1)).all()
    drawn = Rollout(
        prompt_tokens=prompts.tokens[:2],
        prompt_mask=prompts.mask[:2],
        response_mask=jnp.ones((2, 6), bool),
        finish_reason=jnp.zeros((2,), jnp.int32),
        **{
            name: jnp.stack([getattr(of, field) for of in done[:2]])
            for name, field in {
                "response_tokens": "tokens", "logp_rollout": "logp", "topk_ids": "topk_ids",
                "topk_logp_rollout": "topk_logp", "entropy_rollout": "entropy",
                "kept_count": "kept_count", "policy_version": "policy_version",
            }.items()
        },
    )  # fmt: skip
    stats = score_of(model, params, drawn)
    np.testing.assert_allclose(stats.logp, drawn.logp_rollout, atol=1e-4)


@pytest.fixture(scope="module")
def moved(tiny):
    """The policy some steps later."""
    rng = np.random.default_rng(9)
    return jax.tree.map(
        lambda leaf: leaf + 0.05 * rng.normal(size=leaf.shape).astype(np.float32), tiny[1]
    )


@partial(jax.jit, static_argnums=0)
def plain_score(model, params, rollout):
    """Log-probabilities [B, T, V] over the kept set of each token, from all logits at once."""
    decoder = model.bind(params)
    hidden, *_ = response_states(
        decoder, rollout.prompt_tokens, rollout.prompt_mask,
        rollout.response_tokens, rollout.response_mask,
    )  # fmt: skip
    z = hidden @ decoder.unembedding_matrix().T / TEMPERATURE
    order = jnp.arange(rollout.topk_ids.shape[-1])
    listed = (order < rollout.kept_count[..., None])[..., None]
    kept = jnp.any(listed & (rollout.topk_ids[..., None] == jnp.arange(z.shape[-1])), axis=2)
    kept = kept | (rollout.kept_count == 0)[..., None]
    return jax.nn.log_softmax(jnp.where(kept, z, -1e30))


def test_loss_and_gradient_are_those_of_the_renormalised_policy(tiny, moved, rollout):
    """Two passes, one pass, and all logits at once; with an entropy bonus, past the first step."""
    model, _ = tiny
    objective = objectives.with_entropy_bonus(objectives.dppo_topk_kl(delta=0.02), coefficient=0.3)
    shape = rollout.response_tokens.shape
    advantages = jnp.where(rollout.response_mask, jax.random.normal(jax.random.key(4), shape), 0)
    batch = Batch(rollout, advantages)

    def two_passes(params):
        stats = score(model, params, rollout, temperature=TEMPERATURE)
        return objective.loss(stats, batch).loss_sum, stats

    def one_pass(params):
        options = dict(temperature=TEMPERATURE)
        return loss_and_score(model, params, batch, objective.token_local, **options)[:2]

    def plain(params):
        logp = plain_score(model, params, rollout)
        stored = jnp.take_along_axis(logp, rollout.topk_ids, axis=-1)
        stats = TokenStats(
            logp=jnp.take_along_axis(logp, rollout.response_tokens[..., None], axis=-1)[..., 0],
            topk_logp=jnp.where(stored < -1e29, -jnp.inf, stored),
            entropy=-jnp.sum(jnp.exp(logp) * logp, axis=-1),
        )
        out = objective.loss(stats, batch)
        return out.loss_sum, (stats, out.metrics)

    with_gradient = (jax.jit(jax.value_and_grad(f, has_aux=True)) for f in
                     (two_passes, one_pass, plain))  # fmt: skip
    (two, one, all_at_once) = (f(moved) for f in with_gradient)
    (want, (stats, metrics)), gradient = all_at_once
    masked = metrics["mask/fraction"]
    assert 0 < masked.sum < masked.count, "the mask decides nothing here"
    mask = np.asarray(rollout.response_mask)
    for (value, ours), ours_gradient in (two, one):
        np.testing.assert_allclose(value, want, rtol=1e-4)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4),
            ours_gradient,
            gradient,
        )
        np.testing.assert_allclose(np.asarray(ours.logp)[mask], stats.logp[mask], atol=1e-4)


def test_exact_divergences_are_of_the_renormalised_policies(tiny, moved, rollout):
    model, params = tiny
    mask = np.asarray(rollout.response_mask)
    between = jax.jit(
        lambda now, then: score(
            model, now, rollout, temperature=TEMPERATURE, rollout_params=then
        )
    )(moved, params)  # fmt: skip
    both = [plain_score(model, p, rollout)[mask] for p in (params, moved)]
    np.testing.assert_allclose(between.exact_tv[mask], exact_tv(*both), atol=1e-5)
    np.testing.assert_allclose(between.exact_kl[mask], exact_kl(*both), rtol=1e-3, atol=1e-5)
    bounds = jax.jit(lambda *of: tightness(model, *of, temperature=TEMPERATURE))(
        params, moved, rollout
    )
    # the kept tokens are all recorded, so the Top-K form leaves nothing out
    for kind in ("tv", "kl"):
        total, exact = bounds[f"divergence/topk_{kind}_over_exact"]
        np.testing.assert_allclose(total, exact, rtol=1e-3)


def test_a_run_samples_from_the_nucleus(dppo, toy_recipe, tmp_path):
    finished = dppo(
        "train", toy_recipe, "--workdir", tmp_path / "run", "--gin.STEPS=1",
        "--gin.generate.SamplingConfig.top_p=0.7",
    )  # fmt: skip
    assert finished.status == 0, finished.err
    (row,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert row["mismatch/logp_abs_max"] < 1e-4
    assert 1 <= row["truncation/kept"] <= 4 and 0 <= row["truncation/at_capture"] <= 1
