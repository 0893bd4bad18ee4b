"""Terms added to an objective: KL to a reference, entropy, the critic's losses."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dppo_jax import objectives as o
from dppo_jax.objectives import kl
from dppo_jax.records import LossSum, Objective

sys.path.insert(0, str(Path(__file__).parent / "contracts"))

from objective_batches import (  # noqa: E402
    from_probabilities,
    loss_and_gradient,
    make_batch,
    scribble_padding,
    take_rows,
)

QUANTILES = 5


def with_values(stats, batch, quantiles=None, seed=0):
    """The same tokens with a reference's log-probabilities, values and returns."""
    rng = np.random.default_rng(seed)
    tokens = stats.logp.shape

    def drawn(*more):
        return jnp.asarray(rng.normal(size=(*tokens, *more)), jnp.float32)

    trailing = () if quantiles is None else (quantiles,)
    outputs = () if quantiles is None else (2 * quantiles,)
    reference = jnp.asarray(stats.logp + 0.5 * rng.normal(size=tokens), jnp.float32)
    return replace(stats, values=drawn(*outputs)), replace(
        batch, logp_ref=reference, values_old=drawn(*outputs), returns=drawn(*trailing)
    )


BASE = o.dppo_binary_tv(aggregate=o.seq_mean_token_mean)
TERMS = {
    "kl k1": (o.with_reference_kl(BASE, 0.1, o.k1), None),
    "kl k2": (o.with_reference_kl(BASE, 0.1, o.k2), None),
    "kl k3": (o.with_reference_kl(BASE, 0.1), None),
    "kl k3+": (o.with_reference_kl(BASE, 0.1, partial(o.k3_plus, ceiling=10.0)), None),
    "entropy": (o.with_entropy_bonus(BASE, 0.1), None),
    "value": (o.with_value_loss(BASE), None),
    "value unclipped": (o.with_value_loss(BASE, clip=None), None),
    "quantiles": (o.with_quantile_value_loss(BASE, heads=2), QUANTILES),
    "all": (o.with_value_loss(o.with_entropy_bonus(o.with_reference_kl(BASE, 0.1), 0.1)), None),
}
each_term = pytest.mark.parametrize(("objective", "quantiles"), TERMS.values(), ids=TERMS.keys())


def added(objective: Objective, stats, batch):
    """The term alone: loss and gradient of the whole less those of the base."""
    whole, gradient = loss_and_gradient(objective, stats, batch)
    base, base_gradient = loss_and_gradient(BASE, stats, batch)
    assert whole.weight_sum == base.weight_sum
    assert whole.metrics.keys() > base.metrics.keys()
    for name, metric in base.metrics.items():
        np.testing.assert_array_equal(metric, whole.metrics[name])
    return whole.loss_sum - base.loss_sum, jax.tree.map(jnp.subtract, gradient, base_gradient)


# ---- by hand -------------------------------------------------------------------------------------


def test_estimates_by_hand():
    """π = .5 and .25 against .25 and .5: d = ±log 2."""
    logp, logp_ref = jnp.log(jnp.asarray([[0.5, 0.25]])), jnp.log(jnp.asarray([[0.25, 0.5]]))
    two = np.log(2)
    table = [
        (o.k1, [two, -two], [1, 1]),
        (o.absolute, [two, two], [1, -1]),
        (o.k2, [two**2 / 2] * 2, [two, -two]),
        (o.k3, [0.5 + two - 1, 2 - two - 1], [0.5, -1]),
        (o.k1_plus, [two, -two], [two, -two]),
        (o.k3_plus, [0.5 + two - 1, 2 - two - 1], [two, -two]),
        (partial(o.k3, ceiling=0.25), [0.5 + two - 1, 0.25], [0.5, 0]),
    ]
    for estimate, values, slopes in table:
        ours, pullback = jax.vjp(partial(estimate, logp_ref=logp_ref), logp)
        np.testing.assert_allclose(ours[0], values, rtol=1e-6)
        np.testing.assert_allclose(pullback(jnp.ones_like(ours))[0][0], slopes, rtol=1e-6)


def test_estimates_have_the_right_mean():
    """Over all tokens of π: k1 and k3 are KL(π ‖ ref), and k2's gradient is the KL's."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=8))
    log_ref = jax.nn.log_softmax(jnp.asarray(rng.normal(size=8)))

    def exact(logits):
        log_pi = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(log_pi) * (log_pi - log_ref))

    def mean_of(estimate, logits):
        """Of tokens drawn from the policy as it is, which the gradient does not see."""
        log_pi = jax.nn.log_softmax(logits)
        drawn = jax.lax.stop_gradient(jnp.exp(log_pi))
        return jnp.sum(drawn * estimate(log_pi[None], log_ref[None])[0])

    for estimate in (o.k1, o.k3, o.k1_plus, o.k3_plus):
        np.testing.assert_allclose(mean_of(estimate, logits), exact(logits), rtol=1e-5)
    slope = jax.grad(exact)(logits)
    for estimate in (o.k2, o.k1_plus, o.k3_plus):
        ours = jax.grad(partial(mean_of, estimate))(logits)
        np.testing.assert_allclose(ours, slope, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(jax.grad(partial(mean_of, o.k1))(logits), 0, atol=1e-6)


def test_penalty_is_the_estimate_of_what_was_sampled():
    logp, logp_ref = jnp.log(jnp.asarray([[0.5, 0.25]])), jnp.log(jnp.asarray([[0.25, 0.5]]))
    ours = kl.reference_kl_penalty(logp, logp_ref, coefficient=0.5)
    np.testing.assert_allclose(ours, [[np.log(2) / 2, -np.log(2) / 2]], rtol=1e-6)


def test_values_by_hand():
    """Clip .2. V 1 from .5 towards 2: clipped at .7, (1.3)². V .6 towards 0: inside, (.6)².
    V 0 from .5 towards 1: (1)², not the clipped .3's (.7)²."""
    stats, batch = from_probabilities([0.5] * 3, [0.5] * 3, [0.0] * 3)
    stats = replace(stats, values=jnp.asarray([[1.0, 0.6, 0.0]]))
    batch = replace(
        batch,
        values_old=jnp.asarray([[0.5, 0.5, 0.5]]),
        returns=jnp.asarray([[2.0, 0.0, 1.0]]),
    )
    objective = o.with_value_loss(o.pg_is())
    result, gradient = loss_and_gradient(objective, stats, batch)
    np.testing.assert_allclose(result.loss_sum, 0.5 * (1.69 + 0.36 + 1.0), rtol=1e-6)
    np.testing.assert_allclose(gradient.values, [[0.0, 0.6, -1.0]], rtol=1e-6)
    assert float(result.metrics["critic/clipped"].sum) == 1
    np.testing.assert_allclose(result.metrics["critic/squared_error"].sum, 1 + 0.36 + 1, rtol=1e-6)


def test_entropy_by_hand():
    stats, batch = from_probabilities([0.5] * 2, [0.5] * 2, [1.0] * 2)
    stats = replace(stats, entropy=jnp.asarray([[0.3, 0.9]]))
    loss, gradient = loss_and_gradient(o.with_entropy_bonus(o.pg_is(), 0.1), stats, batch)
    base, _ = loss_and_gradient(o.pg_is(), stats, batch)
    np.testing.assert_allclose(loss.loss_sum - base.loss_sum, -0.12, rtol=1e-5)
    np.testing.assert_allclose(gradient.entropy, [[-0.1, -0.1]], rtol=1e-6)


def test_quantile_huber_by_hand():
    """θ = (0, 1) at τ = ¼, ¾; y = (3, 0.5); κ = 1. u = 3, 2 and .5, -.5:
    ¼·2.5, ¾·1.5, ¼·.125, ¼·.125, mean of the four."""
    ours = o.quantile_huber(jnp.asarray([0.0, 1.0]), jnp.asarray([3.0, 0.5]), 1.0)
    np.testing.assert_allclose(ours, (0.625 + 1.125 + 0.03125 + 0.03125) / 4, rtol=1e-6)


def test_quantile_huber_finds_the_quantiles():
    """Its minimum over θ for targets 0..1 is near their quantiles at (i - ½)/Q."""
    target = jnp.linspace(0, 1, 101)

    def loss(theta):
        return o.quantile_huber(theta, target, 0.01)

    def step(_, theta):
        return theta - 0.05 * 4 * jax.grad(loss)(theta)

    theta = jax.lax.fori_loop(0, 400, step, jnp.zeros(4))
    np.testing.assert_allclose(theta, [0.125, 0.375, 0.625, 0.875], atol=0.01)


def test_the_tail_terms_by_hand():
    """One head, 4 quantiles, tail ¼ is one quantile at each end; κ huge makes ρ negligible.
    y = 0, 1, 2, 5: mean 2, lower target 2 - .9·2 = .2, upper 2 + 1.1·3 = 5.3."""
    stats, batch = from_probabilities([0.5], [0.5], [0.0])
    theta = jnp.asarray([[[0.0, 1.0, 2.0, 6.0]]])  # mean 2.25; bends 0 and 3
    stats = replace(stats, values=theta)
    batch = replace(batch, values_old=theta, returns=jnp.asarray([[[2.0, 0.0, 5.0, 1.0]]]))
    objective = o.with_quantile_value_loss(
        o.pg_is(), 1.0, kappa=1e8, tail=0.25, tail_weight=2.0, mean_weight=3.0,
        curvature_weight=5.0, consistency_weight=7.0,
    )  # fmt: skip
    result, _ = loss_and_gradient(objective, stats, batch)
    expected = 2 * (0.2**2 + 0.7**2) + 3 * 0.25**2 + 5 * (0 + 9)
    np.testing.assert_allclose(result.loss_sum, expected, rtol=1e-4)
    # two heads a distance 2 apart: each is 1 from their mean
    heads = jnp.concatenate([theta - 1, theta + 1], axis=-1)
    only = o.with_quantile_value_loss(
        o.pg_is(), 1.0, kappa=1e8, heads=2, tail_weight=0.0, mean_weight=0.0,
        curvature_weight=0.0, consistency_weight=7.0,
    )  # fmt: skip
    stats, batch = replace(stats, values=heads), replace(batch, values_old=heads)
    result, _ = loss_and_gradient(only, stats, batch)
    np.testing.assert_allclose(result.loss_sum, 7.0, rtol=1e-4)


# ---- laws of every term --------------------------------------------------------------------------


@each_term
def test_the_gradient_is_the_derivative(objective, quantiles):
    stats, batch = with_values(*make_batch(seed=1), quantiles)

    @jax.jit
    def loss(entropy, logp, values):
        moved = replace(stats, logp=logp, entropy=entropy, values=values)
        return objective.loss(moved, batch).loss_sum - BASE.loss(moved, batch).loss_sum

    def of_arrays(*arrays):
        return loss(*map(jnp.asarray, arrays))

    if objective is not TERMS["kl k3+"][0]:  # another gradient than its value's, on purpose
        arguments = (stats.entropy, stats.logp, stats.values)
        check_grads(of_arrays, arguments, order=1, modes=["rev"], rtol=0.05, atol=0.02, eps=1e-2)
    _, gradient = added(objective, stats, batch)
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))
    outside = ~np.asarray(batch.rollout.response_mask)
    assert not any(np.asarray(leaf)[outside].any() for leaf in jax.tree.leaves(gradient))


@each_term
def test_padding_changes_nothing(objective, quantiles):
    stats, batch = with_values(*make_batch(seed=2), quantiles)
    plain, gradient = loss_and_gradient(objective, stats, batch)
    padded, padded_gradient = loss_and_gradient(objective, *scribble_padding(stats, batch, 3))
    np.testing.assert_allclose(padded.loss_sum, plain.loss_sum, rtol=1e-5)
    columns = stats.logp.shape[1]
    for ours, theirs in zip(
        jax.tree.leaves(padded_gradient), jax.tree.leaves(gradient), strict=True
    ):
        assert not ours[:, columns:].any()
        np.testing.assert_allclose(ours[:, :columns], theirs, rtol=1e-5, atol=1e-7)


@each_term
def test_sums_add_over_microbatches(objective, quantiles):
    batch = with_values(*make_batch(seed=3), quantiles)
    whole, _ = loss_and_gradient(objective, *batch)
    loss = jax.jit(objective.loss)
    parts = [loss(*take_rows(batch, rows)) for rows in (np.array([5, 0, 3]), np.array([1, 2, 4]))]
    total = jax.tree.map(lambda *leaves: sum(leaves), *[p._replace(metrics={}) for p in parts])
    assert isinstance(total, LossSum) and total.weight_sum == whole.weight_sum
    np.testing.assert_allclose(total.loss_sum, whole.loss_sum, rtol=2e-5)


@each_term
def test_token_by_token_it_is_the_same_loss(objective, quantiles):
    """What the single pass over the logits would add up."""
    stats, batch = with_values(*make_batch(seed=4), quantiles)
    local = objective.token_local

    @jax.jit
    def both(stats, batch):
        weights = local.weights(batch.rollout.response_mask)
        return jnp.sum(weights * local.loss(stats, batch)), objective.loss(stats, batch).loss_sum

    np.testing.assert_allclose(*both(stats, batch), rtol=1e-5)


@each_term
def test_finite_at_extremes(objective, quantiles):
    stats, batch = with_values(*make_batch(seed=5), quantiles)
    extremes = jnp.resize(jnp.asarray([0.0, -1e-7, -80.0, -1e4]), stats.logp.shape)
    stats = replace(stats, logp=extremes)
    batch = replace(batch, logp_ref=extremes[::-1, ::-1])
    rollout = replace(batch.rollout, logp_rollout=extremes[::-1])
    result, gradient = loss_and_gradient(objective, stats, replace(batch, rollout=rollout))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((result, gradient)))


# ---- what they need ------------------------------------------------------------------------------


def test_needs_are_united():
    both = TERMS["all"][0]
    assert both.needs == {"logp_ref", "values"}
    recomputed = o.with_reference_kl(o.minirl())
    assert recomputed.needs == {"logp_old", "logp_ref"}


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (o.with_reference_kl(BASE), "needs Batch.logp_ref"),
        (o.with_value_loss(BASE), "needs a critic: set train.critic"),
        (o.with_quantile_value_loss(BASE), "needs a critic: set train.critic"),
    ],
)
def test_what_is_missing_is_named(objective, message):
    with pytest.raises(ValueError, match=message):
        objective.loss(*make_batch())


def test_wrong_sizes_are_named():
    plain, quantiles = with_values(*make_batch()), with_values(*make_batch(), QUANTILES)
    with pytest.raises(ValueError, match="a critic of one value"):
        o.with_value_loss(BASE).loss(*quantiles)
    with pytest.raises(ValueError, match=r"3 heads of 5 quantiles need a critic of 15 values"):
        o.with_quantile_value_loss(BASE, heads=3).loss(*quantiles)
    stats, batch = plain
    with pytest.raises(ValueError, match="needs returns: use advantages.gae"):
        o.with_value_loss(BASE).loss(stats, replace(batch, returns=None))
    with pytest.raises(ValueError, match="clip must be positive"):
        o.with_value_loss(BASE, clip=0.0)
    with pytest.raises(ValueError, match="does not say how it aggregates"):
        o.with_entropy_bonus(Objective(BASE.loss))
