"""Advantage estimators: rewards [P, G] of G samples a prompt -> advantages [P, G].

A group of one has nothing to compare with: every estimator gives 0 there (and so does a group
whose rewards are all equal, exactly). Differs from verl, which keeps R in a group of one.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

STD_EPSILON = 1e-6


def group_mean_baseline(rewards: Float[Array, "P G"]) -> Float[Array, "P G"]:
    """The paper's estimator: reward minus the group's mean, without division by its spread.

    A = R - mean_G(R). DPPO (arXiv 2602.04879) eq. 23; also Dr. GRPO. Unit: that of the reward.
    """
    # relative to one sample first: equal rewards then give exactly 0, not the mean's rounding
    relative = rewards.astype(jnp.float32) - rewards[:, :1]
    return relative - relative.mean(axis=1, keepdims=True)


def group_std_normalized(rewards: Float[Array, "P G"]) -> Float[Array, "P G"]:
    """GRPO's estimator: centred and divided by the group's unbiased standard deviation.

    A = (R - mean_G(R)) / (std_G(R) + 1e-6), std with G - 1 in the denominator.
    GRPO (arXiv 2402.03300) sec. 4.1.2 as in verl@1dda039b core_algos.py. Unit: none.
    """
    centred = group_mean_baseline(rewards)
    degrees_of_freedom = max(rewards.shape[1] - 1, 1)
    std = jnp.sqrt(jnp.square(centred).sum(axis=1, keepdims=True) / degrees_of_freedom)
    return centred / (std + STD_EPSILON)


def leave_one_out(rewards: Float[Array, "P G"]) -> Float[Array, "P G"]:
    """RLOO's estimator: reward minus the mean of the group's other samples.

    A = R - mean_{others}(R) = G/(G-1) (R - mean_G(R)). RLOO (arXiv 2402.14740) sec. 3.
    Unit: that of the reward.
    """
    group = rewards.shape[1]
    return group_mean_baseline(rewards) * (group / max(group - 1, 1))
