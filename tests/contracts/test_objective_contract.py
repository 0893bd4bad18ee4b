"""What every objective must do, over the table of variants."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_batches import loss_and_gradient, make_batch, scribble_padding, take_rows
from objective_variants import VARIANTS

from dppo_jax.records import Max, Mean, fold_metrics

pytestmark = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)

COMMON_METRICS = {
    "mask/fraction",
    "mask/fraction_positive",
    "mask/fraction_negative",
    "loss/policy",
    "ratio/mean",
    "ratio/max",
    "entropy/mean",
    "policy/kl_rollout",
}
BATCH = make_batch(seed=3)


@cache
def evaluated(variant):
    return loss_and_gradient(variant.objective, *BATCH)


def assert_same(left, right, **tolerance):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


def test_says_what_it_needs(variant):
    assert variant.objective.needs == variant.needs
    stats, batch = BATCH
    bare = replace(batch, logp_old=None, topk_logp_old=None)
    if "logp_old" in variant.needs:
        with pytest.raises(ValueError, match="logp_old"):
            variant.objective.loss(stats, bare)
    else:
        assert_same(variant.objective.loss(stats, bare), evaluated(variant)[0])


def test_metrics_are_unreduced_and_complete(variant):
    metrics = evaluated(variant)[0].metrics
    assert set(metrics) >= COMMON_METRICS
    for name, metric in metrics.items():
        assert isinstance(metric, Max if name.endswith(("/max", "_max")) else Mean), name
        assert all(np.isfinite(part) and np.shape(part) == () for part in metric), name


def test_gradient_is_the_masked_weighted_score(variant):
    """d loss_sum / d logp is 0 or -A min(r, C) times the token's weight, on response tokens only;
    the other statistics get no gradient."""
    stats, batch = BATCH
    result, gradient = evaluated(variant)
    mask = np.asarray(batch.rollout.response_mask)
    ratio = np.exp(np.asarray(stats.logp, np.float64) - np.asarray(batch.rollout.logp_rollout))
    score = -np.asarray(batch.advantages, np.float64) * np.minimum(ratio, variant.cap)
    ours = np.asarray(gradient.logp, np.float64)
    assert not ours[~mask].any()
    assert not gradient.topk_logp.any() and not gradient.entropy.any()
    kept = ours != 0
    weights = ours[kept] / score[kept]
    assert (weights > 0).all()
    decided = mask & (np.asarray(batch.advantages) != 0)
    dropped = (decided & ~kept).sum()
    assert result.metrics["mask/fraction"] == Mean(dropped, decided.sum())
    assert kept.any() and (dropped > 0) == variant.measures
    # within a sequence every kept token weighs the same
    for row in range(mask.shape[0]):
        in_row = ours[row][kept[row]] / score[row][kept[row]]
        np.testing.assert_allclose(in_row, in_row[:1].repeat(len(in_row)), rtol=1e-5)
    np.testing.assert_allclose(
        result.loss_sum, (ours * np.asarray(stats.logp))[mask].sum(), rtol=1e-4
    )


def test_moving_back_is_never_dropped(variant):
    """With A > 0 and π below both μ and old (or A < 0 and above), every token is kept."""
    stats, batch = BATCH
    sign = jnp.asarray(np.where(np.arange(6) % 2, 1.0, -1.0)[:, None], jnp.float32)
    low = jnp.minimum(batch.rollout.logp_rollout, batch.logp_old)
    high = jnp.maximum(batch.rollout.logp_rollout, batch.logp_old)
    logp = jnp.where(sign > 0, low - 1.5, jnp.minimum(high + 1.5, -1e-6))
    back = jnp.where(sign > 0, logp < low, logp > high)
    advantages = jnp.broadcast_to(sign, logp.shape)
    _, gradient = loss_and_gradient(
        variant.objective, replace(stats, logp=logp), replace(batch, advantages=advantages)
    )
    inside = np.asarray(back & batch.rollout.response_mask)
    assert (inside & np.asarray(advantages > 0)).sum() > 3
    assert (inside & np.asarray(advantages < 0)).sum() > 3
    assert (np.sign(np.asarray(gradient.logp)) == -np.asarray(advantages))[inside].all()


def test_padding_changes_nothing(variant):
    """Neither what stands outside response_mask nor more columns of it, in value or gradient."""
    stats, batch = scribble_padding(*BATCH, columns=3)
    result, gradient = loss_and_gradient(variant.objective, stats, batch)
    assert_same(result, evaluated(variant)[0], rtol=1e-6)
    columns = BATCH[0].logp.shape[1]
    assert not any(leaf[:, columns:].any() for leaf in jax.tree.leaves(gradient))
    inside = jax.tree.map(lambda leaf: leaf[:, :columns], gradient)
    assert_same(inside, evaluated(variant)[1], rtol=1e-6)


def test_sums_add_over_microbatches(variant):
    """Any split by sequences, the empty one included, gives the same sums, metrics, gradient."""
    whole, gradient = evaluated(variant)
    rows = [np.array([5, 0, 3]), np.array([1, 2, 4])]
    parts = [loss_and_gradient(variant.objective, *take_rows(BATCH, r)) for r in rows]
    results = [result for result, _ in parts]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)
    np.testing.assert_allclose(stacked.loss_sum.sum(), whole.loss_sum, rtol=2e-5)
    assert stacked.weight_sum.sum() == whole.weight_sum
    assert_same(fold_metrics(stacked.metrics), whole.metrics, rtol=2e-5)
    for part_rows, (_, part_gradient) in zip(rows, parts, strict=True):
        assert_same(part_gradient, take_rows(gradient, part_rows), rtol=1e-6)


def test_weight_sum_ignores_the_policy(variant):
    _, batch = BATCH
    other, _ = make_batch(seed=4)
    assert variant.objective.loss(other, batch).weight_sum == evaluated(variant)[0].weight_sum


def test_no_token_at_all_gives_zeros(variant):
    stats, batch = BATCH
    nothing = jnp.zeros_like(batch.rollout.response_mask)
    empty = replace(batch, rollout=replace(batch.rollout, response_mask=nothing))
    result, gradient = loss_and_gradient(variant.objective, stats, empty)
    assert result.loss_sum == 0 and result.weight_sum == 0
    assert not gradient.logp.any()
    assert all(float(part) == 0.0 for metric in result.metrics.values() for part in metric)


EXTREMES = [0.0, -1e-7, -30.0, -80.0, -1e4]


def test_finite_at_extremes(variant):
    """Every pair of extreme log-probabilities (ratios up to e^10000), both signs of A."""
    mu, pi = (jnp.asarray(v.ravel(), jnp.float32) for v in np.meshgrid(EXTREMES, EXTREMES))
    pairs = mu.shape[0]
    stats, batch = make_batch(b=2, t=pairs)
    rollout = replace(
        batch.rollout,
        response_mask=jnp.ones((2, pairs), jnp.bool_),
        logp_rollout=jnp.stack([mu, mu]),
    )
    batch = replace(
        batch,
        rollout=rollout,
        advantages=jnp.stack([jnp.ones(pairs), -jnp.ones(pairs)]),
        logp_old=jnp.stack([mu, mu]),
    )
    stats = replace(stats, logp=jnp.stack([pi, pi]))
    result, gradient = loss_and_gradient(variant.objective, stats, batch)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((result, gradient)))
