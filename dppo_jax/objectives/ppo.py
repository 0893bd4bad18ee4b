"""PPO's clipped surrogate in its own form, and the methods that keep it (arXiv 1707.06347)."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dppo_jax.objectives.aggregate import Aggregation, seq_mean_token_sum_norm, token_mean
from dppo_jax.objectives.measures import Anchor, binary_tv_measure, rollout_anchor, surrogate_ratio
from dppo_jax.objectives.policy_gradient import TokenLoss, from_token_loss
from dppo_jax.records import Batch, Objective, TokenStats

Bound = float | Float[Array, ""]


def clipped_surrogate(
    ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    *,
    lowest: Bound,
    highest: Bound,
    dual_clip: float | None = None,
) -> TokenLoss:
    """max(-A·r, -A·clip(r, lowest, highest)), and for A < 0 no more than -A·c (dual clip).

    PPO (arXiv 1707.06347) eq. 7; dual clip (arXiv 1912.09729) eq. 5. A token is dropped where the
    clip, or the dual clip, leaves it no gradient.
    """
    clipped = jnp.clip(ratio, lowest, highest)
    loss = jnp.maximum(-advantages * ratio, -advantages * clipped)
    fixed = jax.lax.stop_gradient(ratio)
    dropped = ((advantages > 0) & (fixed > highest)) | ((advantages < 0) & (fixed < lowest))
    if dual_clip is not None:
        beyond = (advantages < 0) & (fixed > dual_clip)
        loss = jnp.where(beyond, -advantages * dual_clip, loss)
        dropped |= beyond
    return TokenLoss(loss, ~dropped)


def ppo_clip(
    delta_low: float = 0.2,
    delta_high: float = 0.2,
    dual_clip: float | None = None,
    anchor: Callable[[], Anchor] = rollout_anchor,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """PPO's clip: max(-A·r, -A·clip(r, 1 - δ_low, 1 + δ_high)) with r = π/anchor differentiable.

    Its gradient is that of `grpo`, its value PPO's own. `dual_clip` is c of the dual clip, 3 in
    verl (clip_ratio_c), where it is always on.
    """
    _check_clip(delta_low, delta_high)
    check_dual_clip(dual_clip)
    centre = anchor()

    def token_loss(stats: TokenStats, batch: Batch) -> TokenLoss:
        logps = centre.logps(batch)
        return clipped_surrogate(
            surrogate_ratio(stats.logp, logps.logp),
            batch.advantages,
            lowest=1.0 - delta_low,
            highest=1.0 + delta_high,
            dual_clip=dual_clip,
        )._replace(divergence=binary_tv_measure(stats, batch, logps))

    return from_token_loss(token_loss, aggregate=aggregate, needs=centre.needs)


def dapo(
    delta_low: float = 0.2,
    delta_high: float = 0.28,
    dual_clip: float | None = None,
    anchor: Callable[[], Anchor] = rollout_anchor,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """DAPO's loss: PPO's clip at 0.2 / 0.28, every token alike; arXiv 2503.14476 eq. 8.

    Its dynamic sampling and overlong penalty are the sampler's and the reward's part.
    """
    return ppo_clip(delta_low, delta_high, dual_clip, anchor, aggregate)


def dr_grpo(
    delta_low: float = 0.2,
    delta_high: float = 0.2,
    dual_clip: float | None = None,
    anchor: Callable[[], Anchor] = rollout_anchor,
    horizon: int | None = None,
) -> Objective:
    """Dr. GRPO: PPO's clip, summed over tokens and divided by a fixed horizon; arXiv 2503.20783.

    `horizon` in tokens, None: the response columns. Use with advantages that are not divided by
    the group's std.
    """
    aggregate = partial(seq_mean_token_sum_norm, horizon=horizon)
    return ppo_clip(delta_low, delta_high, dual_clip, anchor, aggregate)


def check_dual_clip(dual_clip: float | None) -> None:
    """Raises ValueError where c would cut off what PPO's clip keeps."""
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")


def _check_clip(delta_low: float, delta_high: float) -> None:
    if not (0 <= delta_low and 0 <= delta_high):
        raise ValueError(f"clip ranges must be >= 0, got {delta_low} and {delta_high}")
