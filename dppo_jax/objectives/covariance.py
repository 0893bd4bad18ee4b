"""Entropy kept by the covariance of advantage and log-probability (arXiv 2505.22617).

cov_t = (A_t - mean A)(log π_t - mean log π), means over the response tokens of the minibatch: the
tokens where it is large are those that make the policy's entropy collapse.
Differs from verl@1dda039b, whose means and numbers of tokens are those of a device's microbatch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from dppo_jax.objectives.aggregate import Aggregation, token_mean
from dppo_jax.objectives.measures import Anchor, rollout_anchor, surrogate_ratio
from dppo_jax.objectives.policy_gradient import TokenLoss, from_batch_loss
from dppo_jax.objectives.ppo import clipped_surrogate
from dppo_jax.objectives.trust_region import check_thresholds
from dppo_jax.records import Batch, Objective, TokenStats


class Means(NamedTuple):
    """Over the response tokens of a minibatch."""

    advantage: Float[Array, ""]
    logp: Float[Array, ""]


class Chosen(NamedTuple):
    """Which tokens: those on the right side of a threshold."""

    means: Means
    threshold: Float[Array, ""]


def means(stats: TokenStats, batch: Batch) -> Means:
    """Those that `covariance` is measured from."""
    mask = batch.rollout.response_mask
    count = jnp.maximum(mask.sum(), 1)
    return Means(
        jnp.sum(batch.advantages, where=mask) / count, jnp.sum(stats.logp, where=mask) / count
    )


def covariance(stats: TokenStats, batch: Batch, around: Means) -> Float[Array, "B T"]:
    """cov_t at every token, without gradient."""
    logp = jax.lax.stop_gradient(stats.logp)
    return (batch.advantages - around.advantage) * (logp - around.logp)


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
    Differs from the reference: the draw is a hash of what the sampler recorded, so that the loss is
    a pure function; samples of a prompt that are equal in every token are drawn together.
    """
    _check_fraction(fraction)
    check_thresholds(delta_low, delta_high)
    if not cov_low < cov_high:
        raise ValueError(f"cov_low must be below cov_high, got {cov_low} and {cov_high}")
    centre = anchor()

    def clipped(stats: TokenStats, batch: Batch) -> TokenLoss:
        ratio = surrogate_ratio(stats.logp, centre.logps(batch).logp)
        return clipped_surrogate(
            ratio, batch.advantages, lowest=1.0 - delta_low, highest=1.0 + delta_high
        )

    def eligible(stats: TokenStats, batch: Batch, around: Means) -> Bool[Array, "B T"]:
        cov = covariance(stats, batch, around)
        inside = (cov > cov_low) & (cov < cov_high) & batch.rollout.response_mask
        return inside & clipped(stats, batch).keep

    def choose(stats: TokenStats, batch: Batch) -> Chosen:
        around = means(stats, batch)
        numbers = jnp.where(eligible(stats, batch, around), random_numbers(batch), 2.0)
        return Chosen(around, _smallest(numbers, fraction, batch.rollout.response_mask)[0])

    def token_loss(stats: TokenStats, batch: Batch, chosen: Chosen) -> TokenLoss:
        loss, keep, _, _ = clipped(stats, batch)
        drawn = eligible(stats, batch, chosen.means) & (random_numbers(batch) <= chosen.threshold)
        return TokenLoss(jnp.where(drawn, 0.0, loss), keep & ~drawn)

    return from_batch_loss(choose, token_loss, aggregate=aggregate, needs=centre.needs)


def kl_cov(
    fraction: float = 2e-4,
    coefficient: float = 1.0,
    anchor: Callable[[], Anchor] = rollout_anchor,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """KL-Cov: -A·r, plus coefficient·|log r| at the max(1, fraction·tokens) of largest covariance.

    verl@1dda039b compute_policy_loss_kl_cov. No clip.
    Differs from the reference: of tokens that tie for the last of these places it penalises none,
    and so none at all where all advantages are 0.
    """
    _check_fraction(fraction)
    if not coefficient >= 0:
        raise ValueError(f"coefficient must be >= 0, got {coefficient}")
    centre = anchor()

    def choose(stats: TokenStats, batch: Batch) -> Chosen:
        around, mask = means(stats, batch), batch.rollout.response_mask
        falling = jnp.where(mask, -covariance(stats, batch, around), jnp.inf)
        last, after = _smallest(falling, fraction, mask)
        # Between the two, as the next pass over a token may round it otherwise.
        between = jnp.where(jnp.isfinite(after), 0.5 * (last + after), last + 1.0)
        return Chosen(around, jnp.where(jnp.isfinite(last), between, 0.0))

    def token_loss(stats: TokenStats, batch: Batch, chosen: Chosen) -> TokenLoss:
        gap = stats.logp - centre.logps(batch).logp
        loss = -batch.advantages * surrogate_ratio(stats.logp, centre.logps(batch).logp)
        largest = -covariance(stats, batch, chosen.means) < chosen.threshold
        # |gap| whose gradient at 0, on policy, is 0: that of jnp.abs is 1
        penalty = coefficient * jax.lax.stop_gradient(jnp.sign(gap)) * gap
        kept = jnp.ones(loss.shape, jnp.bool_)
        return TokenLoss(loss + jnp.where(largest, penalty, 0.0), kept)

    return from_batch_loss(choose, token_loss, aggregate=aggregate, needs=centre.needs)


def random_numbers(batch: Batch) -> Float[Array, "B T"]:
    """A number in [0, 1) for each token, a hash of its sequence's tokens, their μ and its place.

    The same in whatever company, since no row's index is in it, and in every gradient step.
    """
    rollout = batch.rollout
    place = jnp.arange(rollout.response_mask.shape[1], dtype=jnp.uint32)
    token = rollout.response_tokens.astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(rollout.logp_rollout.astype(jnp.float32), jnp.uint32)
    tokens = jnp.where(rollout.response_mask, _mixed(bits ^ _mixed(token ^ _mixed(place))), 0)
    sequence = jnp.sum(tokens, axis=1, keepdims=True, dtype=jnp.uint32)
    return (_mixed(tokens ^ _mixed(sequence)) >> 8).astype(jnp.float32) / 2**24


def _mixed(bits: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Bits that look random and depend on the given ones alone: the end of murmur3."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def _smallest(
    values: Float[Array, "B T"], fraction: float, mask: Bool[Array, "B T"]
) -> Float[Array, " 2"]:
    """The last of the max(1, ⌊fraction·tokens⌋) smallest, and the one after it or infinity."""
    count = jnp.maximum(jnp.floor(fraction * mask.sum()).astype(jnp.int32), 1)
    ordered = jnp.append(jnp.sort(values.ravel()), jnp.inf)
    return jax.lax.dynamic_slice(ordered, (count - 1,), (2,))


def _check_fraction(fraction: float) -> None:
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1], got {fraction}")
