"""What every objective reports of its tokens, unreduced; names as in README's "Read the metrics".

The set is that of sail-sg/Stable-RL@c6af1d11 (`actor/invalid_tr_*`, `actor/pg_clipfrac*`,
`actor/topk_kl_*`) and TRL's DPPO trainer (`prob_diff/*`, `mask_ratio/*`), as means where the former
logs raw lists. Counts are of response tokens unless a name says otherwise.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dppo_jax import bounds
from dppo_jax.objectives.measures import importance_ratio
from dppo_jax.records import Batch, Counts, Max, Mean, Metrics, TokenStats

MASKED_TOKENS = "masked_tokens"  # by token id: the one metric that is no number
SMALL_DIVERGENCES = (0.01, 0.05)


def token_metrics(
    keep: Bool[Array, "B T"],
    divergence: Float[Array, "B T"] | None,
    stats: TokenStats,
    batch: Batch,
) -> Metrics:
    """Of an objective that dropped the tokens with `keep` False; all inputs 0 at padding."""
    rollout, advantages = batch.rollout, batch.advantages
    response = rollout.response_mask
    ratio = importance_ratio(stats.logp, rollout.logp_rollout)
    pi, mu = jnp.exp(stats.logp), jnp.exp(rollout.logp_rollout)
    gap = jnp.abs(pi - mu)
    metrics: Metrics = {
        "ratio/mean": mean(ratio, response),
        "ratio/max": largest(ratio, response),
        "entropy/mean": mean(stats.entropy, response),
        "policy/kl_rollout": mean(rollout.logp_rollout - stats.logp, response),
        "prob_diff/mean": mean(gap, response),
        "prob_diff/max": largest(gap, response),
        "advantage/max": largest(jnp.abs(advantages), response),
    }
    if divergence is not None:
        metrics["divergence/mean"] = mean(divergence, response)
        metrics["divergence/max"] = largest(divergence, response)
        for limit in SMALL_DIVERGENCES:
            small = (divergence < limit).astype(jnp.float32)
            metrics[f"divergence/below_{limit:g}"] = mean(small, response)
    return (
        metrics
        | _masked(keep, divergence, ratio, stats, batch)
        | _topk_coverage(stats, batch)
        | _bound(stats, batch)
    )


def mean(values: Float[Array, "B T"], where: Bool[Array, "B T"]) -> Mean:
    """The mean over the tokens of `where`, unreduced."""
    return Mean(jnp.sum(values, where=where), jnp.sum(where).astype(jnp.float32))


def largest(values: Float[Array, "B T"], where: Bool[Array, "B T"]) -> Max:
    """The largest of values >= 0; 0 where there is no token."""
    return Max(jnp.max(values, where=where, initial=0.0))


def _masked(
    keep: Bool[Array, "B T"],
    divergence: Float[Array, "B T"] | None,
    ratio: Float[Array, "B T"],
    stats: TokenStats,
    batch: Batch,
) -> Metrics:
    """`mask/fraction*`: shares of the tokens with A ≠ 0, > 0, < 0. The rest: means over those that
    were dropped, by the sign of A; where the update would have raised or lowered them."""
    rollout = batch.rollout
    response, dropped = rollout.response_mask, (~keep).astype(jnp.float32)
    of_dropped = {
        "prob": jnp.exp(stats.logp),
        "prob_rollout": jnp.exp(rollout.logp_rollout),
        "logp": stats.logp,
        "logp_rollout": rollout.logp_rollout,
        "ratio": ratio,
        "entropy": stats.entropy,
    }
    if divergence is not None:
        of_dropped["divergence"] = divergence
    metrics: Metrics = {"mask/fraction": mean(dropped, response & (batch.advantages != 0))}
    signs = {"positive": batch.advantages > 0, "negative": batch.advantages < 0}
    for sign, inside in signs.items():
        metrics[f"mask/fraction_{sign}"] = mean(dropped, response & inside)
        for name, values in of_dropped.items():
            metrics[f"mask/{name}_{sign}"] = mean(values, response & inside & ~keep)
    if batch.vocab_size is not None:
        counted = [response & inside & ~keep for inside in signs.values()] + [response]
        tokens = jnp.where(response, rollout.response_tokens, 0)
        rows = jnp.zeros((len(counted), batch.vocab_size), jnp.int32)
        metrics[MASKED_TOKENS] = Counts(
            jnp.stack([row.at[tokens].add(where) for row, where in zip(rows, counted, strict=True)])
        )
    return metrics


def _topk_coverage(stats: TokenStats, batch: Batch) -> Metrics:
    """How much of either policy the K stored tokens hold, and how often the sampled one is there.

    Nothing where K is 0. The paper's App. B: 99.4 % to 99.9 % at K = 20.
    """
    rollout = batch.rollout
    if rollout.topk_ids.shape[-1] == 0:
        return {}
    response = rollout.response_mask
    inside = (rollout.topk_ids == rollout.response_tokens[..., None]).any(-1)
    return {
        "topk/mass_rollout": mean(jnp.exp(rollout.topk_logp_rollout).sum(-1), response),
        "topk/mass": mean(jnp.exp(stats.topk_logp).sum(-1), response),
        "topk/sampled_inside": mean(inside.astype(jnp.float32), response),
    }


def _bound(stats: TokenStats, batch: Batch) -> Metrics:
    """The terms of arXiv 2602.04879 eq. 8, a sequence: L' with A for R, and E Σ_t D_TV."""
    response = batch.rollout.response_mask
    log_ratio = jnp.where(response, jnp.minimum(stats.logp - batch.rollout.logp_rollout, 60.0), 0.0)
    sequences = response.any(axis=1).sum().astype(jnp.float32)
    linear = jnp.sum(batch.advantages * jnp.expm1(log_ratio), where=response)
    tv = jnp.sum(bounds.sampled_tv(log_ratio), where=response)
    return {"bound/surrogate": Mean(linear, sequences), "bound/tv_sum": Mean(tv, sequences)}
