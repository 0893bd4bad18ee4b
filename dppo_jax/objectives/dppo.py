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
    exact_kl_measure,
    exact_tv_measure,
    rollout_anchor,
    topk_kl_measure,
    topk_tv_measure,
)
from dppo_jax.objectives.policy_gradient import Form, policy_gradient
from dppo_jax.objectives.trust_region import bounded, sides
from dppo_jax.records import Objective


def dppo(
    measure: Measure,
    delta: float,
    delta_low: float | None = None,
    delta_high: float | None = None,
    anchor: Callable[[], Anchor] = rollout_anchor,
    cap: float = jnp.inf,
    aggregate: Aggregation = token_mean,
    form: Form = policy_gradient,
) -> Objective:
    """DPPO with any measure: eq. 12 for the mask, eq. 23 for the gradient.

    `form` is policy_gradient, or ratio_surrogate for a differentiable ratio.
    """
    low, high = sides(delta, delta_low, delta_high)
    region = bounded(measure, delta_low=low, delta_high=high, anchor=anchor)
    return form(region, cap=cap, aggregate=aggregate)


def dppo_binary_tv(
    delta: float = 0.15,
    delta_low: float | None = None,
    delta_high: float | None = None,
    anchor: Callable[[], Anchor] = rollout_anchor,
    cap: float = jnp.inf,
    aggregate: Aggregation = token_mean,
    form: Form = policy_gradient,
) -> Objective:
    """DPPO-Binary-TV: M = 0 where |μ - π| > δ and moving away (eqs. 12, 13)."""
    return dppo(binary_tv_measure, delta, delta_low, delta_high, anchor, cap, aggregate, form)


def dppo_binary_kl(
    delta: float = 0.05,
    delta_low: float | None = None,
    delta_high: float | None = None,
    anchor: Callable[[], Anchor] = rollout_anchor,
    cap: float = jnp.inf,
    aggregate: Aggregation = token_mean,
    form: Form = policy_gradient,
) -> Objective:
    """DPPO-Binary-KL: M = 0 where KL of {sampled, rest} > δ and moving away (eqs. 12, 14)."""
    return dppo(binary_kl_measure, delta, delta_low, delta_high, anchor, cap, aggregate, form)


def dppo_topk_tv(
    delta: float = 0.15,
    delta_low: float | None = None,
    delta_high: float | None = None,
    anchor: Callable[[], Anchor] = rollout_anchor,
    cap: float = jnp.inf,
    aggregate: Aggregation = token_mean,
    form: Form = policy_gradient,
) -> Objective:
    """DPPO-TopK-TV: M = 0 where TV over TopK(μ) ∪ {sampled} > δ and moving away (eqs. 12, 15).

    K is the rollout's (20 in the paper, whose Top-K runs all have δ = 0.20).
    Differs from the paper's code, which keeps K slots: `dppo(topk_slots_tv_measure, ...)`.
    """
    return dppo(topk_tv_measure, delta, delta_low, delta_high, anchor, cap, aggregate, form)


def dppo_topk_kl(
    delta: float = 0.05,
    delta_low: float | None = None,
    delta_high: float | None = None,
    anchor: Callable[[], Anchor] = rollout_anchor,
    cap: float = jnp.inf,
    aggregate: Aggregation = token_mean,
    form: Form = policy_gradient,
) -> Objective:
    """DPPO-TopK-KL: M = 0 where KL over TopK(μ) ∪ {sampled} > δ and moving away (eqs. 12, 16).

    K is the rollout's (20 in the paper).
    Differs from the paper's code, which keeps K slots: `dppo(topk_slots_kl_measure, ...)`.
    """
    return dppo(topk_kl_measure, delta, delta_low, delta_high, anchor, cap, aggregate, form)


def dppo_exact_tv(
    delta: float = 0.15,
    delta_low: float | None = None,
    delta_high: float | None = None,
    anchor: Callable[[], Anchor] = rollout_anchor,
    cap: float = jnp.inf,
    aggregate: Aggregation = token_mean,
    form: Form = policy_gradient,
) -> Objective:
    """DPPO-Exact-TV: M = 0 where TV(μ, π) over the whole vocabulary > δ and moving away (eq. 12).

    Costs a forward pass of the anchor's policy, and its parameters kept, beside the update.
    Differs from the paper, which only estimates TV: its δ is Binary-TV's, a lower bound of this.
    """
    return dppo(exact_tv_measure, delta, delta_low, delta_high, anchor, cap, aggregate, form)


def dppo_exact_kl(
    delta: float = 0.05,
    delta_low: float | None = None,
    delta_high: float | None = None,
    anchor: Callable[[], Anchor] = rollout_anchor,
    cap: float = jnp.inf,
    aggregate: Aggregation = token_mean,
    form: Form = policy_gradient,
) -> Objective:
    """DPPO-Exact-KL: M = 0 where KL(μ || π) over the vocabulary > δ and moving away (eq. 12).

    Costs a forward pass of the anchor's policy, and its parameters kept, beside the update.
    Differs from the paper, which only estimates KL: its δ is Binary-KL's, a lower bound of this.
    """
    return dppo(exact_kl_measure, delta, delta_low, delta_high, anchor, cap, aggregate, form)
