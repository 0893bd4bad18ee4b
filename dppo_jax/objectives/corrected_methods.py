"""Objectives with the rollout correction that they are usually run with.

Each is `corrected(objective, correction)`; any other pair is as short.
"""

from dppo_jax.objectives.corrections import corrected, icepop, opsm, sequence_mis, tis
from dppo_jax.objectives.measures import old_anchor
from dppo_jax.objectives.ppo import ppo_clip
from dppo_jax.records import Objective


def grpo_tis(delta_low: float = 0.2, delta_high: float = 0.2, cap: float = 2.0) -> Objective:
    """PPO's clip around the recomputed policy, each token weighted min(old/μ, C): verl's TIS."""
    return corrected(ppo_clip(delta_low, delta_high, anchor=old_anchor), tis(cap))


def grpo_mis(delta_low: float = 0.2, delta_high: float = 0.2, highest: float = 3.0) -> Objective:
    """PPO's clip around the recomputed policy; sequences weigh Π old/μ, 0 past `highest`."""
    return corrected(ppo_clip(delta_low, delta_high, anchor=old_anchor), sequence_mis(highest))


def grpo_icepop(
    delta_low: float = 0.2, delta_high: float = 0.2, lowest: float = 0.5, highest: float = 5.0
) -> Objective:
    """PPO's clip around the recomputed policy; tokens weigh old/μ, 0 outside the bounds."""
    return corrected(ppo_clip(delta_low, delta_high, anchor=old_anchor), icepop(lowest, highest))


def grpo_opsm(delta_low: float = 0.2, delta_high: float = 0.2, threshold: float = 0.5) -> Objective:
    """PPO's clip around the rollout policy; drops A < 0 sequences whose mean log μ/π is larger."""
    return corrected(ppo_clip(delta_low, delta_high), opsm(threshold))
