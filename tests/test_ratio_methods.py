"""Ratio methods by hand, on one sequence of four tokens with r = 1.1, 0.6, 2.5, 1.5."""

import sys
from dataclasses import replace
from functools import partial
from math import exp, log
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dppo_jax import objectives as o
from dppo_jax.metrics import reduce_metrics
from dppo_jax.records import Mean

sys.path[:0] = [str(Path(__file__).parent / "contracts")]

from objective_batches import from_probabilities, loss_and_gradient, make_batch  # noqa: E402

MU, PI = np.array([0.5, 0.5, 0.2, 0.4]), np.array([0.55, 0.3, 0.5, 0.6])
R, MIXED = PI / MU, np.array([1.0, -1.0, 1.0, -1.0])
UP, DOWN = np.ones(4), -np.ones(4)
PRODUCT = 1.1 * 0.6 * 2.5 * 1.5
S = PRODUCT**0.25
GEOMETRIC = exp((log(1.1) + log(0.6) + 0.4 + 0.4) / 4)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def sapo_gradient(tau):
    gate = sigmoid(tau * (R - 1))
    return 4 * gate * (1 - gate) * R


# name: objective, advantages, loss_sum, d loss_sum / d logp of each token
TABLE = {
    "ppo_clip": (o.ppo_clip(), MIXED, -1.1 + 0.8 - 1.2 + 1.5, [-1.1, 0, 0, 1.5]),
    "ppo_clip wide": (o.ppo_clip(0.5, 2.0), MIXED, -1.1 + 0.6 - 2.5 + 1.5, -MIXED * R),
    "ppo_clip dual": (o.ppo_clip(dual_clip=1.4), MIXED, -1.1 + 0.8 - 1.2 + 1.4, [-1.1, 0, 0, 0]),
    "dapo": (o.dapo(), UP, -1.1 - 0.6 - 1.28 - 1.28, [-1.1, -0.6, 0, 0]),
    "dr_grpo": (o.dr_grpo(horizon=8), DOWN, 5.9 / 8, np.array([1.1, 0, 2.5, 1.5]) / 8),
    "gspo": (o.gspo(), UP, -1.0004, [0] * 4),
    "gspo down": (o.gspo(), DOWN, S, [S / 4] * 4),
    "gspo wide": (o.gspo(0.3, 0.3), UP, -S, [-S / 4] * 4),
    "gspo_token": (o.gspo_token(0.3, 0.3), MIXED, 0.0, -MIXED * S / 4),
    "luspo": (o.luspo(), DOWN, 4 * S, [S] * 4),
    "gmpo": (o.gmpo(), UP, -GEOMETRIC, [-GEOMETRIC / 4, -GEOMETRIC / 4, 0, 0]),
    "gmpo down": (o.gmpo(0.4, 0.4), DOWN, (1.1 * exp(-0.4) * 2.5 * 1.5) ** 0.25, None),
    "sapo": (o.sapo(), UP, -np.mean(4 * sigmoid(R - 1)), -sapo_gradient(1.0) / 4),
    "sapo down": (
        o.sapo(), DOWN, np.mean(4 / 1.05 * sigmoid(1.05 * (R - 1))), sapo_gradient(1.05) / 4,
    ),
    "vespo": (o.vespo(), UP, None, [-(PRODUCT**2) * exp(3 * (1 - PRODUCT))] * 4),
    "vespo down": (o.vespo(), DOWN, None, [PRODUCT**3 * exp(2 * (1 - PRODUCT))] * 4),
    "reinforce": (o.reinforce(), MIXED, -np.dot(MIXED, np.log(PI)), -MIXED),
    "cispo": (o.cispo(0.9, 1.4), MIXED, None, -MIXED * [1.1, 0.9, 1.4, 1.4]),
    "cispo default": (o.cispo(), MIXED, -np.dot(MIXED * R, np.log(PI)), -MIXED * R),
    "minpro": (o.minpro(), MIXED, None, -MIXED * [1.1, 0.6 * 1.1, 2.5 * 0.6, 1.5 * 0.6]),
    "minpro capped": (o.minpro(1.2), MIXED, None, -MIXED * [1.1, 0.66, 1.2, 0.9]),
    "cpgd": (
        o.cpgd(), MIXED, (-log(0.55) + log(0.4) - log(0.24) + log(0.6)) / 4, [-0.25, 0, 0, 0.25],
    ),
    "cpgd drift": (o.cpgd(0.7, 2.0, drift=0.1), MIXED, None, (-MIXED + 0.1 * (R - 1)) / 4),
    "dro": (
        o.dro(0.2), MIXED, np.sum(-MIXED * np.log(PI) + 0.1 * np.log(R) ** 2),
        -MIXED + 0.2 * np.log(R),
    ),
    "mask_bad_updates": (o.mask_bad_updates(0.15), MIXED, None, [-1.1, 0, -2.5, 1.5]),
    "kl_cov": (o.kl_cov(0.5), MIXED, None, [-1.1 + 1, 0.6 - 1, -2.5, 1.5]),
    "clip_cov": (o.clip_cov(0.5, 0.0, 0.3), MIXED, None, [0, 0, 0, 1.5]),
    "clip_cov none": (o.clip_cov(0.5, 0.2, 0.3), MIXED, None, [-1.1, 0, 0, 1.5]),
}  # fmt: skip


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_by_hand(row):
    """cov of kl_cov and clip_cov: A (log π + .7514) = .154, .453, .058, -.241."""
    objective, advantages, loss, gradient = row
    result, ours = loss_and_gradient(objective, *from_probabilities(MU, PI, advantages))
    if loss is not None:
        np.testing.assert_allclose(result.loss_sum, loss, rtol=1e-5, atol=1e-6)
    if gradient is not None:
        np.testing.assert_allclose(ours.logp[0], gradient, rtol=2e-5, atol=1e-6)
        dropped = np.asarray(ours.logp[0]) == 0
        assert result.metrics["mask/fraction"] == Mean(dropped.sum(), 4.0)


def test_gspo_token_is_gspo_where_a_sequence_has_one_advantage():
    stats, batch = make_batch(seed=8)
    for low, high in ((3e-4, 4e-4), (0.3, 0.3)):
        a, ga = loss_and_gradient(o.gspo(low, high), stats, batch)
        b, gb = loss_and_gradient(o.gspo_token(low, high), stats, batch)
        np.testing.assert_allclose(a.loss_sum, b.loss_sum, rtol=1e-6)
        np.testing.assert_allclose(ga.logp, gb.logp, rtol=1e-5, atol=1e-8)
    assert ga.logp.any()


def test_ppo_clip_has_the_gradient_of_grpo():
    stats, batch = make_batch(seed=9)
    _, mask = loss_and_gradient(o.grpo(0.1, 0.3), stats, batch)
    _, clip = loss_and_gradient(o.ppo_clip(0.1, 0.3), stats, batch)
    np.testing.assert_allclose(mask.logp, clip.logp, rtol=1e-5, atol=1e-7)


def test_cispo_without_bounds_is_pg_is():
    stats, batch = make_batch(seed=9)
    ours, theirs = (
        loss_and_gradient(objective, stats, batch)[1].logp
        for objective in (o.cispo(0.0, 1e9), o.pg_is())
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


# ---- BAPO ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target, low, high",
    [
        (0.5, 0.6, 1.2),  # (1.1 + 1.2) / (0.6 + 1.5) = 1.095 is enough at once
        (1.2, 0.9, 1.8),  # c_low to its end does not do it; 1.1 + c_high >= 1.2 (0.9 + 1.5)
        (9.0, 0.9, 3.0),  # out of reach: both at their ends
    ],
)
def test_bapo_finds_its_bounds(target, low, high):
    objective = o.bapo(target, dual_clip=None)
    result, gradient = loss_and_gradient(objective, *from_probabilities(MU, PI, MIXED))
    found = reduce_metrics(result.metrics)
    np.testing.assert_allclose(found["bapo/clip_low"], low, rtol=1e-5)
    np.testing.assert_allclose(found["bapo/clip_high"], high, rtol=1e-5)
    _, fixed = loss_and_gradient(o.ppo_clip(1 - low, high - 1), *from_probabilities(MU, PI, MIXED))
    np.testing.assert_allclose(gradient.logp, fixed.logp, rtol=1e-6)


def test_bapo_without_negative_tokens_stays_where_it_starts():
    result, _ = loss_and_gradient(o.bapo(9.0), *from_probabilities(MU, PI, UP))
    found = reduce_metrics(result.metrics)
    assert found["bapo/clip_high"] == pytest.approx(1.2)
    assert np.isnan(found["bapo/balance"])  # no number, nor one in the mean of others


def test_bapo_balance_is_the_loop_of_its_definition():
    stats, batch = make_batch(seed=2)
    ratio = np.exp(stats.logp - batch.rollout.logp_rollout)
    advantages = np.where(batch.rollout.response_mask, batch.advantages, 0.0)
    bounds = np.array([[0.6, 1.2], [0.8, 1.2], [0.9, 2.0]], np.float32)
    ours = o.balance(jnp.asarray(ratio), jnp.asarray(advantages), jnp.asarray(bounds))
    for found, (low, high) in zip(ours, bounds, strict=True):
        effective = np.where(advantages >= 0, np.minimum(ratio, high), np.maximum(ratio, low))
        parts = effective * advantages
        np.testing.assert_allclose(
            found, parts[parts > 0].sum() / -parts[parts < 0].sum(), rtol=1e-5
        )


# ---- draws of Clip-Cov -----------------------------------------------------------------------


def test_kl_cov_penalises_none_of_equals():
    """Where no token has an advantage every covariance is 0, and none stands out."""
    stats, batch = from_probabilities(MU, PI, [0.0] * 4)
    result, gradient = loss_and_gradient(o.kl_cov(0.25), stats, batch)
    assert result.loss_sum == 0 and not gradient.logp.any()


def test_clip_cov_draws_the_number_that_it_should_and_not_always_the_same():
    rng = np.random.default_rng(0)
    shape = (1, 400)
    stats, batch = from_probabilities(*(np.full(400, 0.5) for _ in range(3)))
    advantages = jnp.asarray(np.where(np.arange(400) % 2, 1.0, -1.0)[None], jnp.float32)
    drawn = []
    for _ in range(2):
        logp = jnp.asarray(rng.uniform(-2, -0.1, shape), jnp.float32)
        at = replace(
            batch, advantages=advantages, rollout=replace(batch.rollout, logp_rollout=logp)
        )
        objective = o.clip_cov(0.02, -9.0, 9.0)
        result, gradient = loss_and_gradient(objective, replace(stats, logp=logp), at)
        drawn.append(np.flatnonzero(np.asarray(gradient.logp[0]) == 0))
        assert len(drawn[-1]) == 8
        assert result.metrics["mask/fraction"] == Mean(8.0, 400.0)
    assert len(np.intersect1d(*drawn)) < 3
    assert np.ptp(drawn[0]) > 100, "spread over the sequence"


# ---- errors and gradients --------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        lambda: o.ppo_clip(-0.1),
        lambda: o.ppo_clip(dual_clip=1.0),
        lambda: o.gspo(delta_low=-1e-4),
        lambda: o.gmpo(delta_high=-1.0),
        lambda: o.sapo(tau_positive=0.0),
        lambda: o.cispo(2.0, 1.0),
        lambda: o.minpro(0.0),
        lambda: o.cpgd(delta_low=1.0),
        lambda: o.dro(-1.0),
        lambda: o.bapo(lowest=1.1),
        lambda: o.bapo(highest_step=0.0),
        lambda: o.bapo(dual_clip=0.5),
        lambda: o.clip_cov(1.5),
        lambda: o.clip_cov(delta_low=-0.1),
        lambda: o.clip_cov(cov_low=5.0),
        lambda: o.kl_cov(coefficient=-1.0),
        lambda: o.with_reference_kl(o.dapo(), -0.1),
    ],
)
def test_refuses_nonsense(bad):
    with pytest.raises(ValueError, match=r"must be|needs"):
        bad()


SMOOTH = {
    "ppo_clip": o.ppo_clip(0.45, 1.0),
    "gspo": o.gspo(0.3, 0.3),
    "gmpo": o.gmpo(1.0, 0.6),
    "sapo": o.sapo(),
    "dro": o.dro(),
    "cpgd": o.cpgd(drift=0.3),
    "kl_cov": o.kl_cov(0.5),
    "bapo": o.bapo(0.1, lowest=0.5),
}


@pytest.mark.parametrize("objective", SMOOTH.values(), ids=SMOOTH)
def test_gradients_are_those_of_the_value(objective):
    stats, batch = from_probabilities(MU, PI, [1.0, -0.5, 1.0, -1.0])

    def loss(logp):
        return objective.loss(replace(stats, logp=jnp.asarray(logp)), batch).loss_sum

    check_grads(loss, (stats.logp,), order=1, modes=("rev",), eps=3e-3, rtol=1e-2, atol=1e-3)
    assert jax.grad(loss)(stats.logp).any()


def test_partials_are_factories_too():
    """What gin hands over: a factory with bindings, called by the objective's own."""
    objective = o.cppo(budget=partial(o.fixed_budget, value=0.5))
    assert objective.scope == "sequence" and objective.token_local is None
