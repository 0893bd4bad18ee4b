"""Objectives by hand: OBJECTIVES' table of masks, gradients, aggregations, metrics, extension."""

import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_jax import objectives as o
from dppo_jax.records import Mean, TokenStats

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS / "contracts"), str(TESTS / "golden")]

import check  # noqa: E402
from golden_files import read_cases, read_rows  # noqa: E402
from golden_modes import MODES  # noqa: E402
from objective_batches import (  # noqa: E402
    from_probabilities,
    loss_and_gradient,
    make_batch,
    scribble_padding,
)

# mu, pi, kept at A = +1 by (GRPO .2/.28, TV .15, TV .2, KL .05), and the same at A = -1
TABLE = [
    (0.5, 0.51, "1111", "1111"),
    (0.5, 0.62, "1111", "1111"),
    (0.5, 0.7, "00?0", "1111"),  # .7 - .5 against .2 is decided by rounding
    (0.9, 0.6, "1111", "0000"),
    (0.9, 0.74, "1111", "1010"),
    (0.01, 0.02, "0111", "1111"),
    (0.01, 0.2, "0010", "1111"),
    (0.2, 0.01, "1111", "0010"),
    (1e-4, 1e-6, "1111", "0111"),
    (0.999, 0.8, "1111", "1010"),
]
METHODS = [o.grpo_clip_higher(), o.dppo_binary_tv(), o.dppo_binary_tv(0.2), o.dppo_binary_kl()]


def kept(objective, mu, pi, advantages, old=None):
    """Which tokens have a gradient, as a string of 0 and 1."""
    _, gradient = loss_and_gradient(objective, *from_probabilities(mu, pi, advantages, old))
    return "".join("1" if g else "0" for g in np.asarray(gradient.logp)[0])


@pytest.mark.parametrize("column", range(4))
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_table_of_masks(column, sign):
    mu, pi, up, down = zip(*TABLE, strict=True)
    ours = kept(METHODS[column], mu, pi, [sign] * len(TABLE))
    expected = [(up if sign > 0 else down)[row][column] for row in range(len(TABLE))]
    assert [o for o, e in zip(ours, expected, strict=True) if e != "?"] == [
        e for e in expected if e != "?"
    ]


def test_weight_is_against_the_rollout_even_where_the_mask_is_not():
    """μ = .5, old = .2, π = .3: π/old = 1.5 is masked upwards, kept downwards with weight .6."""
    for objective in (o.minirl(), o.dppo_binary_tv(0.05, anchor=o.old_anchor)):
        batch = from_probabilities([0.5, 0.5], [0.3, 0.3], [1.0, -1.0], old=[0.2, 0.2])
        _, gradient = loss_and_gradient(objective, *batch)
        np.testing.assert_allclose(gradient.logp, [[0.0, 0.6]], rtol=1e-6)


def test_cap_scales_and_does_not_silence():
    stats, batch = from_probabilities([0.1, 0.1, 0.5], [0.8, 0.2, 0.4], [1.0, 1.0, 1.0])
    for objective, weights in [
        (o.pg_is(), [8.0, 2.0, 0.8]),
        (o.pg_tis(), [3.0, 2.0, 0.8]),
        (o.pg_tis(1.5), [1.5, 1.5, 0.8]),
    ]:
        result, gradient = loss_and_gradient(objective, stats, batch)
        np.testing.assert_allclose(gradient.logp, [-np.array(weights)], rtol=1e-5)
        expected = -np.dot(weights, np.log([0.8, 0.2, 0.4]))
        np.testing.assert_allclose(result.loss_sum, expected, rtol=1e-5)


def test_asymmetric_thresholds():
    """Up by .1 and down by .1: each side obeys its own threshold."""
    args = ([0.5, 0.5], [0.6, 0.4], [1.0, -1.0])
    assert kept(o.dppo_binary_tv(delta_low=0.05, delta_high=0.2), *args) == "10"
    assert kept(o.dppo_binary_tv(delta_low=0.2, delta_high=0.05), *args) == "01"
    assert kept(o.dppo_binary_tv(0.2, delta_low=0.05), *args) == "10"
    assert kept(o.grpo(delta_low=0.1, delta_high=0.3), *args) == "10"


def test_relaxed_clip_spares_rare_tokens():
    mu, pi = [0.05, 0.3, 0.05, 0.3], [0.1, 0.6, 0.01, 0.1]
    signs = [1.0, 1.0, -1.0, -1.0]
    assert kept(o.grpo_clip_higher(), mu, pi, signs) == "0000"
    assert kept(o.grpo_relaxed(), mu, pi, signs) == "1010"
    assert kept(o.grpo_relaxed(alpha_low=0.0), mu, pi, signs) == "1000"
    assert kept(o.grpo_relaxed(alpha_high=0.0), mu, pi, signs) == "0010"


def test_threshold_is_strict_and_a_measure_is_any_function():
    """A token exactly on the boundary is kept; the smallest step past it is not."""

    def quarter(stats, batch, anchor):
        return jnp.full(stats.logp.shape, 0.25)

    args = ([0.5, 0.5], [0.6, 0.4], [1.0, -1.0])
    assert kept(o.dppo(quarter, 0.25), *args) == "11"
    assert kept(o.dppo(quarter, 0.2499999), *args) == "00"


def test_zero_advantage_is_kept_and_not_counted():
    stats, batch = from_probabilities([0.9, 0.9], [0.1, 0.1], [0.0, -1.0])
    region = o.bounded(o.binary_tv_measure, delta_low=0.1, delta_high=0.1, anchor=o.rollout_anchor)
    assert region.decide(stats, batch).keep.tolist() == [[True, False]]
    metrics = o.dppo_binary_tv(0.1).loss(stats, batch).metrics
    assert metrics["mask/fraction"] == Mean(1.0, 1.0)
    assert metrics["mask/fraction_positive"] == Mean(0.0, 0.0)
    assert metrics["mask/fraction_negative"] == Mean(1.0, 1.0)


def test_gradient_through_a_softmax_is_that_of_the_weighted_probability_ratio():
    """Without cap the detached form has the gradient of -Σ A M π/μ, here by finite differences."""
    rng = np.random.default_rng(0)
    b, t, vocab = 2, 3, 5
    logits = rng.normal(size=(b, t, vocab))
    stats, batch = make_batch(b=b + 1, t=t, vocab=vocab, k=0)
    take = lambda tree: jax.tree.map(lambda leaf: leaf[:b], tree)  # noqa: E731
    stats, batch = take(stats), take(batch)
    full = jnp.ones((b, t), jnp.bool_)
    batch = replace(
        batch,
        rollout=replace(batch.rollout, response_mask=full),
        advantages=jnp.asarray([[1.3] * t, [-0.7] * t]),
    )
    tokens = np.asarray(batch.rollout.response_tokens)[..., None]
    objective = o.dppo_binary_tv(0.2)

    def logp_of(logits):
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
        return jnp.take_along_axis(log_probs, jnp.asarray(tokens), -1)[..., 0]

    def loss(logits):
        scored = TokenStats(logp_of(logits), stats.topk_logp, stats.entropy)
        return objective.loss(scored, batch).loss_sum

    region = o.bounded(o.binary_tv_measure, delta_low=0.2, delta_high=0.2, anchor=o.rollout_anchor)
    scored = TokenStats(logp_of(jnp.asarray(logits)), stats.topk_logp, stats.entropy)
    keep = np.asarray(region.decide(scored, batch).keep)
    assert keep.any() and not keep.all()

    def surrogate(logits):  # float64
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        ratio = np.exp(np.take_along_axis(log_probs, tokens, -1)[..., 0]) / np.exp(
            np.asarray(batch.rollout.logp_rollout, np.float64)
        )
        return -(np.asarray(batch.advantages, np.float64) * keep * ratio).sum()

    numeric = np.zeros_like(logits)
    for place in np.ndindex(*logits.shape):
        step = np.zeros_like(logits)
        step[place] = 1e-5
        numeric[place] = (surrogate(logits + step) - surrogate(logits - step)) / 2e-5
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(logits)), numeric, atol=2e-6)
    assert np.abs(numeric).max() > 0.1


MASK = jnp.asarray([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], jnp.bool_)


@pytest.mark.parametrize(
    "aggregate, expected",
    [
        (o.token_mean, (1 + 2 + 3 + 4 + 10) / 5),
        (o.seq_mean_token_mean, (2.5 + 10) / 2),
        (o.seq_mean_token_sum, (10 + 10) / 2),
        (o.seq_mean_token_sum_norm, (10 + 10) / 2 / 4),
        (partial(o.seq_mean_token_sum_norm, horizon=8), (10 + 10) / 2 / 8),
    ],
)
def test_aggregations(aggregate, expected):
    """Sequences of 4, 1 and 0 tokens; the empty one counts nowhere."""
    losses = jnp.asarray([[1.0, 2.0, 3.0, 4.0], [10.0, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
    weights = aggregate(MASK)
    np.testing.assert_allclose((weights.token * losses).sum() / weights.total, expected)


@pytest.mark.parametrize(
    "row",
    json.loads((TESTS / "golden" / "advantages_kl_agg.json").read_text())["agg_loss"],
    ids=lambda row: row["mode"],
)
def test_recorded_aggregations(row):
    case = read_cases(TESTS / "golden" / "inputs.json")["synthetic_wide"]
    mask = case["response_mask"] > 0
    # recorded with verl, whose normalised sum is a mean over sequences
    weights = check.aggregation("verl", row["mode"], mask)(jnp.asarray(mask))
    loss = (weights.token * case["log_prob"]).sum() / weights.total
    np.testing.assert_allclose(loss, row["loss"], rtol=1e-6)


def test_metrics_agree_with_the_recordings():
    """Stable-RL's pg_clipfrac, over tokens with A ≠ 0, and ppo_kl, the mean of log μ - log π."""
    cases = read_cases(TESTS / "golden" / "inputs.json")
    compared = 0
    for _, row in read_rows(TESTS / "golden" / "policy_losses.jsonl.gz"):
        mode = MODES[row["impl"], row["loss_mode"]]
        if row["impl"] != "Stable-RL" or mode.rollout_is != "rollout_log_prob" or mode.topk:
            continue
        objective = mode.build(
            float(row["clip_ratio_low"]), float(row["clip_ratio_high"]), 1e4, o.token_mean
        )
        batch = check.batch_of(cases[row["case"]], mode, row["old_is"], None)
        metrics = objective.loss(*batch).metrics
        for ours, theirs in [("mask/fraction", "pg_clipfrac"), ("policy/kl_rollout", "ppo_kl")]:
            metric = metrics[ours]
            np.testing.assert_allclose(
                metric.sum / metric.count, row["metrics"][f"actor/{theirs}"], rtol=1e-5, atol=1e-6
            )
        compared += 1
    assert compared > 25


def test_metrics_by_hand():
    stats, batch = from_probabilities([0.5, 0.5, 0.2], [0.6, 0.4, 0.5], [1.0, -1.0, 1.0])
    stats = replace(stats, entropy=jnp.asarray([[0.1, 0.2, 0.6]]))
    metrics = o.dppo_binary_tv(0.2).loss(stats, batch).metrics
    assert metrics["mask/fraction"] == Mean(1.0, 3.0)
    assert metrics["mask/fraction_positive"] == Mean(1.0, 2.0)
    assert metrics["mask/fraction_negative"] == Mean(0.0, 1.0)
    means = {name: float(m.sum / m.count) for name, m in metrics.items() if isinstance(m, Mean)}
    maxima = {name: float(m.value) for name, m in metrics.items() if not isinstance(m, Mean)}
    np.testing.assert_allclose(means["ratio/mean"], (1.2 + 0.8 + 2.5) / 3, rtol=1e-6)
    np.testing.assert_allclose(means["divergence/mean"], (0.1 + 0.1 + 0.3) / 3, rtol=1e-6)
    np.testing.assert_allclose(means["entropy/mean"], 0.3, rtol=1e-6)
    kl = -(math.log(1.2) + math.log(0.8) + math.log(2.5)) / 3
    np.testing.assert_allclose(means["policy/kl_rollout"], kl, rtol=1e-6)
    loss = -(1.2 * math.log(0.6) - 0.8 * math.log(0.4)) / 3
    np.testing.assert_allclose(means["loss/policy"], loss, rtol=1e-5)
    np.testing.assert_allclose([maxima["ratio/max"], maxima["divergence/max"]], [2.5, 0.3])


BOUNDED = [o.dppo_binary_tv(), o.dppo_binary_kl(), o.grpo(0.3, 0.3)]


@settings(max_examples=15, deadline=None)
@given(
    log_mu=st.floats(-12, -0.0078125, width=32),
    log_pi=st.floats(-12, -0.0078125, width=32),
    advantage=st.integers(-3, 3),
)
def test_masks_follow_their_definition(log_mu, log_pi, advantage):
    """Each method's mask from its formula in float64, away from the threshold."""
    mu, pi = math.exp(log_mu), math.exp(log_pi)
    ratio = math.exp(log_pi - log_mu)
    kl = mu * (log_mu - log_pi) + (1 - mu) * (math.log1p(-mu) - math.log1p(-pi))
    stats, batch = from_probabilities([1.0], [1.0], [float(advantage)])
    stats = replace(stats, logp=jnp.asarray([[log_pi]], jnp.float32))
    rollout = replace(batch.rollout, logp_rollout=jnp.asarray([[log_mu]], jnp.float32))
    batch = replace(batch, rollout=rollout)
    away = (advantage > 0 and log_pi > log_mu) or (advantage < 0 and log_pi < log_mu)
    distances = [(abs(mu - pi), 0.15), (kl, 0.05), (abs(ratio - 1), 0.3)]
    for objective, (distance, delta) in zip(BOUNDED, distances, strict=True):
        if abs(distance - delta) < 1e-5:
            continue
        dropped = away and distance > delta
        _, gradient = loss_and_gradient(objective, stats, batch)
        expected = 0.0 if dropped else -advantage * ratio
        np.testing.assert_allclose(gradient.logp, [[expected]], rtol=2e-5, atol=1e-30)


def test_a_token_that_became_impossible_stays_finite():
    """π = 0 at a sampled token: weight 0, no gradient, and the limit 0 of r log π in the loss."""
    for objective in (o.pg_is(), o.dppo_binary_tv(), o.grpo()):
        batch = from_probabilities([0.5, 0.5], [0.0, 0.4], [1.0, 1.0])
        result, gradient = loss_and_gradient(objective, *batch)
        np.testing.assert_allclose(result.loss_sum, -0.8 * math.log(0.4), rtol=1e-6)
        np.testing.assert_allclose(gradient.logp, [[0.0, -0.8]], rtol=1e-6)


def test_refuses_nonsense():
    for bad in (
        lambda: o.dppo_binary_tv(-0.1),
        lambda: o.grpo(delta_low=-0.2),
        lambda: o.pg_tis(0.0),
        lambda: o.pg_tis(math.nan),
        lambda: o.seq_mean_token_sum_norm(MASK, horizon=0),
    ):
        with pytest.raises(ValueError, match="must be"):
            bad()


def test_topk_anchor_needs_the_recomputed_topk():
    stats, batch = make_batch()
    with pytest.raises(ValueError, match="topk_logp_old"):
        o.dppo_topk_tv(anchor=o.old_anchor).loss(stats, replace(batch, topk_logp_old=None))


def test_a_new_loss_sees_no_padding():
    """NaN and 1e9 outside response_mask reach neither its value nor its gradient, even where the
    loss itself would turn them into NaN."""

    def ratio_times_advantage(stats, batch):
        loss = -batch.advantages * jnp.exp(stats.logp - batch.rollout.logp_rollout)
        return o.TokenLoss(loss, jnp.ones(loss.shape, jnp.bool_))

    stats, batch = make_batch()
    objective = o.from_token_loss(ratio_times_advantage)
    clean, clean_gradient = loss_and_gradient(objective, stats, batch)
    dirty, dirty_gradient = loss_and_gradient(objective, *scribble_padding(stats, batch, 0))
    np.testing.assert_allclose(dirty.loss_sum, clean.loss_sum, rtol=1e-6)
    np.testing.assert_array_equal(dirty_gradient.logp, clean_gradient.logp)
    assert clean_gradient.logp.any()
