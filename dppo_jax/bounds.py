"""Lower bounds on the improvement J(π) - J(μ) from what a rollout policy μ has sampled.

Finite horizon T, reward R of a whole sequence, ξ = max |R|, r_t = π/μ at token t, D_t the total
variation between μ and π at the state before token t:

    J(π) - J(μ) = L' - Δ        L' = E_μ[R Σ_t (r_t - 1)]
                                Δ  = E_μ[R Σ_t (r_t - 1)(1 - Π_{j>t} r_j)]

L' can be estimated without a single sample of π; Δ is what the penalties below bound from above, so
that J(π) - J(μ) >= L' - penalty for each of them, and for the smallest. DPPO (arXiv 2602.04879)
sec. 3 and CPPO (arXiv 2606.10968) theorem 1. Every statement wants μ > 0 wherever π > 0. R may
have a baseline that is constant for a prompt subtracted: an advantage has. A binary or Top-K
divergence is at most the true one, so a penalty made of it may be too small.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Number = Float[Array, ""] | float


def sampled_tv(log_ratio: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """½ |r - 1|, whose mean over tokens drawn from μ is the total variation itself.

    D(s) = ½ Σ_a |μ - π| = E_{a~μ} ½ |π/μ - 1|. The mean of `binary_tv` over tokens has no such
    meaning.
    """
    return 0.5 * jnp.abs(jnp.expm1(log_ratio))


def surrogate(
    rewards: Float[Array, " N"],
    log_ratio: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    probability: Float[Array, " N"] | None = None,
) -> Float[Array, ""]:
    """L' = E_μ[R Σ_t (r_t - 1)]: arXiv 2602.04879 sec. 3.

    `probability` weighs each sequence, where all sequences are enumerated; None is a sample of μ.
    """
    return _expectation(rewards * _excess(log_ratio, mask).sum(axis=1), probability)


def surrogate_error(
    rewards: Float[Array, " N"],
    log_ratio: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    probability: Float[Array, " N"] | None = None,
) -> Float[Array, ""]:
    """Δ = E_μ[R Σ_t (r_t - 1)(1 - Π_{j>t} r_j)], so that J(π) - J(μ) = L' - Δ exactly.

    arXiv 2602.04879 sec. 3. From a sample its variance grows exponentially with the length.
    """
    inside = jnp.where(mask, log_ratio, 0.0)
    after = inside.sum(axis=1, keepdims=True) - jnp.cumsum(inside, axis=1)  # Σ_{j>t} log r_j
    lost = _excess(log_ratio, mask) * -jnp.expm1(after)
    return _expectation(rewards * lost.sum(axis=1), probability)


def penalty_max_tv(
    reward_max: Number,
    horizon: Int[Array, ""] | int,
    tv_max: Number,
) -> Number:
    """2 ξ T (T - 1) (max_s D)²: arXiv 2602.04879 eq. 7. The maximum is over all states."""
    return 2.0 * reward_max * horizon * (horizon - 1) * tv_max**2


def penalty_sum_tv(reward_max: Number, tv_sum: Number) -> Number:
    """4 ξ E_μ[Σ_t D_t]: arXiv 2602.04879 eq. 8. `sampled_tv` estimates the expectation."""
    return 4.0 * reward_max * tv_sum


def penalty_prefix(
    reward_max: Number,
    horizon: Int[Array, ""] | int,
    tv_max: Number,
    budget: Number,
) -> Number:
    """2 ξ T (T - 1) ℓ δ_b with ℓ >= D at all states, δ_b = `prefix_budget`: never above eq. 7's.

    CPPO (arXiv 2606.10968) theorem 1; its token threshold w_t D_t <= δ means ℓ = δ / w_min.
    Differs from the paper: its mask lets S_t reach δ + δ_b W_{t-1}, somewhat more than the δ_b W_t
    that the bound rests on.
    """
    return 2.0 * reward_max * horizon * (horizon - 1) * tv_max * budget


def with_improvement(numbers: Mapping[str, float]) -> dict[str, float]:
    """A step's numbers and `bound/improvement`, L' less eq. 8's penalty, where they hold its terms;
    with CPPO's (of TV) also `bound/prefix_improvement`, L' less that of theorem 1.

    Estimates, from what μ has sampled, of lower bounds on J(π) - J(μ); ξ is the largest |A|, ℓ of
    theorem 1 the largest divergence that was measured.
    """
    found = dict(numbers)
    if "bound/surrogate" in numbers:
        penalty = penalty_sum_tv(numbers["advantage/max"], numbers["bound/tv_sum"])
        found["bound/improvement"] = numbers["bound/surrogate"] - float(penalty)
    if "bound/prefix_budget_max" in numbers:
        horizon, tv_max = int(numbers["bound/length_max"]), numbers["divergence/max"]
        penalty = penalty_prefix(
            numbers["advantage/max"], horizon, tv_max, numbers["bound/prefix_budget_max"]
        )
        found["bound/prefix_improvement"] = numbers["bound/surrogate"] - float(penalty)
    return found


def prefix_budget(
    expected_tv: Float[Array, " T"], weights: Float[Array, " T"] | None = None
) -> Float[Array, ""]:
    """The smallest δ_b with Σ_{j<=t} w_j E_μ[D_j] <= δ_b Σ_{j<=t} w_j for every prefix t.

    CPPO (arXiv 2606.10968) sec. 4. `weights` are positive and (T - t) / w_t does not grow with t,
    as with CPPO's; None is w_min = 1. The steps from Δ to theorem 1:
    |Δ| <= ξ Σ_t E|Π_{j<t} r_j - 1| 2ℓ <= 4 ξ ℓ Σ_t Σ_{j<t} E[D_j] = 4 ξ ℓ Σ_j (T - j) E[D_j], and
    summation by parts puts δ_b in the place of E[D_j].
    """
    weights = jnp.ones_like(expected_tv) if weights is None else weights
    return jnp.max(jnp.cumsum(weights * expected_tv) / jnp.cumsum(weights))


def _excess(log_ratio: Float[Array, "N T"], mask: Bool[Array, "N T"]) -> Float[Array, "N T"]:
    """r - 1, and 0 outside the mask."""
    return jnp.expm1(jnp.where(mask, log_ratio, 0.0))


def _expectation(
    values: Float[Array, " N"], probability: Float[Array, " N"] | None
) -> Float[Array, ""]:
    return jnp.mean(values) if probability is None else jnp.sum(probability * values)
