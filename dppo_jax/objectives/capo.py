"""CAPO: drops tokens whose own step is predicted to do harm, or to move the policy far."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dppo_jax.objectives.aggregate import Aggregation, token_mean
from dppo_jax.objectives.policy_gradient import policy_gradient
from dppo_jax.objectives.trust_region import Decision, TrustRegion
from dppo_jax.records import Batch, Objective, TokenStats


class Predicted(NamedTuple):
    """What a token's own step on the last layer is predicted to do, to second order."""

    objective: Float[Array, "B T"]  # m_H: change of A·log π(a)
    policy: Float[Array, "B T"]  # m_F: half the squared change of log π(a)


def predicted_by_step(stats: TokenStats, batch: Batch, step_size: float) -> Predicted:
    """m_H = A·s + A·(s² - Var_π(u))/2 and m_F = s²/2 for the logits' change u = c·(e_a - π).

    c = step_size·A·mean(x²), e_a is 1 at the sampled token, x the last hidden state. With
    r = 1 - π_a and r_n the sum of π^n over the other tokens: s = (e_a - π)·u = c·(r² + r_2) and
    Var_π(u) = c²·(π_a·r² + r_3 - (π_a·r - r_2)²).
    CAPO (arXiv 2510.00819): g·D + DᵀHD/2 and DᵀFD/2 with g = A·(e_a - π)⊗x,
    H = A·((e_a - π)(e_a - π)ᵀ - diag π + ππᵀ)⊗xxᵀ, F = (e_a - π)(e_a - π)ᵀ⊗xxᵀ, of the unembedding
    alone. Here D is step_size / width · g of the token itself.
    """
    if stats.last_layer is None:
        raise ValueError("capo needs TokenStats.last_layer: score with what it needs")
    squares, cubes, hidden = (stats.last_layer[..., i] for i in range(3))
    likely, rest, advantage = jnp.exp(stats.logp), -jnp.expm1(stats.logp), batch.advantages
    # Differences of sums near 1: never beyond what the rest's own mass allows.
    squares = jnp.clip(squares - likely**2, 0.0, rest**2)
    cubes = jnp.clip(cubes - likely**3, 0.0, rest**3)
    size = step_size * advantage * hidden
    change = size * (rest**2 + squares)
    variance = size**2 * (likely * rest**2 + cubes - (likely * rest - squares) ** 2)
    objective = advantage * change + 0.5 * advantage * (change**2 - variance)
    return jax.lax.stop_gradient(Predicted(objective, 0.5 * change**2))


def capo(
    step_size: float = 0.1,
    delta_f: float = 0.005,
    delta_h: float = 0.0,
    delta_h_high: float = jnp.inf,
    cap: float = jnp.inf,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """Experimental: keeps a token iff delta_h <= m_H <= delta_h_high and m_F <= delta_f.

    L = agg(-A · sg[min(π/μ, C)] · sg[M] · log π), m_H and m_F of `predicted_by_step`.
    CAPO (arXiv 2510.00819) masks tokens by these two forms of a last-layer model of the objective
    and of the policy. Assumed here, since neither code nor thresholds were found: the step D is
    that of plain gradient ascent on the token alone (the paper models Adam's), scaled by the
    hidden state's width, so that c is step_size·A where mean(x²) is 1; all defaults (delta_f =
    0.005 is a change of log π(a) by 0.1); the ratio π/μ as the weight.
    """
    if not step_size > 0 or not delta_f >= 0 or not delta_h <= delta_h_high:
        raise ValueError(
            f"step_size={step_size} > 0, delta_f={delta_f} >= 0 and delta_h={delta_h} <= "
            f"delta_h_high={delta_h_high} needed"
        )

    def decide(stats: TokenStats, batch: Batch) -> Decision:
        change = predicted_by_step(stats, batch, step_size)
        inside = (change.objective >= delta_h) & (change.objective <= delta_h_high)
        return Decision(inside & (change.policy <= delta_f), change.policy)

    region = TrustRegion(decide, needs=frozenset({"last_layer"}))
    return policy_gradient(region, cap=cap, aggregate=aggregate)
