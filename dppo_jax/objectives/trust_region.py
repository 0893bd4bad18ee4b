"""Which tokens a gradient step may still learn from, given how far the policy has moved."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dppo_jax.objectives.measures import Anchor, AnchorLogps, Measure, region_needs
from dppo_jax.records import Batch, Metrics, Need, Scope, TokenStats


class Decision(NamedTuple):
    """A trust region's verdict on each token."""

    keep: Bool[Array, "B T"]  # M of the formulas; meaningless outside response_mask
    divergence: Float[Array, "B T"] | None  # the measured distance; None where nothing is measured
    gate: Float[Array, "B T"] | None = None  # in [0, 1], scales what is kept; None: by 1
    metrics: Metrics | None = None  # of the region's own, unreduced


class TrustRegion(NamedTuple):
    """A rule that drops tokens, and what the training loop must provide for it."""

    decide: Callable[[TokenStats, Batch], Decision]
    needs: frozenset[Need] = frozenset()
    scope: Scope = "token"


def unconstrained() -> TrustRegion:
    """M = 1: every token is kept (PG-IS, PG-TIS, CISPO)."""
    return TrustRegion(lambda stats, batch: Decision(jnp.ones(stats.logp.shape, jnp.bool_), None))


def moving_away(stats: TokenStats, batch: Batch, anchor: AnchorLogps) -> Bool[Array, "B T"]:
    """Tokens that the update pushes further from the anchor: A (π - anchor) > 0, strictly."""
    raised = (batch.advantages > 0) & (stats.logp > anchor.logp)
    return raised | ((batch.advantages < 0) & (stats.logp < anchor.logp))


def by_sign(batch: Batch, low: float, high: float) -> Float[Array, "B T"]:
    """The threshold of each token: `high` where A > 0, else `low`."""
    return jnp.where(batch.advantages > 0, high, low)


def sides(delta: float, low: float | None, high: float | None) -> tuple[float, float]:
    """(δ for A < 0, δ for A > 0), where a side without its own value has `delta`."""
    return delta if low is None else low, delta if high is None else high


def check_thresholds(delta_low: float, delta_high: float) -> None:
    """Raises ValueError where a threshold is negative or not a number."""
    if not (delta_low >= 0 and delta_high >= 0):
        raise ValueError(f"thresholds must be >= 0, got {delta_low} and {delta_high}")


def bounded(
    measure: Measure, *, delta_low: float, delta_high: float, anchor: Callable[[], Anchor]
) -> TrustRegion:
    """Drops a token that is outside the region and would move further out.

    M = 0 where D > δ and (A > 0 and π > anchor, δ = delta_high; or A < 0 and π < anchor,
    δ = delta_low), all strict. DPPO (arXiv 2602.04879) eq. 12; asymmetric δ as in Stable-RL.
    Moves back towards the anchor are never dropped. A = 0 is kept (it contributes nothing), while
    Stable-RL and verl put it in the negative branch of their masks. δ in the measure's unit.
    """
    check_thresholds(delta_low, delta_high)
    centre = anchor()

    def decide(stats: TokenStats, batch: Batch) -> Decision:
        logps = centre.logps(batch)
        distance = jax.lax.stop_gradient(measure(stats, batch, logps))
        outside = distance > by_sign(batch, delta_low, delta_high)
        return Decision(~(outside & moving_away(stats, batch, logps)), distance)

    return TrustRegion(decide, region_needs(measure, centre))


def relax_rare(region: TrustRegion, *, alpha_low: float, alpha_high: float) -> TrustRegion:
    """Exempts tokens that the rollout policy found unlikely from a region.

    M' = 1 where μ < alpha_high (A > 0) or μ < alpha_low (A < 0), else M.
    DPPO (arXiv 2602.04879) sec. 6, "relax clipping"; an alpha of 0 exempts nothing.
    """

    def decide(stats: TokenStats, batch: Batch) -> Decision:
        verdict = region.decide(stats, batch)
        alpha = jnp.where(batch.advantages > 0, alpha_high, alpha_low)
        rare = jnp.exp(batch.rollout.logp_rollout) < alpha
        gate = None if verdict.gate is None else jnp.where(rare, 1.0, verdict.gate)
        return verdict._replace(keep=verdict.keep | rare, gate=gate)

    return TrustRegion(decide, region.needs, region.scope)
