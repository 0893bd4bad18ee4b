"""Smooth weights in place of a clip: SAPO for each token, VESPO for the whole sequence."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dppo_jax.objectives.aggregate import Aggregation, seq_mean_token_mean, token_mean
from dppo_jax.objectives.measures import Anchor, binary_tv_measure, rollout_anchor, surrogate_ratio
from dppo_jax.objectives.policy_gradient import TokenLoss, from_sequence_loss, from_token_loss
from dppo_jax.records import Batch, Objective, TokenStats

TOKEN_BOUND = 20.0  # of |log r| before it is summed over a sequence
LOWEST_LOG_WEIGHT = -18.420681  # log 1e-8


def sapo(
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    anchor: Callable[[], Anchor] = rollout_anchor,
    aggregate: Aggregation = seq_mean_token_mean,
) -> Objective:
    """SAPO: -A·(4/τ)·sigmoid(τ(r - 1)), τ by the sign of A; arXiv 2511.20347.

    On policy the gate's slope is 1, the plain policy gradient; it falls on both sides. A = 0 takes
    τ_negative, as in verl@1dda039b.
    """
    if not (tau_positive > 0 and tau_negative > 0):
        raise ValueError(f"temperatures must be positive, got {tau_positive}, {tau_negative}")
    centre = anchor()

    def token_loss(stats: TokenStats, batch: Batch) -> TokenLoss:
        logps = centre.logps(batch)
        tau = jnp.where(batch.advantages > 0, tau_positive, tau_negative)
        gate = jax.nn.sigmoid(tau * (surrogate_ratio(stats.logp, logps.logp) - 1.0)) * 4.0 / tau
        kept = jnp.ones(gate.shape, jnp.bool_)
        return TokenLoss(-batch.advantages * gate, kept, binary_tv_measure(stats, batch, logps))

    return from_token_loss(token_loss, aggregate=aggregate, needs=centre.needs)


def vespo(
    k_positive: float = 2.0,
    lambda_positive: float = 3.0,
    k_negative: float = 3.0,
    lambda_negative: float = 2.0,
    anchor: Callable[[], Anchor] = rollout_anchor,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """VESPO: -sg[φ(w)]·A·log π, w the sequence's product of ratios; arXiv 2602.10693.

    φ(w) = w^k · e^{λ(1 - w)}, which is 1 at w = 1; k and λ by the sign of A, A = 0 with the
    positive. log w sums log r clipped to ±20 and is clipped to [log 1e-8, 20]: TRL@f2cd57710
    get_gamma_weights, whose defaults these are too.
    """
    centre = anchor()

    def token_loss(stats: TokenStats, batch: Batch) -> TokenLoss:
        gap = jax.lax.stop_gradient(stats.logp - centre.logps(batch).logp)
        log_w = jnp.sum(jnp.clip(gap, -TOKEN_BOUND, TOKEN_BOUND), axis=1, keepdims=True)
        log_w = jnp.clip(log_w, LOWEST_LOG_WEIGHT, TOKEN_BOUND)
        k = jnp.where(batch.advantages >= 0, k_positive, k_negative)
        lam = jnp.where(batch.advantages >= 0, lambda_positive, lambda_negative)
        weight = jnp.exp(k * log_w - lam * jnp.expm1(log_w))
        logp = jnp.where(weight > 0, stats.logp, 0.0)
        return TokenLoss(-batch.advantages * weight * logp, weight > 0)

    return from_sequence_loss(token_loss, aggregate=aggregate, needs=centre.needs)
