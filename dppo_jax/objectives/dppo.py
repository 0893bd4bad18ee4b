"""DPPO: a trust region on the divergence from the policy that sampled (arXiv 2602.04879).

`delta` is the threshold, in probability (TV) or nats (KL); `delta_low` and `delta_high` replace it
for tokens with A < 0 and A > 0. `cap` is C of min(π/μ, C): infinity in the paper's stability runs,
5 in its scaling runs. `anchor=old_anchor` gives Stable-RL's `*_recompute` modes.
"""

from collections.abc import Callable

import jax.numpy as jnp

from dppo_jax.objectives.aggregate import Aggregation, token_mean
from dppo_jax.objectives.measures import (
    Anchor,
    Measure,
    binary_kl_measure,
    binary_tv_measure,
    rollout_anchor,
    topk_kl_measure,
    topk_tv_measure,
)
from dppo_jax.objectives.policy_gradient import policy_gradient
from dppo_jax.objectives.trust_region import bounded
from dppo_jax.records import Objective


def dppo(
    measure: Measure,
    delta: float,
    delta_low: float | None = None,
    delta_high: float | None = None,
    anchor: Callable[[], Anchor] = rollout_anchor,
    cap: float = jnp.inf,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """DPPO with any measure: eq. 12 for the mask, eq. 23 for the gradient."""
    region = bounded(
        measure,
        delta_low=delta if delta_low is None else delta_low,
        delta_high=delta if delta_high is None else delta_high,
        anchor=anchor,
    )
    return policy_gradient(region, cap=cap, aggregate=aggregate)


def dppo_binary_tv(
    delta: float = 0.15,
    delta_low: float | None = None,
    delta_high: float | None = None,
    anchor: Callable[[], Anchor] = rollout_anchor,
    cap: float = jnp.inf,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """DPPO-Binary-TV: M = 0 where |μ - π| > δ and moving away (eqs. 12, 13)."""
    return dppo(binary_tv_measure, delta, delta_low, delta_high, anchor, cap, aggregate)


def dppo_binary_kl(
    delta: float = 0.05,
    delta_low: float | None = None,
    delta_high: float | None = None,
    anchor: Callable[[], Anchor] = rollout_anchor,
    cap: float = jnp.inf,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """DPPO-Binary-KL: M = 0 where KL of {sampled, rest} > δ and moving away (eqs. 12, 14)."""
    return dppo(binary_kl_measure, delta, delta_low, delta_high, anchor, cap, aggregate)


def dppo_topk_tv(
    delta: float = 0.15,
    delta_low: float | None = None,
    delta_high: float | None = None,
    anchor: Callable[[], Anchor] = rollout_anchor,
    cap: float = jnp.inf,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """DPPO-TopK-TV: M = 0 where TV over TopK(μ) ∪ {sampled} > δ and moving away (eqs. 12, 15).

    K is the rollout's (20 in the paper, whose Top-K runs all have δ = 0.20).
    Differs from the paper's code, which keeps K slots: `dppo(topk_slots_tv_measure, ...)`.
    """
    return dppo(topk_tv_measure, delta, delta_low, delta_high, anchor, cap, aggregate)


def dppo_topk_kl(
    delta: float = 0.05,
    delta_low: float | None = None,
    delta_high: float | None = None,
    anchor: Callable[[], Anchor] = rollout_anchor,
    cap: float = jnp.inf,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """DPPO-TopK-KL: M = 0 where KL over TopK(μ) ∪ {sampled} > δ and moving away (eqs. 12, 16).

    K is the rollout's (20 in the paper).
    Differs from the paper's code, which keeps K slots: `dppo(topk_slots_kl_measure, ...)`.
    """
    return dppo(topk_kl_measure, delta, delta_low, delta_high, anchor, cap, aggregate)
