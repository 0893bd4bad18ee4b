"""From a loss a token to an `Objective`: padding, aggregation and the metrics common to all."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dppo_jax.objectives.aggregate import Aggregation, token_mean
from dppo_jax.objectives.measures import importance_ratio, surrogate_ratio
from dppo_jax.objectives.metrics import token_metrics
from dppo_jax.objectives.trust_region import Decision, TrustRegion
from dppo_jax.records import (
    Batch,
    LossSum,
    Mean,
    Metrics,
    Need,
    Objective,
    Scope,
    TokenLocal,
    TokenStats,
)


class TokenLoss(NamedTuple):
    """What an objective says of each token; values outside response_mask are ignored."""

    loss: Float[Array, "B T"]  # differentiable in TokenStats
    keep: Bool[Array, "B T"]  # False where the trust region dropped the token
    divergence: Float[Array, "B T"] | None = None  # the measured distance, for the metrics
    metrics: Metrics | None = None  # of its own, unreduced


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
        verdict = region.decide(stats, batch)
        ratio = jnp.minimum(importance_ratio(stats.logp, batch.rollout.logp_rollout), cap)
        weight = _weight(verdict, ratio)
        # a weight of 0 is the limit of r·log π where π underflows: never 0 times infinity
        logp = jnp.where(weight > 0, stats.logp, 0.0)
        loss = -batch.advantages * weight * logp
        return TokenLoss(loss, verdict.keep, verdict.divergence, verdict.metrics)

    return _from_region(region, token_loss, aggregate)


def ratio_surrogate(
    region: TrustRegion, *, cap: float = jnp.inf, aggregate: Aggregation = token_mean
) -> Objective:
    """The differentiable ratio form of `policy_gradient`: the same gradient as long as r <= C.

    L = agg(-A · min(r, C) · sg[M]) with r = π/μ. DPPO (arXiv 2602.04879) eq. 12 taken as a loss;
    SkyRL@a9564572, open-instruct, prime-rl@559b4477 (all without a cap).
    A token past the cap loses its gradient here; `policy_gradient` scales it by C. The ratio's
    value is at most e^20.
    """
    if not cap > 0:
        raise ValueError(f"cap must be positive, got {cap}")

    def token_loss(stats: TokenStats, batch: Batch) -> TokenLoss:
        verdict = region.decide(stats, batch)
        ratio = jnp.minimum(surrogate_ratio(stats.logp, batch.rollout.logp_rollout), cap)
        weight = _weight(verdict, ratio)
        loss = -batch.advantages * weight
        return TokenLoss(loss, verdict.keep, verdict.divergence, verdict.metrics)

    return _from_region(region, token_loss, aggregate)


Form = Callable[..., Objective]  # (region, cap=, aggregate=): policy_gradient or ratio_surrogate


def _weight(verdict: Decision, ratio: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """The ratio of what is kept, scaled by the region's gate."""
    weight = jnp.where(verdict.keep, ratio, 0.0)
    return weight if verdict.gate is None else weight * jax.lax.stop_gradient(verdict.gate)


TokenLossFunction = Callable[[TokenStats, Batch], TokenLoss]


def from_token_loss(
    token_loss: TokenLossFunction,
    *,
    aggregate: Aggregation = token_mean,
    needs: frozenset[Need] = frozenset(),
) -> Objective:
    """An objective from a loss a token: the way in for a loss that is not a policy gradient.

    `token_loss` sees float32 log-probabilities, entropies and advantages that are 0 outside
    response_mask, so that padding of any value, NaN included, changes neither value nor gradient.
    Its loss at a token may depend on that token's entries alone.
    """
    return _objective(token_loss, aggregate, needs, "token")


def from_sequence_loss(
    token_loss: TokenLossFunction,
    *,
    aggregate: Aggregation = token_mean,
    needs: frozenset[Need] = frozenset(),
) -> Objective:
    """`from_token_loss` where a token's loss may depend on all tokens of its sequence."""
    return _objective(token_loss, aggregate, needs, "sequence")


def from_prompt_loss(
    token_loss: TokenLossFunction,
    *,
    aggregate: Aggregation = token_mean,
    needs: frozenset[Need] = frozenset(),
) -> Objective:
    """`from_token_loss` where a token's loss may depend on all samples of its prompt."""
    return _objective(token_loss, aggregate, needs, "prompt")


def from_batch_loss(
    statistics: Callable[[TokenStats, Batch], Any],
    token_loss: Callable[[TokenStats, Batch, Any], TokenLoss],
    *,
    aggregate: Aggregation = token_mean,
    needs: frozenset[Need] = frozenset(),
) -> Objective:
    """`from_token_loss` where a token's loss may depend on `statistics` of the whole minibatch.

    These are its third argument: whatever arrays without a batch axis the function makes of all
    tokens, the same in every microbatch and on every device. They are constants for the gradient.
    """

    def whole(stats: TokenStats, batch: Batch) -> Any:
        return jax.lax.stop_gradient(statistics(*zero_padding(stats, batch)))

    def with_statistics(stats: TokenStats, batch: Batch) -> TokenLoss:
        known = whole(stats, batch) if batch.statistics is None else batch.statistics
        return token_loss(stats, batch, known)

    return _objective(with_statistics, aggregate, needs, "batch")._replace(statistics=whole)


def _from_region(
    region: TrustRegion, token_loss: TokenLossFunction, aggregate: Aggregation
) -> Objective:
    return _objective(token_loss, aggregate, region.needs, region.scope)


def _objective(
    token_loss: TokenLossFunction,
    aggregate: Aggregation,
    needs: frozenset[Need],
    scope: Scope,
) -> Objective:
    def loss(stats: TokenStats, batch: Batch) -> LossSum:
        mask = batch.rollout.response_mask
        stats, batch = zero_padding(stats, batch)
        tokens = token_loss(stats, batch)
        weights = aggregate(mask)
        loss_sum = jnp.sum(weights.token * _weighted(tokens.loss, batch))
        metrics = token_metrics(tokens.keep, tokens.divergence, stats, batch)
        metrics |= tokens.metrics or {}
        metrics["loss/policy"] = Mean(loss_sum, weights.total)
        return LossSum(loss_sum, weights.total, jax.lax.stop_gradient(metrics))

    def one_by_one(stats: TokenStats, batch: Batch) -> Float[Array, "B T"]:
        tokens = token_loss(*zero_padding(stats, batch))
        return _weighted(tokens.loss, batch)

    local = TokenLocal(one_by_one, lambda mask: aggregate(mask).token)
    return Objective(
        loss, needs, local if scope == "token" else None, scope=scope, aggregate=aggregate
    )


def _weighted(loss: Float[Array, "B T"], batch: Batch) -> Float[Array, "B T"]:
    """Each token's loss times what rollout corrections give it; 0 outside response_mask."""
    inside = batch.rollout.response_mask
    if batch.loss_weights is None:
        return jnp.where(inside, loss, 0.0)
    weight = jnp.where(inside, jax.lax.stop_gradient(batch.loss_weights), 0.0)
    return jnp.where(weight > 0, loss, 0.0) * weight  # never 0 times infinity


_PER_TOKEN = (  # the fields of Batch with a value at each response token; None where not provided
    "advantages",
    "logp_old",
    "topk_logp_old",
    "logp_ref",
    "uniform_logp_old",
    "values_old",
    "returns",
)


def zero_padding(stats: TokenStats, batch: Batch) -> tuple[TokenStats, Batch]:
    """Both with zeros for whatever stands outside response_mask, in float32."""
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
