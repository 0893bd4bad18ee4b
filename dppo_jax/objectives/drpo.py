"""DRPO and SPO: a quadratic penalty in place of the mask (arXiv 2606.09821).

All share -A·r + |A|·m·(r - 1)² / 2δ with r = π/μ differentiable and a constant m >= 0. Its gradient
is that of -w·r·A·log π with w = 1 - sign(A(r - 1))·m·|r - 1| / δ: below 0, and so corrective, once
the token is further out than δ. Nothing is dropped. `delta_low` and `delta_high` replace δ for
tokens with A < 0 and A > 0. r is at most e^20 in value.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dppo_jax.objectives.aggregate import Aggregation, token_mean
from dppo_jax.objectives.measures import (
    Anchor,
    AnchorLogps,
    binary_tv_measure,
    rollout_anchor,
    surrogate_ratio,
)
from dppo_jax.objectives.policy_gradient import TokenLoss, from_token_loss
from dppo_jax.objectives.trust_region import bounded, by_sign, sides
from dppo_jax.records import Batch, Objective, TokenStats

Multiplier = Callable[[TokenStats, Batch, AnchorLogps], Float[Array, "B T"]]


def drpo(
    delta: float = 12.5,
    delta_low: float | None = None,
    delta_high: float | None = None,
    anchor: Callable[[], Anchor] = rollout_anchor,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """DRPO: m = μ, so that w = 1 - sign(A(r - 1))·|π - μ| / δ. arXiv 2606.09821 eqs. 8, 9.

    δ in probability. The default is the paper's sec. 4 and UniRL@1a7b501e's taken literally; as
    |π - μ| <= 1, it damps by 8 % at most. With δ = 0.15 the weight changes sign where DPPO masks.
    """

    def mu(stats: TokenStats, batch: Batch, logps: AnchorLogps) -> Float[Array, "B T"]:
        return jnp.exp(logps.logp)

    return _penalised(mu, sides(delta, delta_low, delta_high), anchor, aggregate)


def mask_drpo(
    delta: float = 12.5,
    boundary: float = 0.15,
    delta_low: float | None = None,
    delta_high: float | None = None,
    anchor: Callable[[], Anchor] = rollout_anchor,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """Mask-DRPO: DRPO's penalty only where DPPO-Binary-TV would drop the token.

    m = μ where |π - μ| > boundary and moving away, else 0: an ablation of arXiv 2606.09821.
    Assumed here: that the paper's "outside the DPPO boundary" includes the direction.
    """
    region = bounded(binary_tv_measure, delta_low=boundary, delta_high=boundary, anchor=anchor)

    def mu_outside(stats: TokenStats, batch: Batch, logps: AnchorLogps) -> Float[Array, "B T"]:
        return jnp.where(region.decide(stats, batch).keep, 0.0, jnp.exp(logps.logp))

    return _penalised(mu_outside, sides(delta, delta_low, delta_high), anchor, aggregate)


def spo(
    delta: float = 12.5,
    delta_low: float | None = None,
    delta_high: float | None = None,
    anchor: Callable[[], Anchor] = rollout_anchor,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """SPO: m = 1, a bound on the ratio instead of the probability: w = 1 - sign(..)·|r - 1| / δ.

    δ is a ratio's distance from 1. UniRL@1a7b501e unirl/algorithms/drpo.py with
    penalty_mu_weighted=False; 12.5 as in arXiv 2606.09821 sec. 4.
    """

    def one(stats: TokenStats, batch: Batch, logps: AnchorLogps) -> Float[Array, "B T"]:
        return jnp.ones_like(logps.logp)

    return _penalised(one, sides(delta, delta_low, delta_high), anchor, aggregate)


def _penalised(
    multiplier: Multiplier,
    deltas: tuple[float, float],
    anchor: Callable[[], Anchor],
    aggregate: Aggregation,
) -> Objective:
    if not min(deltas) > 0:
        raise ValueError(f"delta must be positive, got {deltas}")
    centre = anchor()

    def token_loss(stats: TokenStats, batch: Batch) -> TokenLoss:
        logps = centre.logps(batch)
        ratio = surrogate_ratio(stats.logp, logps.logp)
        m = jax.lax.stop_gradient(multiplier(stats, batch, logps))
        penalty = m * (ratio - 1.0) ** 2 / (2.0 * by_sign(batch, *deltas))
        loss = -batch.advantages * ratio + jnp.abs(batch.advantages) * penalty
        kept = jnp.ones(loss.shape, jnp.bool_)
        return TokenLoss(loss, kept, binary_tv_measure(stats, batch, logps))

    return from_token_loss(token_loss, aggregate=aggregate, needs=centre.needs)
