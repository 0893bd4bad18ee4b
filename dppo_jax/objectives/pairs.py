"""REBEL: regression of the differences of rewards on those of log-ratios, over a prompt's pairs."""

from collections.abc import Callable

import jax.numpy as jnp

from dppo_jax.objectives.aggregate import Aggregation, seq_mean_token_mean
from dppo_jax.objectives.measures import Anchor, rollout_anchor
from dppo_jax.objectives.policy_gradient import TokenLoss, from_prompt_loss
from dppo_jax.records import Batch, Mean, Metrics, Objective, TokenStats


def rebel(
    eta: float = 1.0,
    anchor: Callable[[], Anchor] = rollout_anchor,
    aggregate: Aggregation = seq_mean_token_mean,
) -> Objective:
    """REBEL: mean over pairs y, y' of a prompt of ((s(y) - s(y')) / η - (R(y) - R(y')))².

    s(y) = Σ_t log π/anchor; arXiv 2404.16767 eq. 1. ZhaolinGao/REBEL@4ad7c11d multiplies the
    rewards by η instead, which makes the loss η² times this one; η = 1 in its scripts.
    R(y) - R(y') is taken as the difference of advantages, equal for `group_mean_baseline`.
    Differs from the paper: all pairs of a prompt's samples, where it draws two. A pair never
    crosses a microbatch, which has whole prompts. Sequences without a token are in no pair.
    """
    if not eta > 0:
        raise ValueError(f"eta must be positive, got {eta}")
    centre = anchor()

    def token_loss(stats: TokenStats, batch: Batch) -> TokenLoss:
        mask = batch.rollout.response_mask
        prompts, rows = len(batch.rollout.prompt_tokens), len(mask)
        if rows < 2 * prompts:
            raise ValueError(
                "rebel compares a prompt's samples: set samples_per_prompt to 2 or more"
            )
        length = jnp.maximum(mask.sum(axis=1), 1)
        log_ratio = jnp.sum(stats.logp - centre.logps(batch).logp, axis=1)
        reward = jnp.sum(batch.advantages, axis=1) / length
        unexplained = (log_ratio / eta - reward).reshape(prompts, -1)
        here = mask.any(axis=1).reshape(prompts, -1)
        pairs = here[:, :, None] & here[:, None, :]
        gaps = jnp.where(pairs, unexplained[:, :, None] - unexplained[:, None, :], 0.0)
        partners = jnp.maximum(here.sum(axis=1, keepdims=True) - 1, 1)
        loss = (jnp.sum(gaps**2, axis=2) / partners).reshape(rows, 1)
        metrics: Metrics = {
            "rebel/log_ratio": Mean(log_ratio.sum(), here.sum().astype(jnp.float32))
        }
        everywhere = jnp.broadcast_to(loss, mask.shape)
        return TokenLoss(everywhere, jnp.ones(mask.shape, jnp.bool_), metrics=metrics)

    return from_prompt_loss(token_loss, aggregate=aggregate, needs=centre.needs)
