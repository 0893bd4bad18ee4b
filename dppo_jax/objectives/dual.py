"""R2VPO: the variance of the ratio bounded by a penalty whose weight follows the constraint."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dppo_jax.objectives.aggregate import Aggregation, token_mean
from dppo_jax.objectives.measures import Anchor, binary_tv_measure, rollout_anchor, surrogate_ratio
from dppo_jax.objectives.policy_gradient import TokenLoss, from_token_loss
from dppo_jax.records import Batch, Mean, Metrics, Objective, TokenStats

VARIANCE = "r2vpo/ratio_variance"


def r2vpo(
    dual: float = 0.04,
    delta: float = 0.04,
    dual_rate: float = 0.1,
    anchor: Callable[[], Anchor] = rollout_anchor,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """R2VPO (experimental): -(A·r - λ·(r - 1)²), λ <- max(0, λ + η·(mean (r - 1)² - δ)).

    arXiv 2601.03320: policy gradient under E[(r - 1)²] <= δ, primal and dual by turns. `dual` is
    the first λ, 0.04 in the one implementation at hand, a third party's; `dual_rate` is η. λ is
    part of the training state, one for all tokens; it moves once a gradient step.
    Assumed here, as no official code or values are at hand: the dual step's form, δ = 0.2² as of
    PPO's clip, η; |log r| <= 20 in the value, no other cap; the mean over response tokens, without
    what lies beyond 1 for the dual step, so that one outlier cannot decide λ.
    """
    if not (dual >= 0 and delta >= 0 and dual_rate >= 0):
        raise ValueError(f"r2vpo needs values >= 0, got {dual}, {delta}, {dual_rate}")
    centre = anchor()

    def token_loss(stats: TokenStats, batch: Batch) -> TokenLoss:
        multiplier = dual if batch.objective_state is None else batch.objective_state
        logps = centre.logps(batch)
        ratio = surrogate_ratio(stats.logp, logps.logp)
        square = (ratio - 1.0) ** 2
        loss = -batch.advantages * ratio + jax.lax.stop_gradient(multiplier) * square
        mask = batch.rollout.response_mask
        tokens = mask.sum().astype(jnp.float32)
        metrics: Metrics = {
            VARIANCE: Mean(jnp.sum(jnp.minimum(square, 1.0), where=mask), tokens),
            "r2vpo/dual": Mean(multiplier * tokens, tokens),
        }
        kept = jnp.ones(loss.shape, jnp.bool_)
        return TokenLoss(loss, kept, binary_tv_measure(stats, batch, logps), metrics)

    def next_state(multiplier: Any, metrics: Metrics) -> Any:
        variance = metrics[VARIANCE]
        assert isinstance(variance, Mean)
        mean = variance.sum / jnp.maximum(variance.count, 1.0)
        return jnp.maximum(0.0, multiplier + dual_rate * (mean - delta))

    objective = from_token_loss(token_loss, aggregate=aggregate, needs=centre.needs)
    return objective._replace(initial_state=dual, next_state=next_state)
