"""KL to a reference from sampled tokens: estimates, a term in the loss, a penalty in the reward.

With d = log π - log π_ref of a token sampled from π (J. Schulman, "Approximating KL divergence",
2020): k1 = d and k3 = e^{-d} + d - 1 have the right mean, k2 = d²/2 nearly; as a loss only k2 has
the right gradient, and the `_plus` forms put it under another estimate's value. Unit: nats.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dppo_jax.objectives.terms import with_term
from dppo_jax.records import Batch, Objective, TokenStats

EXPONENT_BOUND = 20.0  # verl@1dda039b kl_penalty_forward; past it k3 is constant

KlEstimate = Callable[[Float[Array, "B T"], Float[Array, "B T"]], Float[Array, "B T"]]


def k1(logp: Float[Array, "B T"], logp_ref: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """d: its mean is the KL, its gradient as a loss is zero in the mean, of either sign."""
    return logp - logp_ref


def absolute(logp: Float[Array, "B T"], logp_ref: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """|d|: not an estimate of the KL, but never negative (verl's `abs`); flat at 0."""
    gap = logp - logp_ref
    return gap * jax.lax.stop_gradient(jnp.sign(gap))


def k2(logp: Float[Array, "B T"], logp_ref: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """d² / 2: biased in value, exact in gradient on policy, never negative."""
    return 0.5 * jnp.square(logp - logp_ref)


def k3(
    logp: Float[Array, "B T"], logp_ref: Float[Array, "B T"], *, ceiling: float = jnp.inf
) -> Float[Array, "B T"]:
    """e^{-d} + d - 1: exact in the mean, of low variance, never negative. GRPO's term
    (arXiv 2402.03300 eq. 4).

    d is clipped to ±20, where float32 still holds e^{-d}; `ceiling=10.0` is verl's and NeMo's.
    """
    gap = jnp.clip(logp_ref - logp, -EXPONENT_BOUND, EXPONENT_BOUND)
    return jnp.minimum(jnp.expm1(gap) - gap, ceiling)


def k1_plus(logp: Float[Array, "B T"], logp_ref: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """k1's value with k2's gradient."""
    return _with_k2_gradient(k1(logp, logp_ref), logp, logp_ref)


def k3_plus(
    logp: Float[Array, "B T"], logp_ref: Float[Array, "B T"], *, ceiling: float = jnp.inf
) -> Float[Array, "B T"]:
    """k3's value with k2's gradient (verl@1dda039b `k3+`)."""
    return _with_k2_gradient(k3(logp, logp_ref, ceiling=ceiling), logp, logp_ref)


def _with_k2_gradient(
    value: Float[Array, "B T"], logp: Float[Array, "B T"], logp_ref: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    slope = k2(logp, logp_ref)
    return jax.lax.stop_gradient(value - slope) + slope


def with_reference_kl(
    objective: Objective, coefficient: float = 0.001, estimator: KlEstimate = k3
) -> Objective:
    """Adds β · KL(π ‖ π_ref) to the loss, aggregated as the objective is.

    L' = L + agg(β · k(log π, log π_ref)). GRPO (arXiv 2402.03300) eq. 3, β = 0.04 there; verl's
    default 0.001. The training loop keeps the reference and scores it once a step. Off policy the
    estimates are of tokens from μ and are not reweighted.
    """

    if not coefficient >= 0:
        raise ValueError(f"coefficient must be >= 0, got {coefficient}")

    def term(stats: TokenStats, batch: Batch) -> Float[Array, "B T"]:
        if batch.logp_ref is None:
            raise ValueError("with_reference_kl needs Batch.logp_ref: score the reference")
        return coefficient * estimator(stats.logp, batch.logp_ref)

    return with_term(objective, term, name="loss/kl_ref", needs=frozenset({"logp_ref"}))


def reference_kl_penalty(
    logp_rollout: Float[Array, "B T"],
    logp_ref: Float[Array, "B T"],
    *,
    coefficient: float = 0.001,
    estimator: KlEstimate = k1,
) -> Float[Array, "B T"]:
    """What a token's reward loses for being unlike the reference: β · k(log μ, log π_ref).

    r_t = R·[t last] - β·k_t: the reward form of RLHF's PPO (arXiv 2203.02155 eq. 2), which counts
    in every later return. verl's default β is 0.001.
    Differs from verl, which measures from the trainer's recomputation: these are the sampler's own.
    """
    return coefficient * estimator(logp_rollout, logp_ref)
