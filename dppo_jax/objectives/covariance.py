"""Entropy kept by the covariance of advantage and log-probability (arXiv 2505.22617).

cov_t = (A_t - mean A)(log π_t - mean log π) over the response tokens of the microbatch: the tokens
where it is large are those that make the policy's entropy collapse.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dppo_jax.objectives.aggregate import Aggregation, token_mean
from dppo_jax.objectives.measures import Anchor, rollout_anchor, surrogate_ratio
from dppo_jax.objectives.policy_gradient import TokenLoss, from_batch_loss
from dppo_jax.objectives.ppo import clipped_surrogate
from dppo_jax.records import Batch, Objective, TokenStats


def covariance(stats: TokenStats, batch: Batch) -> Float[Array, "B T"]:
    """cov_t at every token, without gradient."""
    mask = batch.rollout.response_mask
    logp = jax.lax.stop_gradient(stats.logp)
    count = jnp.maximum(mask.sum(), 1)
    logp_mean = jnp.sum(logp, where=mask) / count
    advantage_mean = jnp.sum(batch.advantages, where=mask) / count
    return (batch.advantages - advantage_mean) * (logp - logp_mean)


def clip_cov(
    fraction: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    delta_low: float = 0.2,
    delta_high: float = 0.2,
    anchor: Callable[[], Anchor] = rollout_anchor,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """Clip-Cov: PPO's clip, and no loss at a random few of the tokens of high covariance.

    Of the tokens with cov in (cov_low, cov_high) that the clip leaves, max(1, fraction·tokens) are
    drawn. verl@1dda039b compute_policy_loss_clip_cov.
    Differs from the reference: the draw is a hash of each token's log π, so that the loss is a pure
    function and its draws change with the policy.
    """
    _check_fraction(fraction)
    centre = anchor()

    def token_loss(stats: TokenStats, batch: Batch) -> TokenLoss:
        mask = batch.rollout.response_mask
        ratio = surrogate_ratio(stats.logp, centre.logps(batch).logp)
        clipped = clipped_surrogate(
            ratio, batch.advantages, lowest=1.0 - delta_low, highest=1.0 + delta_high
        )
        cov = covariance(stats, batch)
        eligible = (cov > cov_low) & (cov < cov_high) & mask & clipped.keep
        drawn = eligible & _smallest(jnp.where(eligible, _hash(stats.logp), 2.0), fraction, mask)
        return TokenLoss(jnp.where(drawn, 0.0, clipped.loss), clipped.keep & ~drawn)

    return from_batch_loss(token_loss, aggregate=aggregate, needs=centre.needs)


def kl_cov(
    fraction: float = 2e-4,
    coefficient: float = 1.0,
    anchor: Callable[[], Anchor] = rollout_anchor,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """KL-Cov: -A·r, plus coefficient·|log r| at the max(1, fraction·tokens) of largest covariance.

    verl@1dda039b compute_policy_loss_kl_cov. No clip.
    """
    _check_fraction(fraction)
    centre = anchor()

    def token_loss(stats: TokenStats, batch: Batch) -> TokenLoss:
        mask = batch.rollout.response_mask
        logp_anchor = centre.logps(batch).logp
        loss = -batch.advantages * surrogate_ratio(stats.logp, logp_anchor)
        chosen = mask & _smallest(
            jnp.where(mask, -covariance(stats, batch), jnp.inf), fraction, mask
        )
        gap = stats.logp - logp_anchor
        # |gap| whose gradient at 0, on policy, is 0: that of jnp.abs is 1
        penalty = coefficient * jax.lax.stop_gradient(jnp.sign(gap)) * gap
        kept = jnp.ones(loss.shape, jnp.bool_)
        return TokenLoss(loss + jnp.where(chosen, penalty, 0.0), kept)

    return from_batch_loss(token_loss, aggregate=aggregate, needs=centre.needs)


def _smallest(
    values: Float[Array, "B T"], fraction: float, mask: Bool[Array, "B T"]
) -> Bool[Array, "B T"]:
    """The max(1, ⌊fraction·tokens⌋) smallest values."""
    count = jnp.maximum(jnp.floor(fraction * mask.sum()).astype(jnp.int32), 1)
    return values <= jnp.sort(values.ravel())[count - 1]


def _hash(values: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """A number in [0, 1) that looks random and depends on a float's bits alone (murmur3's end)."""
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(values), jnp.uint32)
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return ((bits ^ (bits >> 16)) >> 8).astype(jnp.float32) / 2**24


def _check_fraction(fraction: float) -> None:
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1], got {fraction}")
