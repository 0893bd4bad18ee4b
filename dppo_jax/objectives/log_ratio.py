"""Losses on log π itself, without a ratio as weight: CPGD and DRO."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dppo_jax.objectives.aggregate import Aggregation, seq_mean_token_mean, token_mean
from dppo_jax.objectives.measures import (
    Anchor,
    binary_tv_measure,
    rollout_anchor,
    surrogate_ratio,
)
from dppo_jax.objectives.policy_gradient import TokenLoss, from_token_loss
from dppo_jax.records import Batch, Objective, TokenStats

SQUARE_BOUND = 20.0  # of |log r| in DRO's square


def cpgd(
    delta_low: float = 0.2,
    delta_high: float = 0.2,
    drift: float = 0.0,
    anchor: Callable[[], Anchor] = rollout_anchor,
    aggregate: Aggregation = seq_mean_token_mean,
) -> Objective:
    """CPGD: -A·log π, its log clipped at the anchor's log + log(1 ± δ), plus drift·KL(anchor || π).

    arXiv 2505.12504; the clipped part is LightRFT@49e62cb6 lightrft/models/loss.py. The gradient is
    REINFORCE's, with no ratio, and 0 where clipped.
    Assumed here for the drift, whose estimator and coefficient are not at hand: k3 = r - 1 - log r
    with r = π/anchor, over all tokens, clipped ones too; off by default.
    """
    if not (0 <= delta_low < 1 and delta_high >= 0 and drift >= 0):
        raise ValueError(
            f"cpgd needs 0 <= delta_low < 1, delta_high >= 0, drift >= 0, got {delta_low}, "
            f"{delta_high}, {drift}"
        )
    centre = anchor()

    def token_loss(stats: TokenStats, batch: Batch) -> TokenLoss:
        logps = centre.logps(batch)
        gap = stats.logp - logps.logp
        raised = (batch.advantages > 0) & (gap > math.log1p(delta_high))
        lowered = (batch.advantages < 0) & (gap < math.log1p(-delta_low))
        bound = logps.logp + jnp.where(raised, math.log1p(delta_high), math.log1p(-delta_low))
        loss = -batch.advantages * jnp.where(raised | lowered, bound, stats.logp)
        if drift:
            loss += drift * (surrogate_ratio(stats.logp, logps.logp) - 1.0 - gap)
        return TokenLoss(loss, ~(raised | lowered), binary_tv_measure(stats, batch, logps))

    return from_token_loss(token_loss, aggregate=aggregate, needs=centre.needs)


def dro(
    beta: float = 0.1,
    anchor: Callable[[], Anchor] = rollout_anchor,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """DRO: -(A·log π - β/2·(log π/anchor)²) a token; verl@1dda039b loss mode `dro`.

    After arXiv 2405.19107, whose loss is a sequence's and has a value function. β must be chosen:
    verl has no default, 0.1 is ours. Differs from verl: where |log r| > 20 the square goes on with
    the slope it has there, so that a token that far out is still pulled back.
    """
    if not beta >= 0:
        raise ValueError(f"beta must be >= 0, got {beta}")
    centre = anchor()

    def token_loss(stats: TokenStats, batch: Batch) -> TokenLoss:
        logps = centre.logps(batch)
        gap = stats.logp - logps.logp
        near = jnp.clip(jax.lax.stop_gradient(gap), -SQUARE_BOUND, SQUARE_BOUND)
        # near·gap has the square's gradient; the rest makes its value right where |gap| <= 20
        square = 2.0 * near * gap - near**2
        loss = -batch.advantages * stats.logp + 0.5 * beta * square
        kept = jnp.ones(loss.shape, jnp.bool_)
        return TokenLoss(loss, kept, binary_tv_measure(stats, batch, logps))

    return from_token_loss(token_loss, aggregate=aggregate, needs=centre.needs)
