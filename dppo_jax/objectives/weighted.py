"""Score-function losses -w·A·log π with a bounded weight and no mask: REINFORCE, CISPO, MinPRO."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dppo_jax.objectives.aggregate import Aggregation, token_mean
from dppo_jax.objectives.measures import (
    LOG_RATIO_CEILING,
    Anchor,
    importance_ratio,
    rollout_anchor,
)
from dppo_jax.objectives.policy_gradient import TokenLoss, from_sequence_loss, from_token_loss
from dppo_jax.records import Batch, Objective, TokenStats


def reinforce(aggregate: Aggregation = token_mean) -> Objective:
    """REINFORCE: -A·log π, no ratio; right where each batch takes one gradient step.

    The loss of OPO (arXiv 2505.23585), of verl@1dda039b's mode `gpg` and, with one step a batch, of
    REINFORCE++; they differ in their advantages.
    """
    return from_token_loss(
        lambda stats, batch: _score(jnp.ones_like(stats.logp), stats, batch), aggregate=aggregate
    )


def cispo(
    lowest: float = 0.0,
    highest: float = 5.0,
    anchor: Callable[[], Anchor] = rollout_anchor,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """CISPO: -sg[clip(r, lowest, highest)]·A·log π; arXiv 2506.13585 eqs. 4, 5.

    The bounds are ratios, 1 - ε_low and 1 + ε_high of the paper, which leaves the lower one
    inactive and does not give the upper; 5 is TRL's recommendation. `pg_tis` is CISPO as the DPPO
    paper runs it.
    """
    if not 0 <= lowest <= highest:
        raise ValueError(f"bounds must be 0 <= lowest <= highest, got {lowest} and {highest}")
    centre = anchor()

    def token_loss(stats: TokenStats, batch: Batch) -> TokenLoss:
        ratio = importance_ratio(stats.logp, centre.logps(batch).logp)
        return _score(jnp.clip(ratio, lowest, highest), stats, batch)

    return from_token_loss(token_loss, aggregate=aggregate, needs=centre.needs)


def minpro(
    cap: float = jnp.inf,
    anchor: Callable[[], Anchor] = rollout_anchor,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """MinPRO (experimental): -sg[min(r_t · min_{j<t} r_j, C)]·A·log π; arXiv 2601.22718.

    The smallest ratio before a token stands for the product of all of them; 1 at the first token.
    Assumed here, as no official formula or code is at hand: the weight is r_t times that minimum,
    which excludes t; it is detached; only `cap` bounds it.
    """
    if not cap > 0:
        raise ValueError(f"cap must be positive, got {cap}")
    centre = anchor()

    def token_loss(stats: TokenStats, batch: Batch) -> TokenLoss:
        gap = jax.lax.stop_gradient(stats.logp - centre.logps(batch).logp)
        log_weight = jnp.minimum(gap + _smallest_before(gap, batch), LOG_RATIO_CEILING)
        return _score(jnp.minimum(jnp.exp(log_weight), cap), stats, batch)

    return from_sequence_loss(token_loss, aggregate=aggregate, needs=centre.needs)


def _smallest_before(gap: Float[Array, "B T"], batch: Batch) -> Float[Array, "B T"]:
    """min_{j<t} log r_j over response tokens; 0 where there is none before."""
    so_far = jax.lax.cummin(jnp.where(batch.rollout.response_mask, gap, jnp.inf), axis=1)
    before = jnp.pad(so_far[:, :-1], [(0, 0), (1, 0)], constant_values=jnp.inf)
    return jnp.where(before == jnp.inf, 0.0, before)


def _score(weight: Float[Array, "B T"], stats: TokenStats, batch: Batch) -> TokenLoss:
    logp = jnp.where(weight > 0, stats.logp, 0.0)
    return TokenLoss(-batch.advantages * weight * logp, jnp.ones(weight.shape, jnp.bool_))
