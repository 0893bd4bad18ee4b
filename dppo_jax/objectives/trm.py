"""Trust-region masking: a sequence is kept or dropped as a whole (arXiv 2512.23075)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dppo_jax.objectives.aggregate import Aggregation, token_mean
from dppo_jax.objectives.measures import (
    Anchor,
    Measure,
    region_needs,
    rollout_anchor,
    topk_kl_measure,
)
from dppo_jax.objectives.policy_gradient import Form, policy_gradient
from dppo_jax.objectives.trust_region import (
    Decision,
    TrustRegion,
    by_sign,
    check_thresholds,
    sides,
)
from dppo_jax.records import Batch, Objective, TokenStats

Summary = Callable[[Float[Array, "B T"], Bool[Array, "B T"]], Float[Array, "B 1"]]


def largest(distance: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B 1"]:
    """The maximum over a sequence's tokens, 0 where it has none."""
    return jnp.max(distance, axis=1, keepdims=True, where=mask, initial=0.0)


def average(distance: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B 1"]:
    """The mean over a sequence's tokens, 0 where it has none."""
    total = jnp.sum(distance, axis=1, keepdims=True, where=mask)
    return total / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)


def sequence_bounded(
    measure: Measure,
    summary: Summary,
    *,
    delta_low: float,
    delta_high: float,
    anchor: Callable[[], Anchor],
) -> TrustRegion:
    """M = 1 at all tokens of a sequence whose summary of D is <= δ, else 0 at all of them.

    Not directional: a sequence that moves back towards the anchor is dropped like any other.
    """
    check_thresholds(delta_low, delta_high)
    centre = anchor()

    def decide(stats: TokenStats, batch: Batch) -> Decision:
        distance = jax.lax.stop_gradient(measure(stats, batch, centre.logps(batch)))
        whole = summary(distance, batch.rollout.response_mask)
        return Decision(whole <= by_sign(batch, delta_low, delta_high), distance)

    return TrustRegion(decide, region_needs(measure, centre), "sequence")


def trm_max(
    measure: Measure = topk_kl_measure,
    delta: float = 0.05,
    delta_low: float | None = None,
    delta_high: float | None = None,
    anchor: Callable[[], Anchor] = rollout_anchor,
    cap: float = jnp.inf,
    aggregate: Aggregation = token_mean,
    form: Form = policy_gradient,
) -> Objective:
    """TRM-Max: M = 1[max_t KL_t <= δ] for the whole sequence.

    Assumed here: δ = 0.05, DPPO's for KL, as the paper's is not known to us; the rollout's Top-K
    stands for the whole vocabulary.
    """
    low, high = sides(delta, delta_low, delta_high)
    region = sequence_bounded(measure, largest, delta_low=low, delta_high=high, anchor=anchor)
    return form(region, cap=cap, aggregate=aggregate)


def trm_avg(
    measure: Measure = topk_kl_measure,
    delta: float = 0.05,
    delta_low: float | None = None,
    delta_high: float | None = None,
    anchor: Callable[[], Anchor] = rollout_anchor,
    cap: float = jnp.inf,
    aggregate: Aggregation = token_mean,
    form: Form = policy_gradient,
) -> Objective:
    """TRM-Avg: M = 1[mean_t KL_t <= δ] for the whole sequence. Assumptions as in `trm_max`."""
    low, high = sides(delta, delta_low, delta_high)
    region = sequence_bounded(measure, average, delta_low=low, delta_high=high, anchor=anchor)
    return form(region, cap=cap, aggregate=aggregate)
