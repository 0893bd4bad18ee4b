"""Estimators that give each sequence one advantage: rewards [P, G] -> advantages [P, G]."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

STD_EPSILON = 1e-6


def group_mean_baseline(
    rewards: Float[Array, "P G"],
    present: Bool[Array, "P G"] | None = None,
    *,
    keep_single: bool = False,
) -> Float[Array, "P G"]:
    """The paper's estimator: reward minus the group's mean, without division by its spread.

    A = R - mean_G(R). DPPO (arXiv 2602.04879) eq. 23; also Dr. GRPO. Unit: that of the reward.
    """
    here = _here(rewards, present)
    # relative to one sample first: equal rewards then give exactly 0, not the mean's rounding
    relative = rewards.astype(jnp.float32) - rewards[:, :1]
    count = here.sum(axis=1, keepdims=True)
    centred = relative - (relative * here).sum(axis=1, keepdims=True) / jnp.maximum(count, 1)
    return _finish(centred, rewards, here, keep_single)


def group_std_normalized(
    rewards: Float[Array, "P G"],
    present: Bool[Array, "P G"] | None = None,
    *,
    keep_single: bool = False,
) -> Float[Array, "P G"]:
    """GRPO's estimator: centred and divided by the group's unbiased standard deviation.

    A = (R - mean_G(R)) / (std_G(R) + 1e-6), std with G - 1 in the denominator.
    GRPO (arXiv 2402.03300) sec. 4.1.2 as in verl@1dda039b core_algos.py. Unit: none.
    """
    here = _here(rewards, present)
    centred = group_mean_baseline(rewards, present)
    freedom = jnp.maximum(here.sum(axis=1, keepdims=True) - 1, 1)
    std = jnp.sqrt(jnp.square(centred).sum(axis=1, keepdims=True) / freedom)
    return _finish(centred / (std + STD_EPSILON), rewards, here, keep_single)


def leave_one_out(
    rewards: Float[Array, "P G"],
    present: Bool[Array, "P G"] | None = None,
    *,
    keep_single: bool = False,
) -> Float[Array, "P G"]:
    """RLOO's estimator: reward minus the mean of the group's other samples.

    A = R - mean_{others}(R) = G/(G-1) (R - mean_G(R)). RLOO (arXiv 2402.14740) sec. 3.
    Unit: that of the reward.
    """
    here = _here(rewards, present)
    count = here.sum(axis=1, keepdims=True)
    scale = count / jnp.maximum(count - 1, 1)
    centred = group_mean_baseline(rewards, present)
    return _finish(scale * centred, rewards, here, keep_single)


def opo(
    rewards: Float[Array, "P G"],
    response_mask: Bool[Array, "B T"],
    present: Bool[Array, "P G"] | None = None,
    *,
    keep_single: bool = False,
) -> Float[Array, "P G"]:
    """OPO's estimator: reward minus the group's mean weighted by length.

    A = R - Σ_G len·R / Σ_G len, len in response tokens, the sample's own included. OPO
    (arXiv 2505.23585) sec. 3, optimal where a sequence's squared score grows with its length;
    meant for one gradient step a rollout. Unit: that of the reward.
    """
    here = _here(rewards, present)
    lengths = response_mask.sum(axis=1).reshape(rewards.shape) * here
    relative = rewards.astype(jnp.float32) - rewards[:, :1]
    total = jnp.maximum(lengths.sum(axis=1, keepdims=True), 1)
    centred = relative - (relative * lengths).sum(axis=1, keepdims=True) / total
    return _finish(centred, rewards, here, keep_single)


def gpg(
    rewards: Float[Array, "P G"],
    present: Bool[Array, "P G"] | None = None,
    *,
    f_norm: float = 1.0,
    keep_single: bool = False,
) -> Float[Array, "P G"]:
    """GPG's estimator: centred, and scaled up by the share of samples without a reward.

    A = α (R - mean_G(R)) / F_norm, α = B / max(1, number of R ≠ 0) over the whole batch. GPG
    (arXiv 2504.02546) as in verl@1dda039b core_algos.py. Unit: that of the reward / F_norm.
    """
    if not f_norm > 0:
        raise ValueError(f"f_norm must be positive, got {f_norm}")
    here = _here(rewards, present)
    alpha = here.sum() / jnp.maximum(((rewards != 0) & here).sum(), 1)
    return alpha / f_norm * group_mean_baseline(rewards, present, keep_single=keep_single)


def max_rl(
    rewards: Float[Array, "P G"], present: Bool[Array, "P G"] | None = None
) -> Float[Array, "P G"]:
    """MaxRL's estimator: centred and divided by the group's mean, for rewards >= 0.

    A = (R - mean_G(R)) / (mean_G(R) + 1e-6). MaxRL (arXiv 2602.02710) algorithm 1, the gradient of
    log-likelihood of success to the order that G samples can tell. Unit: none.
    """
    here = _here(rewards, present)
    count = jnp.maximum(here.sum(axis=1, keepdims=True), 1)
    mean = (rewards.astype(jnp.float32) * here).sum(axis=1, keepdims=True) / count
    return group_mean_baseline(rewards, present) / (mean + STD_EPSILON)


def pass_at_k(
    rewards: Float[Array, "P G"], *, k: int | None = None, normalize: bool = False
) -> Float[Array, "P G"]:
    """Credit for the best of k: what a sample adds to the maximum of k samples that hold it.

    A_i = mean over the k-subsets S of the group that hold i of (max_S R - max_{S without i} R)
        = Σ_j c_j max(R_i - R_j, 0), c_j = C(rank_j - 1, k - 2) / C(G - 1, k - 1), ranks ascending.
    k None is the whole group, where only the best sample has credit, its lead over the second
    (arXiv 2503.19595, and verl@1dda039b `grpo_passk`, which also divides by the group's standard
    deviation: `normalize=True`); smaller k as in PKPO (arXiv 2505.15201). Unit: the reward's.
    """
    group = rewards.shape[1]
    k = group if k is None else k
    if not 2 <= k <= group:
        raise ValueError(f"pass_at_k needs 2 <= k <= samples a prompt, got k={k} of {group}")
    rewards = rewards.astype(jnp.float32)
    ranks = jnp.argsort(jnp.argsort(rewards, axis=1), axis=1)
    subsets = [math.comb(rank, k - 2) / math.comb(group - 1, k - 1) for rank in range(group)]
    lead = jnp.maximum(rewards[:, :, None] - rewards[:, None, :], 0.0)
    credit = (lead * jnp.asarray(subsets, jnp.float32)[ranks][:, None, :]).sum(axis=2)
    if not normalize:
        return credit
    centred = group_mean_baseline(rewards)
    std = jnp.sqrt(jnp.square(centred).sum(axis=1, keepdims=True) / (group - 1))
    return credit / (std + STD_EPSILON)


def _here(rewards: Float[Array, "P G"], present: Bool[Array, "P G"] | None) -> Bool[Array, "P G"]:
    return jnp.ones(rewards.shape, jnp.bool_) if present is None else present


def _finish(
    advantages: Float[Array, "P G"],
    rewards: Float[Array, "P G"],
    here: Bool[Array, "P G"],
    keep_single: bool,
) -> Float[Array, "P G"]:
    if keep_single:
        single = here.sum(axis=1, keepdims=True) == 1
        advantages = jnp.where(single, rewards, advantages)
    return jnp.where(here, advantages, 0.0)
