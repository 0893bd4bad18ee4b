"""Objectives whose importance ratio is one number a sequence: GSPO, GMPO, LUSPO.

Sums run over response tokens. A sequence's advantage may differ from token to token: GSPO keeps
each token's, GMPO takes their mean.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dppo_jax.objectives.aggregate import Aggregation, seq_mean_token_mean, seq_mean_token_sum
from dppo_jax.objectives.measures import Anchor, bounded_exp, rollout_anchor
from dppo_jax.objectives.policy_gradient import TokenLoss, from_sequence_loss
from dppo_jax.objectives.ppo import clipped_surrogate
from dppo_jax.objectives.trust_region import check_thresholds
from dppo_jax.records import Batch, Objective, TokenStats

SEQUENCE_CEILING = 10.0  # of log s, as in verl


def sequence_mean(values: Float[Array, "B T"], batch: Batch) -> Float[Array, "B 1"]:
    """The mean over a sequence's response tokens; 0 where it has none."""
    mask = batch.rollout.response_mask
    total = jnp.sum(values, axis=1, keepdims=True, where=mask)
    return total / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)


def gspo(
    delta_low: float = 3e-4,
    delta_high: float = 4e-4,
    anchor: Callable[[], Anchor] = rollout_anchor,
    aggregate: Aggregation = seq_mean_token_mean,
) -> Objective:
    """GSPO: PPO's clip on s = exp(mean_t log π/anchor); arXiv 2507.18071 eqs. 5, 7.

    s is at most e^10 in value (verl@1dda039b). Clips of sec. 5.1.
    """
    return _gspo(lambda log_s, logp: log_s, delta_low, delta_high, anchor, aggregate)


def gspo_token(
    delta_low: float = 3e-4,
    delta_high: float = 4e-4,
    anchor: Callable[[], Anchor] = rollout_anchor,
    aggregate: Aggregation = seq_mean_token_mean,
) -> Objective:
    """GSPO-token: the ratio sg[s]·π/sg[π], for advantages that vary by token; eqs. 13, 14.

    With one advantage a sequence it has GSPO's value and gradient. verl's mode `gspo`.
    """

    def token_ratio(log_s: Float[Array, "B 1"], logp: Float[Array, "B T"]) -> Float[Array, "B T"]:
        return jax.lax.stop_gradient(log_s) + logp - jax.lax.stop_gradient(logp)

    return _gspo(token_ratio, delta_low, delta_high, anchor, aggregate)


def luspo(
    delta_low: float = 3e-4,
    delta_high: float = 4e-4,
    anchor: Callable[[], Anchor] = rollout_anchor,
    aggregate: Aggregation = seq_mean_token_sum,
) -> Objective:
    """LUSPO: GSPO's loss of a sequence times its length, so that long answers weigh no less.

    TRL@f2cd57710 loss_type "luspo": the sum over tokens in place of GSPO's mean.
    """
    return gspo(delta_low, delta_high, anchor, aggregate)


def _gspo(
    log_ratio: Callable[[Float[Array, "B 1"], Float[Array, "B T"]], Float[Array, "B T"]],
    delta_low: float,
    delta_high: float,
    anchor: Callable[[], Anchor],
    aggregate: Aggregation,
) -> Objective:
    check_thresholds(delta_low, delta_high)
    centre = anchor()

    def token_loss(stats: TokenStats, batch: Batch) -> TokenLoss:
        gap = stats.logp - centre.logps(batch).logp
        ratio = bounded_exp(log_ratio(sequence_mean(gap, batch), stats.logp), SEQUENCE_CEILING)
        return clipped_surrogate(
            jnp.broadcast_to(ratio, gap.shape),
            batch.advantages,
            lowest=1.0 - delta_low,
            highest=1.0 + delta_high,
        )

    return from_sequence_loss(token_loss, aggregate=aggregate, needs=centre.needs)


def gmpo(
    delta_low: float = 0.4,
    delta_high: float = 0.4,
    anchor: Callable[[], Anchor] = rollout_anchor,
    aggregate: Aggregation = seq_mean_token_mean,
) -> Objective:
    """GMPO: the geometric mean of token ratios, each clipped by itself; arXiv 2507.20673.

    -A·exp(mean_t l_t), l = min(log r, δ_high) where A > 0 and max(log r, -δ_low) where A < 0, with
    A the mean of the sequence's advantages. The exponent is at most 20. verl's mode `geo_mean`.
    """
    check_thresholds(delta_low, delta_high)
    centre = anchor()

    def token_loss(stats: TokenStats, batch: Batch) -> TokenLoss:
        gap = stats.logp - centre.logps(batch).logp
        raised = (batch.advantages > 0) & (gap > delta_high)
        lowered = (batch.advantages < 0) & (gap < -delta_low)
        clipped = jnp.where(raised, delta_high, jnp.where(lowered, -delta_low, gap))
        # a token without advantage does not move its sequence
        clipped = jnp.where(batch.advantages == 0, 0.0, clipped)
        ratio = bounded_exp(sequence_mean(clipped, batch), 20.0)
        loss = -sequence_mean(batch.advantages, batch) * ratio
        return TokenLoss(jnp.broadcast_to(loss, gap.shape), ~(raised | lowered))

    return from_sequence_loss(token_loss, aggregate=aggregate, needs=centre.needs)
