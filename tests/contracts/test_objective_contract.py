"""What every objective must do, over the table of methods and some of their options.

One compiled function an objective: all batches have the shape of PLAIN.
"""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_batches import (
    loss_and_gradient,
    make_batch,
    scribble_padding,
    suited_to,
    take_rows,
)
from objective_variants import EXEMPT, SCORES, VARIANTS, WEIGHTED

from dppo_jax import objectives as o
from dppo_jax.records import Max, Mean, fold_metrics
from dppo_jax.scoring import by_token

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
    "prob_diff/mean",
    "prob_diff/max",
    "topk/mass",
    "topk/mass_rollout",
    "topk/sampled_inside",
} | {
    f"mask/{name}_{sign}"
    for name in ("prob", "prob_rollout", "logp", "logp_rollout", "ratio", "entropy")
    for sign in ("positive", "negative")
}
ROWS, COLUMNS = 6, 13
PLAIN = make_batch(seed=4, b=ROWS, t=COLUMNS)
AGGREGATIONS = (o.token_mean, o.seq_mean_token_mean, o.seq_mean_token_sum_norm)


@cache
def compiled(variant):
    def call(stats, batch):
        state = variant.objective.initial_state
        return loss_and_gradient(variant.objective, stats, replace(batch, objective_state=state))

    return jax.jit(call)


@cache
def batch_of(variant):
    return suited_to(variant.method, variant.objective, *PLAIN)


@cache
def evaluated(variant):
    return compiled(variant)(*batch_of(variant))


def exempt(variant, contract):
    if reason := EXEMPT[contract].get(variant.name):
        pytest.skip(reason)


def with_mask(batch, mask):
    return replace(batch, rollout=replace(batch.rollout, response_mask=jnp.asarray(mask)))


def assert_same(left, right, **tolerance):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


def test_says_what_it_needs(variant):
    """What is missing is refused by those who need it, in one line, and by no others."""
    stats, batch = batch_of(variant)
    bare = replace(stats, exact_tv=None, exact_kl=None, last_layer=None, values=None)
    bare_batch = replace(batch, logp_old=None, topk_logp_old=None)
    call = variant.objective.loss
    if variant.objective.needs:
        with pytest.raises(ValueError, match="logp_old|exact_divergence|last_layer|critic"):
            jax.eval_shape(call, bare, bare_batch)
    else:
        jax.eval_shape(call, bare, bare_batch)


def test_metrics_are_unreduced_and_complete(variant):
    metrics = evaluated(variant)[0].metrics
    assert set(metrics) >= COMMON_METRICS
    for name, metric in metrics.items():
        assert isinstance(metric, Max if name.endswith(("/max", "_max")) else Mean), name
        assert all(np.isfinite(part) and np.shape(part) == () for part in metric), name


def test_dropped_tokens_have_no_gradient_and_others_do(variant):
    """mask/fraction counts, among tokens with A ≠ 0, exactly those without gradient."""
    exempt(variant, "what is dropped is silent")
    stats, batch = batch_of(variant)
    result, gradient = evaluated(variant)
    mask = np.asarray(batch.rollout.response_mask)
    silent = np.asarray(gradient.logp) == 0
    assert silent[~mask].all()
    assert not gradient.topk_logp.any()
    decided = mask & (np.asarray(batch.advantages) != 0)
    if "correction/weight" not in result.metrics:
        np.testing.assert_array_equal(
            result.metrics["mask/fraction"], Mean((decided & silent).sum(), decided.sum())
        )
    exempt(variant, "something is kept")
    assert (decided & ~silent).any()


def test_the_policys_gradient_is_the_masked_weighted_score(variant):
    """d loss_sum / d logp is 0 or -A min(r, C) times the token's weight."""
    if variant.name not in SCORES:
        pytest.skip("not a score-function loss")
    stats, batch = batch_of(variant)
    result, gradient = evaluated(variant)
    mask = np.asarray(batch.rollout.response_mask)
    ratio = np.exp(np.asarray(stats.logp, np.float64) - np.asarray(batch.rollout.logp_rollout))
    cap = SCORES[variant.name] or np.inf
    score = -np.asarray(batch.advantages, np.float64) * np.minimum(ratio, cap)
    ours = np.asarray(gradient.logp, np.float64)
    kept = ours != 0
    for row in range(ROWS):  # within a sequence every kept token weighs the same
        in_row = ours[row][kept[row]] / score[row][kept[row]]
        assert (in_row > 0).all()
        np.testing.assert_allclose(in_row, in_row[:1].repeat(len(in_row)), rtol=1e-5)
    np.testing.assert_allclose(
        result.loss_sum, (ours * np.asarray(stats.logp))[mask].sum(), rtol=1e-4, atol=2e-6
    )


def test_the_gradient_is_the_values_or_that_of_a_weighted_score(variant):
    """Central differences along a direction; where weights are constants, loss = Σ gradient·log π.

    Both sides of the difference are the compiled function's own values, in float32.
    """
    stats, batch = batch_of(variant)
    result, gradient = evaluated(variant)
    if variant.name in SCORES or variant.name in WEIGHTED:
        mask = np.asarray(batch.rollout.response_mask)
        total = (np.asarray(gradient.logp, np.float64) * np.asarray(stats.logp))[mask].sum()
        np.testing.assert_allclose(result.loss_sum, total, rtol=1e-4, atol=2e-6)
        return
    rng = np.random.default_rng(0)
    along = rng.uniform(0.5, 1.5, (ROWS, COLUMNS)) * rng.choice([-1, 1], (ROWS, COLUMNS))
    step = jnp.asarray(2e-3 * along, jnp.float32)
    above, below = (
        float(compiled(variant)(replace(stats, logp=stats.logp + d), batch)[0].loss_sum)
        for d in (step, -step)
    )
    slope = float(jnp.sum(gradient.logp * step)) * 2
    assert above - below == pytest.approx(slope, rel=0.03, abs=2e-5)


def test_on_policy_it_is_reinforce(variant):
    """Where π = old = μ the gradient is -A times the aggregation's weight of the token."""
    exempt(variant, "on policy it is REINFORCE")
    stats, batch = batch_of(variant)
    rollout = batch.rollout
    on_policy = replace(stats, logp=rollout.logp_rollout, topk_logp=rollout.topk_logp_rollout)
    batch = replace(batch, logp_old=rollout.logp_rollout, topk_logp_old=rollout.topk_logp_rollout)
    _, gradient = compiled(variant)(on_policy, batch)
    weights = [aggregate(rollout.response_mask).token for aggregate in AGGREGATIONS]
    weights.append(weights[0] / 64)  # the options' horizon
    wanted = [np.asarray(-batch.advantages * weight) for weight in weights]
    errors = [np.abs(gradient.logp - one).max() for one in wanted]
    assert min(errors) < 1e-6, errors


def test_moving_back_is_kept(variant):
    """With A > 0 and π below both μ and old (or A < 0 and above), every token is kept."""
    exempt(variant, "moving back is kept")
    stats, batch = batch_of(variant)
    sign = jnp.asarray(np.where(np.arange(ROWS) % 2, 1.0, -1.0)[:, None], jnp.float32)
    low = jnp.minimum(batch.rollout.logp_rollout, batch.logp_old)
    high = jnp.maximum(batch.rollout.logp_rollout, batch.logp_old)
    logp = jnp.where(sign > 0, low - 1.5, jnp.minimum(high + 1.5, -1e-6))
    back = jnp.where(sign > 0, logp < low, logp > high) & batch.rollout.response_mask
    advantages = jnp.broadcast_to(sign, logp.shape)
    _, gradient = compiled(variant)(
        replace(stats, logp=logp), with_mask(replace(batch, advantages=advantages), back)
    )
    inside = np.asarray(back)
    assert (inside & np.asarray(advantages > 0)).sum() > 3
    assert (inside & np.asarray(advantages < 0)).sum() > 3
    assert (np.sign(np.asarray(gradient.logp)) == -np.asarray(advantages))[inside].all()


def test_without_advantage_there_is_no_gradient(variant):
    stats, batch = batch_of(variant)
    result, gradient = compiled(variant)(
        stats, replace(batch, advantages=jnp.zeros_like(batch.advantages))
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((result, gradient)))
    assert result.metrics["mask/fraction"] == Mean(0.0, 0.0)
    exempt(variant, "no advantage, no gradient")
    assert not gradient.logp.any()
    assert result.loss_sum == 0 or "values" in variant.objective.needs  # its critic still learns


def test_padding_changes_nothing(variant):
    """Whatever stands outside response_mask, NaN included, in value, metrics or gradient."""
    result, gradient = compiled(variant)(*scribble_padding(*batch_of(variant), columns=0))
    assert_same(result, evaluated(variant)[0], rtol=1e-6)
    assert_same(gradient, evaluated(variant)[1], rtol=1e-6)


def test_columns_without_tokens_change_nothing(variant):
    """The first columns alone, where the rest is padding."""
    if variant.name == "dr_grpo":
        pytest.skip("its default horizon is the number of columns")
    stats, batch = batch_of(variant)
    mask = np.asarray(batch.rollout.response_mask) & (np.arange(COLUMNS) < 7)
    batch = with_mask(batch, mask)
    wide, gradient = compiled(variant)(stats, batch)
    state = variant.objective.initial_state

    def narrow(leaf):
        return leaf[:, :7] if leaf.ndim > 1 and leaf.shape[1] == COLUMNS else leaf

    cut = replace(jax.tree.map(narrow, batch), objective_state=state)
    result = variant.objective.loss(jax.tree.map(narrow, stats), cut)
    assert_same(result, wide, rtol=1e-5, atol=2e-6)
    assert not gradient.logp[:, 7:].any()


def test_sums_add_over_microbatches(variant):
    """Any split by sequences gives the same sums, metrics and gradient."""
    whole, gradient = evaluated(variant)
    stats, batch = batch_of(variant)
    if variant.objective.statistics is not None:
        assert variant.objective.scope == "batch"
        batch = replace(batch, statistics=variant.objective.statistics(stats, batch))
    mask = np.asarray(batch.rollout.response_mask)
    # a prompt's samples stay together where they are compared
    rows = [0, 1] if variant.objective.scope == "prompt" else [0, 3, 5]
    first = np.isin(np.arange(ROWS), rows)[:, None]
    parts = [compiled(variant)(stats, with_mask(batch, mask & part)) for part in (first, ~first)]
    results = [result for result, _ in parts]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)
    np.testing.assert_allclose(stacked.loss_sum.sum(), whole.loss_sum, rtol=2e-5, atol=2e-6)
    assert stacked.weight_sum.sum() == whole.weight_sum
    assert_same(fold_metrics(stacked.metrics), whole.metrics, rtol=2e-5, atol=2e-6)
    assert_same(jax.tree.map(jnp.add, parts[0][1], parts[1][1]), gradient, rtol=1e-6)


def test_order_of_sequences_changes_nothing(variant):
    """Nor that of a group's samples, and of the groups."""
    in_groups = variant.objective.scope == "prompt"
    order = np.array([5, 4, 0, 1, 3, 2] if in_groups else [4, 2, 5, 0, 1, 3])
    result, gradient = compiled(variant)(*take_rows(batch_of(variant), order))
    assert_same(result, evaluated(variant)[0], rtol=2e-5, atol=2e-6)
    assert_same(gradient, take_rows(evaluated(variant)[1], order), rtol=2e-5, atol=1e-8)


def test_a_token_alone_has_the_loss_that_it_has_among_others(variant):
    """Objectives that say so: weights · token_local.loss over tokens alone is the loss sum."""
    local = variant.objective.token_local
    assert (local is not None) == (variant.objective.scope == "token")
    if local is None:
        pytest.skip("looks at other tokens")
    stats, batch = batch_of(variant)
    rows = by_token(batch)
    alone = jax.tree.map(lambda leaf: leaf.reshape(ROWS * COLUMNS, 1, *leaf.shape[2:]), stats)
    weights = local.weights(batch.rollout.response_mask).reshape(-1, 1)
    total = jnp.sum(weights * local.loss(alone, rows))
    np.testing.assert_allclose(total, evaluated(variant)[0].loss_sum, rtol=2e-5, atol=1e-6)


def test_weight_sum_ignores_the_policy(variant):
    stats, batch = batch_of(variant)
    other, _ = make_batch(seed=3, b=ROWS, t=COLUMNS)
    other = replace(other, values=stats.values)
    assert compiled(variant)(other, batch)[0].weight_sum == evaluated(variant)[0].weight_sum


def test_no_token_at_all_gives_zeros(variant):
    stats, batch = batch_of(variant)
    nothing = np.zeros((ROWS, COLUMNS), bool)
    result, gradient = compiled(variant)(stats, with_mask(batch, nothing))
    assert result.loss_sum == 0 and result.weight_sum == 0
    assert not gradient.logp.any()
    common = [part for name in COMMON_METRICS for part in result.metrics[name]]
    assert all(float(part) == 0.0 for part in common)
    assert all(np.isfinite(part) for metric in result.metrics.values() for part in metric)


EXTREMES = [0.0, -1e-7, -30.0, -80.0, -1e4]


@pytest.mark.parametrize("mixed", [True, False], ids=["mixed", "whole sequences"])
def test_finite_at_extremes(variant, mixed):
    """Every pair of extreme log-probabilities (ratios up to e^10000), every sign of A."""
    stats, batch = batch_of(variant)
    pairs = np.stack(np.meshgrid(EXTREMES, EXTREMES), -1).reshape(-1, 2)
    pairs = np.concatenate([pairs, [(-1.0, -1.0)]])  # 26: two sequences of 13
    if mixed:
        mu, pi = np.tile(pairs.reshape(2, COLUMNS, 2), (3, 1, 1)).transpose(2, 0, 1)
        signs = [[1.0], [1.0], [-1.0], [-1.0], [0.0], [0.0]]
        runs = [(mu, pi, signs)]
    else:
        runs = [
            (*np.repeat(pairs[start : start + 6, None], COLUMNS, 1).transpose(2, 0, 1), signs)
            for start in range(0, 24, 6)
            for signs in ([[1.0]] * 6, [[-1.0]] * 6)
        ]
    for mu, pi, signs in runs:
        mu, pi = jnp.asarray(mu, jnp.float32), jnp.asarray(pi, jnp.float32)
        others = jnp.full_like(stats.topk_logp, -1e4)  # the first slot is the sampled token's
        ids = batch.rollout.topk_ids.at[..., 0].set(batch.rollout.response_tokens)
        rollout = replace(
            batch.rollout,
            response_mask=jnp.ones((ROWS, COLUMNS), jnp.bool_),
            logp_rollout=mu,
            topk_ids=ids,
            topk_logp_rollout=others.at[..., 0].set(mu),
        )
        extreme = replace(
            batch,
            rollout=rollout,
            advantages=jnp.broadcast_to(jnp.asarray(signs, jnp.float32), (ROWS, COLUMNS)),
            logp_old=mu,
            topk_logp_old=rollout.topk_logp_rollout,
        )
        scored = replace(stats, logp=pi, topk_logp=others.at[..., 0].set(pi))
        outcome = compiled(variant)(scored, extreme)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(outcome))


def test_types_are_kept(variant):
    """bfloat16 statistics: sums and metrics are float32, gradients have their input's type."""
    stats, batch = batch_of(variant)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), stats)
    batch = replace(batch, objective_state=variant.objective.initial_state)

    def leaves(stats, batch):
        return [jax.tree.leaves(o) for o in loss_and_gradient(variant.objective, stats, batch)]

    result, gradient = jax.eval_shape(leaves, half, batch)
    assert {leaf.dtype for leaf in result} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in gradient} == {jnp.dtype("bfloat16")}
