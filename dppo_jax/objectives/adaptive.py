"""BAPO: clip bounds that move until positive tokens carry their share (arXiv 2510.18927)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dppo_jax.objectives.aggregate import Aggregation, token_mean
from dppo_jax.objectives.measures import Anchor, binary_tv_measure, rollout_anchor, surrogate_ratio
from dppo_jax.objectives.policy_gradient import TokenLoss, from_batch_loss
from dppo_jax.objectives.ppo import check_dual_clip, clipped_surrogate
from dppo_jax.records import Batch, Mean, Objective, TokenStats


class Bounds(NamedTuple):
    """What the search found."""

    low: Float[Array, ""]
    high: Float[Array, ""]
    balance: Float[Array, ""]  # ρ there


def bapo(
    target: float = 0.5,
    lowest: float = 0.6,
    lowest_end: float = 0.9,
    lowest_step: float = 0.05,
    highest: float = 1.2,
    highest_end: float = 3.0,
    highest_step: float = 0.05,
    dual_clip: float | None = 3.0,
    anchor: Callable[[], Anchor] = rollout_anchor,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """BAPO: PPO's clip with bounds [c_low, c_high] on r that are searched for each gradient step.

    ρ = Σ⁺ / |Σ⁻| of A·min(r, c_high) (A >= 0) and A·max(r, c_low) (A < 0) over all tokens; infinite
    where nothing is negative. From (lowest, highest), c_low rises by its step to its end, then
    c_high to its own, until ρ >= target. WooooDyy/BAPO@72870444 recipe/bapo/policy_loss.py, ranges
    and target as its README gives for the paper. The tokens are the whole minibatch's, over
    microbatches and devices, as the reference's are.
    The paper's algorithm is said to raise c_high first; not verified here.
    """
    if not (0 <= lowest <= lowest_end <= 1 <= highest <= highest_end):
        raise ValueError(
            "bounds must be 0 <= lowest <= lowest_end <= 1 <= highest <= highest_end, got "
            f"{lowest}, {lowest_end}, {highest}, {highest_end}"
        )
    if not (lowest_step > 0 and highest_step > 0):
        raise ValueError(f"steps must be positive, got {lowest_step} and {highest_step}")
    check_dual_clip(dual_clip)
    centre = anchor()
    rises = [(low, highest) for low in _ladder(lowest, lowest_end, lowest_step)]
    rises += [(lowest_end, high) for high in _ladder(highest, highest_end, highest_step)[1:]]

    def search(stats: TokenStats, batch: Batch) -> Bounds:
        ratio = surrogate_ratio(stats.logp, centre.logps(batch).logp)
        candidates = jnp.asarray(rises, jnp.float32)
        shares = balance(jax.lax.stop_gradient(ratio), batch.advantages, candidates)
        enough = shares >= target
        chosen = jnp.where(enough.any(), jnp.argmax(enough), len(rises) - 1)
        return Bounds(candidates[chosen, 0], candidates[chosen, 1], shares[chosen])

    def token_loss(stats: TokenStats, batch: Batch, bounds: Bounds) -> TokenLoss:
        logps = centre.logps(batch)
        tokens = batch.rollout.response_mask.sum().astype(jnp.float32)
        compared = jnp.where(jnp.isfinite(bounds.balance), tokens, 0.0)
        return clipped_surrogate(
            surrogate_ratio(stats.logp, logps.logp),
            batch.advantages,
            lowest=bounds.low,
            highest=bounds.high,
            dual_clip=dual_clip,
        )._replace(
            divergence=binary_tv_measure(stats, batch, logps),
            metrics={
                "bapo/clip_low": Mean(bounds.low * tokens, tokens),
                "bapo/clip_high": Mean(bounds.high * tokens, tokens),
                "bapo/balance": Mean(jnp.where(compared > 0, bounds.balance, 0) * tokens, compared),
            },
        )

    return from_batch_loss(search, token_loss, aggregate=aggregate, needs=centre.needs)


def balance(
    ratio: Float[Array, "B T"], advantages: Float[Array, "B T"], bounds: Float[Array, "N 2"]
) -> Float[Array, " N"]:
    """ρ for each pair of bounds; infinite where no token contributes negatively.

    Advantages are 0 outside response_mask. One pair at a time, so memory is that of one [B, T].
    """

    def share(pair: Float[Array, " 2"]) -> Float[Array, ""]:
        low, high = pair
        effective = jnp.where(advantages >= 0, jnp.minimum(ratio, high), jnp.maximum(ratio, low))
        contribution = effective * advantages
        gain = jnp.sum(jnp.maximum(contribution, 0.0))
        loss = -jnp.sum(jnp.minimum(contribution, 0.0))
        return jnp.where(loss > 0, gain / (loss + 1e-8), jnp.inf)

    return jax.lax.map(share, bounds)


def _ladder(start: float, end: float, step: float) -> list[float]:
    """start, start + step, ... and last `end` itself."""
    rungs = [start]
    while rungs[-1] < end:
        rungs.append(min(rungs[-1] + step, end))
    return rungs
