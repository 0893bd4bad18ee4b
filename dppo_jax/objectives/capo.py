"""CAPO: drops tokens whose own step is predicted to do harm, or to move the policy far."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dppo_jax.objectives.aggregate import Aggregation, token_mean
from dppo_jax.objectives.measures import ratio_measure, rollout_anchor
from dppo_jax.objectives.policy_gradient import policy_gradient
from dppo_jax.objectives.trust_region import Decision, TrustRegion, bounded
from dppo_jax.records import Batch, Objective, TokenStats


class Predicted(NamedTuple):
    """What a token's own step on the last layer is predicted to do, to second order."""

    objective: Float[Array, "B T"]  # m_H: change of A·log π(a)
    policy: Float[Array, "B T"]  # m_F: half the squared change of log π(a)


def predicted_by_step(stats: TokenStats, batch: Batch, step_size: float) -> Predicted:
    """m_H = A·s + A·(s² - Var_π(u))/2 and m_F = s²/2 for the logits' change u = c·(e_a - π).

    c = step_size·A·mean(x²)/T², e_a is 1 at the sampled token, x the last hidden state. With
    r = 1 - π_a and r_n the sum of π^n over the other tokens: s = (e_a - π)·u = c·(r² + r_2) and
    Var_π(u) = c²·(π_a·r² + r_3 - (π_a·r - r_2)²).
    CAPO (arXiv 2510.00819): g·D + DᵀHD/2 and DᵀFD/2 with g = A·(e_a - π)⊗x/T,
    H = A·((e_a - π)(e_a - π)ᵀ - diag π + ππᵀ)⊗xxᵀ/T², F = (e_a - π)(e_a - π)ᵀ⊗xxᵀ/T², of the
    unembedding alone. D is step_size / width · g of the token itself: the model of the optimizer
    that luckeciano/stable-pg-llm@933fe017 calls sgd.
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
    step_size: float = 0.054,
    delta_f: float = 1e-4,
    delta_h: float = -0.01,
    delta_h_high: float = 0.01,
    delta_low: float = 0.2,
    delta_high: float = 0.2,
    cap: float = jnp.inf,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """Experimental: GRPO of the tokens with delta_h <= m_H <= delta_h_high and m_F <= delta_f.

    L = agg(-A · sg[min(π/μ, C)] · sg[M] · log π), m_H and m_F of `predicted_by_step`, M also 0
    where GRPO's clip masks. CAPO (arXiv 2510.00819); luckeciano/stable-pg-llm@933fe017
    src/open_r1/grpo_entropy_trainer.py, the recipe of its CAPO: learning rate 1.5e-5, which at its
    model's width of 3584 is this step_size, delta_f 1e-4, |m_H| < 0.01 (Dr.CAPO: 1e-3 and 5e-4).
    Assumed here: a step of plain gradient ascent for D, an option of that code; the paper models
    Adam's, for which the thresholds were set. Differs from the code: π is over the whole
    vocabulary, there over the most likely tokens; dropped tokens stay in the denominators.
    """
    if not step_size > 0 or not delta_f >= 0 or not delta_h <= delta_h_high:
        raise ValueError(
            f"step_size={step_size} > 0, delta_f={delta_f} >= 0 and delta_h={delta_h} <= "
            f"delta_h_high={delta_h_high} needed"
        )
    clip = bounded(ratio_measure, delta_low=delta_low, delta_high=delta_high, anchor=rollout_anchor)

    def decide(stats: TokenStats, batch: Batch) -> Decision:
        change = predicted_by_step(stats, batch, step_size)
        inside = (change.objective >= delta_h) & (change.objective <= delta_h_high)
        keep = inside & (change.policy <= delta_f) & clip.decide(stats, batch).keep
        return Decision(keep, change.policy)

    region = TrustRegion(decide, needs=frozenset({"last_layer"}))
    return policy_gradient(region, cap=cap, aggregate=aggregate)
