"""The methods that the DPPO paper compares with, as it runs them (arXiv 2602.04879 apps. C, E).

All share the score-function loss with weight min(π/μ, C); they differ in the mask. The loss value
is therefore not that of PPO's surrogate; the gradient is, where the ratio is not capped.
"""

from collections.abc import Callable

import jax.numpy as jnp

from dppo_jax.objectives.aggregate import Aggregation, token_mean
from dppo_jax.objectives.measures import (
    Anchor,
    binary_tv_measure,
    old_anchor,
    ratio_measure,
    rollout_anchor,
)
from dppo_jax.objectives.policy_gradient import policy_gradient
from dppo_jax.objectives.trust_region import bounded, relax_rare, unconstrained
from dppo_jax.records import Objective


def grpo(
    delta_low: float = 0.2,
    delta_high: float = 0.2,
    anchor: Callable[[], Anchor] = rollout_anchor,
    cap: float = jnp.inf,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """GRPO: M = 0 where π/μ > 1 + δ_high (A > 0) or π/μ < 1 - δ_low (A < 0).

    GRPO (arXiv 2402.03300) eq. 3 with PPO's clip written as a mask; Stable-RL's mode `ppo`.
    Differs from verl: no second clip (3·A) of large ratios at A < 0; `cap` bounds the weight.
    """
    region = bounded(ratio_measure, delta_low=delta_low, delta_high=delta_high, anchor=anchor)
    return policy_gradient(region, cap=cap, aggregate=aggregate)


def grpo_clip_higher(
    delta_low: float = 0.2,
    delta_high: float = 0.28,
    anchor: Callable[[], Anchor] = rollout_anchor,
    cap: float = jnp.inf,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """GRPO-ClipHigher: GRPO with DAPO's wider upper bound (arXiv 2503.14476 eq. 10).

    0.28 in the DPPO paper's stability runs, 0.27 in its scaling runs.
    """
    return grpo(delta_low, delta_high, anchor, cap, aggregate)


def grpo_relaxed(
    delta_low: float = 0.2,
    delta_high: float = 0.28,
    alpha_low: float = 0.1,
    alpha_high: float = 0.1,
    anchor: Callable[[], Anchor] = rollout_anchor,
    cap: float = jnp.inf,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """GRPO-ClipHigher that never masks a token with μ < α (A > 0: alpha_high, A < 0: alpha_low).

    The paper's "relax clipping" ablation, sec. 6; an alpha of 0 relaxes nothing on that side.
    """
    region = bounded(ratio_measure, delta_low=delta_low, delta_high=delta_high, anchor=anchor)
    relaxed = relax_rare(region, alpha_low=alpha_low, alpha_high=alpha_high)
    return policy_gradient(relaxed, cap=cap, aggregate=aggregate)


def minirl(
    delta_low: float = 0.2,
    delta_high: float = 0.28,
    cap: float = jnp.inf,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """MiniRL: the mask from π/old, the weight from π/μ (arXiv 2512.01374; Stable-RL's mode
    `ppo_recompute`)."""
    return grpo(delta_low, delta_high, old_anchor, cap, aggregate)


def minirl_tis(
    delta_low: float = 0.2,
    delta_high: float = 0.28,
    cap: float = 3.0,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """MiniRL-TIS: MiniRL with its weight π/μ truncated at C = 3."""
    return minirl(delta_low, delta_high, cap, aggregate)


def pg_is(aggregate: Aggregation = token_mean) -> Objective:
    """PG-IS: importance-weighted policy gradient without any trust region, M = 1, C = infinity."""
    return policy_gradient(unconstrained(), aggregate=aggregate)


def pg_tis(cap: float = 3.0, aggregate: Aggregation = token_mean) -> Objective:
    """PG-TIS: M = 1, weight min(π/μ, C), detached, so capped tokens still learn; = CISPO.

    C = 3 in the DPPO paper's stability runs, 5 in its scaling runs.
    Differs from CISPO (arXiv 2506.13585) eq. 5: no lower clip, which MiniMax leaves inactive too.
    """
    return policy_gradient(unconstrained(), cap=cap, aggregate=aggregate)


def mask_bad_updates(
    threshold: float = 0.5,
    anchor: Callable[[], Anchor] = rollout_anchor,
    cap: float = jnp.inf,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """PG-IS that drops only the worst: A < 0 tokens with μ - π > threshold.

    "Mask-0.5-Rollout" of arXiv 2602.04879 sec. 6, at most 0.5 % of tokens: enough to keep a run
    stable, while 0.8, or the recomputed anchor, is not. Differs from the paper: > in place of >=.
    """
    region = bounded(binary_tv_measure, delta_low=threshold, delta_high=jnp.inf, anchor=anchor)
    return policy_gradient(region, cap=cap, aggregate=aggregate)
