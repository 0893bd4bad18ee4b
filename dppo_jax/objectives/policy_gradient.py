"""From a loss a token to an `Objective`: padding, aggregation and the metrics common to all."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dppo_jax.objectives.aggregate import Aggregation, token_mean
from dppo_jax.objectives.measures import importance_ratio
from dppo_jax.objectives.trust_region import TrustRegion
from dppo_jax.records import (
    Batch,
    LossSum,
    Max,
    Mean,
    Metrics,
    Need,
    Objective,
    TokenLocal,
    TokenStats,
)


class TokenLoss(NamedTuple):
    """What an objective says of each token; values outside response_mask are ignored."""

    loss: Float[Array, "B T"]  # differentiable in TokenStats
    keep: Bool[Array, "B T"]  # False where the trust region dropped the token
    divergence: Float[Array, "B T"] | None = None  # the measured distance, for the metrics


def policy_gradient(
    region: TrustRegion, *, cap: float = jnp.inf, aggregate: Aggregation = token_mean
) -> Objective:
    """The score-function loss that all compared methods share.

    L = agg(-A · sg[min(π/μ, C)] · sg[M] · log π). DPPO (arXiv 2602.04879) eq. 23.
    The weight is π/μ against the rollout policy whatever the region's anchor is; `cap` is C.
    Differs from the paper: the ratio is at most e^60 (float32), which no training run survives.
    """
    if not cap > 0:
        raise ValueError(f"cap must be positive, got {cap}")

    def token_loss(stats: TokenStats, batch: Batch) -> TokenLoss:
        keep, divergence = region.decide(stats, batch)
        ratio = jnp.minimum(importance_ratio(stats.logp, batch.rollout.logp_rollout), cap)
        weight = jnp.where(keep, ratio, 0.0)
        # a weight of 0 is the limit of r·log π where π underflows: never 0 times infinity
        logp = jnp.where(weight > 0, stats.logp, 0.0)
        return TokenLoss(-batch.advantages * weight * logp, keep, divergence)

    return from_token_loss(token_loss, aggregate=aggregate, needs=region.needs)


def from_token_loss(
    token_loss: Callable[[TokenStats, Batch], TokenLoss],
    *,
    aggregate: Aggregation = token_mean,
    needs: frozenset[Need] = frozenset(),
) -> Objective:
    """An objective from a loss a token: the way in for a loss that is not a policy gradient.

    `token_loss` sees float32 log-probabilities, entropies and advantages that are 0 outside
    response_mask, so that padding of any value, NaN included, changes neither value nor gradient.
    Its loss at a token may depend on that token's entries alone.
    """

    def loss(stats: TokenStats, batch: Batch) -> LossSum:
        mask = batch.rollout.response_mask
        stats, batch = _zero_padding(stats, batch)
        tokens = token_loss(stats, batch)
        weights = aggregate(mask)
        loss_sum = jnp.sum(weights.token * jnp.where(mask, tokens.loss, 0.0))
        metrics = _metrics(tokens, stats, batch)
        metrics["loss/policy"] = Mean(loss_sum, weights.total)
        return LossSum(loss_sum, weights.total, jax.lax.stop_gradient(metrics))

    def one_by_one(stats: TokenStats, batch: Batch) -> Float[Array, "B T"]:
        tokens = token_loss(*_zero_padding(stats, batch))
        return jnp.where(batch.rollout.response_mask, tokens.loss, 0.0)

    local = TokenLocal(one_by_one, lambda mask: aggregate(mask).token)
    return Objective(loss, needs, local)


_PER_TOKEN = (  # the fields of Batch with a value at each response token; None where not provided
    "advantages",
    "logp_old",
    "topk_logp_old",
    "logp_ref",
    "uniform_logp_old",
    "values_old",
    "returns",
)


def _zero_padding(stats: TokenStats, batch: Batch) -> tuple[TokenStats, Batch]:
    rollout = batch.rollout
    mask = rollout.response_mask

    def inside(values: Float[Array, "B T *_"]) -> Float[Array, "B T *_"]:
        broadcast = mask.reshape(mask.shape + (1,) * (values.ndim - 2))
        return jnp.where(broadcast, values, 0.0).astype(jnp.float32)

    cleaned = replace(
        batch,
        rollout=replace(
            rollout,
            logp_rollout=inside(rollout.logp_rollout),
            topk_logp_rollout=inside(rollout.topk_logp_rollout),
        ),
        **jax.tree.map(inside, {name: getattr(batch, name) for name in _PER_TOKEN}),
    )
    return jax.tree.map(inside, stats), cleaned


def _metrics(tokens: TokenLoss, stats: TokenStats, batch: Batch) -> Metrics:
    """Counts are of response tokens; `mask/*` are shares of those with A ≠ 0, > 0 and < 0."""
    response = batch.rollout.response_mask
    dropped = (~tokens.keep).astype(jnp.float32)
    log_ratio = stats.logp - batch.rollout.logp_rollout
    ratio = importance_ratio(stats.logp, batch.rollout.logp_rollout)
    metrics: Metrics = {
        "mask/fraction": _mean(dropped, response & (batch.advantages != 0)),
        "mask/fraction_positive": _mean(dropped, response & (batch.advantages > 0)),
        "mask/fraction_negative": _mean(dropped, response & (batch.advantages < 0)),
        "ratio/mean": _mean(ratio, response),
        "ratio/max": _max(ratio, response),
        "entropy/mean": _mean(stats.entropy, response),
        "policy/kl_rollout": _mean(-log_ratio, response),
    }
    if tokens.divergence is not None:
        metrics["divergence/mean"] = _mean(tokens.divergence, response)
        metrics["divergence/max"] = _max(tokens.divergence, response)
    return metrics


def _mean(values: Float[Array, "B T"], where: Bool[Array, "B T"]) -> Mean:
    return Mean(jnp.sum(values, where=where), jnp.sum(where).astype(jnp.float32))


def _max(values: Float[Array, "B T"], where: Bool[Array, "B T"]) -> Max:
    """The largest of values >= 0; 0 where there is no token."""
    return Max(jnp.max(values, where=where, initial=0.0))
