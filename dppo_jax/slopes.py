"""A loss that compares a prompt's samples, where packing puts these into different parts.

Its slopes along every token's log-probability and entropy are had from the whole minibatch, scored
once before. A part's gradient is then that of Σ slope · value over its own tokens: the chain rule.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dppo_jax.records import Batch, LossSum, Need, Objective, TokenStats

# What such an objective may need: all that is scored before are log-probabilities and entropies.
NEEDS: frozenset[Need] = frozenset({"logp_old", "logp_ref"})
Slopes = tuple[Float[Array, "B T"], Float[Array, "B T"]]


def slopes_of(objective: Objective, stats: TokenStats, batch: Batch) -> tuple[LossSum, Slopes]:
    """The loss of the whole minibatch, and its slopes along each token's logp and entropy."""

    def loss(logp: Array, entropy: Array) -> tuple[Array, LossSum]:
        out = objective.loss(dataclasses.replace(stats, logp=logp, entropy=entropy), batch)
        return out.loss_sum, out

    slopes, out = jax.grad(loss, (0, 1), has_aux=True)(stats.logp, stats.entropy)
    return out, slopes


def along(slopes: Slopes, stats: TokenStats, batch: Batch, objective: Objective) -> LossSum:
    """A part of a loss with `slopes`: 0, with the whole's gradient and its own share of weight."""
    assert objective.aggregate is not None
    pairs = zip(slopes, (stats.logp, stats.entropy), strict=True)
    mask = batch.rollout.response_mask  # False where a part holds no sequence
    terms = [jnp.where(mask & (slope != 0), slope * value, 0.0) for slope, value in pairs]
    total = jnp.sum(jnp.stack(terms))
    weight = objective.aggregate(mask).total
    return LossSum(total - jax.lax.stop_gradient(total), weight, {})


def check_packing(objective: Objective, critic: Any, microbatches: int) -> None:
    """Refuses what packed sequences do not go with."""
    if microbatches != 1:
        raise ValueError(
            f"tokens_per_microbatch and microbatches={microbatches}: the tokens decide how many "
            "microbatches there are; leave that at 1"
        )
    if objective.scope != "prompt":
        return
    more = sorted(map(str, objective.needs - NEEDS)) + ["a critic"] * (critic is not None)
    if more or objective.aggregate is None:
        raise ValueError(
            "tokens_per_microbatch splits a prompt's samples, and this objective compares them by "
            f"more than log-probabilities ({', '.join(more) or 'no aggregation'}): leave it out"
        )
