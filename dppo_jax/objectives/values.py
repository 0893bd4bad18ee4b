"""The critic's loss, added to a policy's objective: plain values (PPO) and quantiles (DVPO)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dppo_jax.objectives.aggregate import Aggregation, token_mean
from dppo_jax.objectives.measures import Anchor, rollout_anchor
from dppo_jax.objectives.ppo import ppo_clip
from dppo_jax.objectives.terms import with_term
from dppo_jax.records import Batch, Mean, Metrics, Need, Objective, TokenStats

NEEDS: frozenset[Need] = frozenset({"values"})


def with_value_loss(
    objective: Objective, coefficient: float = 0.5, clip: float | None = 0.2
) -> Objective:
    """Adds c · max((V - R)², (V_old + clip(V - V_old, ±clip) - R)²), R the estimator's returns.

    PPO (arXiv 1707.06347) eq. 9 with the value clipping of its implementation (openai/baselines;
    verl@1dda039b compute_value_loss, 0.5 · max); `clip` in the reward's unit, None for none. The
    critic's parameters are its own, so that c scales only its gradient.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive, or None for no clipping; got {clip}")

    def errors(stats: TokenStats, batch: Batch) -> tuple[Array, Array]:
        values, old, returns = _parts(stats, batch)
        if values.ndim != 2:
            raise ValueError("with_value_loss wants a critic of one value: quantiles are DVPO's")
        plain = jnp.square(values - returns)
        if clip is None:
            return plain, plain
        moved = values - old
        near = jnp.square(old + jnp.clip(moved, -clip, clip) - returns)
        return plain, jnp.where(jnp.abs(moved) > clip, near, plain)  # not by a rounding

    def term(stats: TokenStats, batch: Batch) -> Float[Array, "B T"]:
        return coefficient * jnp.maximum(*errors(stats, batch))

    def metrics(stats: TokenStats, batch: Batch) -> Metrics:
        plain, clipped = errors(stats, batch)
        values, _, _ = _parts(stats, batch)
        mask = batch.rollout.response_mask
        count = mask.sum().astype(jnp.float32)
        return {
            "critic/squared_error": Mean(jnp.sum(plain, where=mask), count),
            "critic/clipped": Mean(jnp.sum(clipped > plain, where=mask).astype(jnp.float32), count),
            "critic/value_mean": Mean(jnp.sum(values, where=mask), count),
        }

    return with_term(objective, term, name="loss/value", needs=NEEDS, metrics=metrics)


def with_quantile_value_loss(
    objective: Objective,
    coefficient: float = 0.5,
    kappa: float = 1.0,
    heads: int = 1,
    tail: float = 0.1,
    tail_weight: float = 0.1,
    contract: float = 0.1,
    expand: float = 0.1,
    mean_weight: float = 0.1,
    curvature_weight: float = 0.01,
    consistency_weight: float = 0.01,
) -> Objective:
    """Experimental, DVPO's critic: quantiles θ [heads, Q] towards the returns' quantiles y [Q].

    c · (mean_ij ρ_i(y_j - θ_i)
         + w_t ((low θ - m - (1 - contract)(low y - m))² + (high θ - m - (1 + expand)(high y - m))²)
         + w_m (mean θ - m)² + w_c mean_tails (θ_{i+1} - 2θ_i + θ_{i-1})²
         + w_h mean (θ - mean_h θ)²)
    with m = mean y, ρ_i(u) = |τ_i - 1[u < 0]| Huber_κ(u) / κ at τ_i = (i - ½)/Q (arXiv 1710.10044
    eq. 10), and low, high the means of the `tail` share of quantiles at either end (CVaR).
    DVPO (arXiv 2512.03847) names these parts, contracts the lower and expands the upper tail, and
    weights its risk interval by 0.1. Assumed, since no formula was found: every form above but ρ,
    all other weights, tail = 0.1, and a bounded target for each tail in the place of a reward for
    its width, which no Huber loss would hold.
    """
    if not kappa > 0 or not 0 < tail <= 0.5 or heads < 1:
        raise ValueError(f"kappa={kappa} > 0, 0 < tail={tail} <= 0.5 and heads={heads} >= 1 needed")

    def term(stats: TokenStats, batch: Batch) -> Float[Array, "B T"]:
        values, _, target = _parts(stats, batch)
        quantiles = target.shape[-1]
        if values.ndim != 3 or values.shape[-1] != heads * quantiles:
            raise ValueError(
                f"{heads} heads of {quantiles} quantiles need a critic of {heads * quantiles} "
                f"values, not {values.shape[2:]}: set its outputs, and distributional_gae's heads"
            )
        theta = values.reshape(*values.shape[:2], heads, quantiles)
        target = jnp.sort(target, axis=-1)
        mean = target.mean(axis=-1)
        count = max(1, round(tail * quantiles))

        def low(x: Array) -> Array:
            return x[..., :count].mean(axis=-1)

        def high(x: Array) -> Array:
            return x[..., -count:].mean(axis=-1)

        m = mean[..., None]
        lower = low(theta) - m - (1.0 - contract) * (low(target)[..., None] - m)
        upper = high(theta) - m - (1.0 + expand) * (high(target)[..., None] - m)
        bend = jnp.square(theta[..., 2:] - 2.0 * theta[..., 1:-1] + theta[..., :-2])
        bends = low(bend) + high(bend) if quantiles > 2 else jnp.zeros(theta.shape[:3])
        spread = jnp.square(theta - theta.mean(axis=2, keepdims=True)).mean(axis=-1)
        by_head = (
            quantile_huber(theta, target[..., None, :], kappa)
            + tail_weight * (lower**2 + upper**2)
            + mean_weight * jnp.square(theta.mean(axis=-1) - m)
            + curvature_weight * bends
            + consistency_weight * spread
        )
        return coefficient * by_head.mean(axis=-1)

    def metrics(stats: TokenStats, batch: Batch) -> Metrics:
        values, _, target = _parts(stats, batch)
        mask = batch.rollout.response_mask
        count = mask.sum().astype(jnp.float32)
        error = jnp.square(values.mean(axis=-1) - target.mean(axis=-1))
        return {
            "critic/squared_error": Mean(jnp.sum(error, where=mask), count),
            "critic/value_mean": Mean(jnp.sum(values.mean(axis=-1), where=mask), count),
            "critic/value_spread": Mean(jnp.sum(values.std(axis=-1), where=mask), count),
        }

    return with_term(objective, term, name="loss/value", needs=NEEDS, metrics=metrics)


def ppo_critic(
    delta_low: float = 0.2,
    delta_high: float = 0.2,
    value_coefficient: float = 0.5,
    value_clip: float | None = 0.2,
    dual_clip: float | None = None,
    anchor: Callable[[], Anchor] = rollout_anchor,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """PPO with a critic: `ppo_clip` and `with_value_loss`, for `advantages.gae`.

    PPO (arXiv 1707.06347) eqs. 7 and 9, without the entropy term: `with_entropy_bonus` adds it.
    """
    policy = ppo_clip(delta_low, delta_high, dual_clip, anchor, aggregate)
    return with_value_loss(policy, value_coefficient, value_clip)


def dvpo(
    delta_low: float = 0.2,
    delta_high: float = 0.2,
    value_coefficient: float = 0.5,
    heads: int = 1,
    tail: float = 0.1,
    tail_weight: float = 0.1,
    anchor: Callable[[], Anchor] = rollout_anchor,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """Experimental: `ppo_clip` with a critic of quantiles, for `advantages.distributional_gae`.

    DVPO (arXiv 2512.03847). Assumed here: PPO's clip for the policy, and what
    `with_quantile_value_loss` and `distributional_gae` assume for values and advantages.
    """
    policy = ppo_clip(delta_low, delta_high, None, anchor, aggregate)
    return with_quantile_value_loss(
        policy, value_coefficient, heads=heads, tail=tail, tail_weight=tail_weight
    )


def quantile_huber(
    theta: Float[Array, "*N Q"], target: Float[Array, "*#N R"], kappa: float
) -> Float[Array, "*N"]:
    """mean_ij |τ_i - 1[u_ij < 0]| Huber_κ(u_ij) / κ, u_ij = y_j - θ_i, τ_i = (i - ½)/Q.

    QR-DQN (arXiv 1710.10044) eq. 10, divided by Q. One target after another: never N x Q x R.
    """
    taus = (jnp.arange(theta.shape[-1]) + 0.5) / theta.shape[-1]

    @jax.checkpoint
    def add(total: Array, y: Array) -> tuple[Array, None]:
        gap = y[..., None] - theta
        size = jnp.abs(gap)
        huber = jnp.where(size <= kappa, 0.5 * size**2, kappa * (size - 0.5 * kappa)) / kappa
        return total + (jnp.abs(taus - (gap < 0)) * huber).mean(axis=-1), None

    total, _ = jax.lax.scan(add, jnp.zeros(theta.shape[:-1]), jnp.moveaxis(target, -1, 0))
    return total / target.shape[-1]


def _parts(stats: TokenStats, batch: Batch) -> tuple[Array, Array, Array]:
    """The critic's values, those before the update, and what they should have been."""
    if stats.values is None or batch.values_old is None:
        raise ValueError("the value loss needs a critic: set train.critic")
    if batch.returns is None:
        raise ValueError(
            "the value loss needs returns: use advantages.gae, or another that has them"
        )
    return stats.values, batch.values_old, batch.returns
