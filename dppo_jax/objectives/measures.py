"""How far the current policy is from an anchor at each token: the axis of DPPO's ablations.

An `Anchor` picks the policy that the trust region is drawn around; a measure maps the scored
policy, the batch and the anchor's log-probabilities to a distance >= 0 a token.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dppo_jax import divergence
from dppo_jax.records import Batch, Need, TokenStats

LOG_RATIO_CEILING = 60.0  # e^60 = 1e26: sums and products of such ratios stay finite in float32
SURROGATE_CEILING = 20.0  # e^20 = 5e8: its square, and sums of it, stay finite in float32


class AnchorLogps(NamedTuple):
    """The anchor's log-probabilities of what was sampled."""

    logp: Float[Array, "B T"]  # of the sampled token
    topk_logp: Float[Array, "B T K"] | None  # of Rollout.topk_ids


class Anchor(NamedTuple):
    """Where a trust region is centred, and what the training loop must provide for it."""

    logps: Callable[[Batch], AnchorLogps]
    needs: frozenset[Need] = frozenset()


Measure = Callable[[TokenStats, Batch, AnchorLogps], Float[Array, "B T"]]


def rollout_anchor() -> Anchor:
    """The policy that sampled the tokens, mu: the paper's choice (arXiv 2602.04879 sec. 5)."""
    return Anchor(
        lambda batch: AnchorLogps(batch.rollout.logp_rollout, batch.rollout.topk_logp_rollout)
    )


def old_anchor() -> Anchor:
    """The trainer's recomputation before the update: "decoupled"; the paper finds it unstable."""
    return Anchor(_old_logps, needs=frozenset({"logp_old"}))


def _old_logps(batch: Batch) -> AnchorLogps:
    if batch.logp_old is None:
        raise ValueError("old_anchor needs Batch.logp_old: score the batch before the update")
    return AnchorLogps(batch.logp_old, batch.topk_logp_old)


def importance_ratio(
    logp: Float[Array, "B T"], logp_anchor: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """π/μ of the sampled token, without gradient; at most e^60 so that float32 cannot overflow."""
    log_ratio = jax.lax.stop_gradient(logp - logp_anchor)
    return jnp.exp(jnp.minimum(log_ratio, LOG_RATIO_CEILING))


def bounded_exp(log_ratio: Float[Array, "*N"], ceiling: float) -> Float[Array, "*N"]:
    """min(eˣ, e^ceiling), differentiable: the gradient at any x is the value times that of x.

    Differs from the clamp of verl and its forks, which has no gradient past the ceiling: there too
    a token with A < 0 is to be pushed back.
    """
    value = jnp.exp(jnp.minimum(jax.lax.stop_gradient(log_ratio), ceiling))
    # where π underflows the ratio and its gradient are 0: never infinity minus infinity
    inside = jnp.where(value > 0, log_ratio, 0.0)
    return value * jnp.exp(inside - jax.lax.stop_gradient(inside))


def surrogate_ratio(
    logp: Float[Array, "B T"], logp_anchor: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """π/anchor of the sampled token, differentiable; its value is at most e^20."""
    return bounded_exp(logp - jax.lax.stop_gradient(logp_anchor), SURROGATE_CEILING)


def ratio_measure(stats: TokenStats, batch: Batch, anchor: AnchorLogps) -> Float[Array, "B T"]:
    """|π/μ - 1|: PPO's and GRPO's trust region (arXiv 1707.06347 eq. 7 written as a mask)."""
    log_ratio = jax.lax.stop_gradient(stats.logp - anchor.logp)
    return jnp.abs(jnp.expm1(jnp.minimum(log_ratio, LOG_RATIO_CEILING)))


def binary_tv_measure(stats: TokenStats, batch: Batch, anchor: AnchorLogps) -> Float[Array, "B T"]:
    """|μ - π| at the sampled token: DPPO (arXiv 2602.04879) eq. 13."""
    return divergence.binary_tv(anchor.logp, stats.logp)


def binary_kl_measure(stats: TokenStats, batch: Batch, anchor: AnchorLogps) -> Float[Array, "B T"]:
    """KL of {sampled, rest}: DPPO (arXiv 2602.04879) eq. 14."""
    return divergence.binary_kl(anchor.logp, stats.logp)


def topk_tv_measure(stats: TokenStats, batch: Batch, anchor: AnchorLogps) -> Float[Array, "B T"]:
    """TV over TopK(μ) ∪ {sampled} and the rest: DPPO (arXiv 2602.04879) eq. 15."""
    return divergence.topk_tv(
        anchor.logp,
        stats.logp,
        batch.rollout.response_tokens,
        batch.rollout.topk_ids,
        _topk(anchor),
        stats.topk_logp,
    )


def topk_kl_measure(stats: TokenStats, batch: Batch, anchor: AnchorLogps) -> Float[Array, "B T"]:
    """KL over TopK(μ) ∪ {sampled} and the rest: DPPO (arXiv 2602.04879) eq. 16."""
    return divergence.topk_kl(
        anchor.logp,
        stats.logp,
        batch.rollout.response_tokens,
        batch.rollout.topk_ids,
        _topk(anchor),
        stats.topk_logp,
    )


def topk_slots_tv_measure(
    stats: TokenStats, batch: Batch, anchor: AnchorLogps
) -> Float[Array, "B T"]:
    """TV over K slots, the sampled token's among them, and the rest: Stable-RL@c6af1d11's form."""
    return divergence.topk_slots_tv(*_slots(stats, batch, anchor))


def topk_slots_kl_measure(
    stats: TokenStats, batch: Batch, anchor: AnchorLogps
) -> Float[Array, "B T"]:
    """KL over K slots, the sampled token's among them, and the rest: Stable-RL@c6af1d11's form."""
    return divergence.topk_slots_kl(*_slots(stats, batch, anchor))


def _slots(
    stats: TokenStats, batch: Batch, anchor: AnchorLogps
) -> tuple[Float[Array, "B T K"], Float[Array, "B T K"]]:
    """The stored slots of both policies, where the last is the sampled token's if none is.

    What Stable-RL's rollout engines do to the K that they return (vllm_async_server.py).
    """
    rollout, stored = batch.rollout, _topk(anchor)
    absent = ~(rollout.topk_ids == rollout.response_tokens[..., None]).any(-1, keepdims=True)
    last = jnp.arange(stored.shape[-1]) == stored.shape[-1] - 1
    replaced = absent & last
    return (
        jnp.where(replaced, anchor.logp[..., None], stored),
        jnp.where(replaced, stats.logp[..., None], stats.topk_logp),
    )


def exact_tv_measure(stats: TokenStats, batch: Batch, anchor: AnchorLogps) -> Float[Array, "B T"]:
    """½ Σ_v |μ_v - π_v| over the whole vocabulary: what eqs. 13 and 15 of DPPO bound from below.

    μ is the anchor's policy, scored by the trainer with the parameters that sampled
    (rollout_anchor) or those before the step's updates (old_anchor).
    """
    return _exact("exact_tv", stats.exact_tv)


def exact_kl_measure(stats: TokenStats, batch: Batch, anchor: AnchorLogps) -> Float[Array, "B T"]:
    """KL(μ || π) over the whole vocabulary: what eqs. 14 and 16 of DPPO bound from below.

    μ is as in `exact_tv_measure`.
    """
    return _exact("exact_kl", stats.exact_kl)


KL_MEASURES = (binary_kl_measure, topk_kl_measure, topk_slots_kl_measure, exact_kl_measure)


def region_needs(measure: Measure, centre: Anchor) -> frozenset[Need]:
    """What a region asks of the training loop beside the rollout and the scored policy."""
    if measure not in (exact_tv_measure, exact_kl_measure):
        return centre.needs
    return centre.needs | {"exact_divergence_old" if centre.needs else "exact_divergence"}


def _exact(name: str, value: Float[Array, "B T"] | None) -> Float[Array, "B T"]:
    if value is None:
        raise ValueError(
            f"TokenStats.{name} is missing: score with the anchor's parameters "
            '(Objective.needs must hold "exact_divergence" or "exact_divergence_old")'
        )
    return value


def _topk(anchor: AnchorLogps) -> Float[Array, "B T K"]:
    if anchor.topk_logp is None:
        raise ValueError("a top-K measure at old_anchor needs Batch.topk_logp_old")
    return anchor.topk_logp
