"""CPPO: a trust region on the whole prefix, tighter early and within a budget (arXiv 2606.10968).

With t = 1..T the place among the sequence's own T response tokens, D_t a measured distance and
w_t = w_min + (1 - w_min)(T - t)/(T - 1) (1 where T = 1):

    Z_t = w_t D_t    S_t = Σ_{j<=t} Z_j    W_t = Σ_{j<=t} w_j
    c_t = min(δ, δ + b·W_{t-1} - S_{t-1})                                          (eq. 8)

S and W run over all response tokens, dropped or not, and do not depend on A. b is the budget that a
token adds to its successors. `delta_low` and `delta_high` replace δ for A < 0 and A > 0.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dppo_jax.objectives.aggregate import Aggregation, token_mean
from dppo_jax.objectives.measures import (
    KL_MEASURES,
    Anchor,
    AnchorLogps,
    Measure,
    region_needs,
    rollout_anchor,
    topk_kl_measure,
    topk_tv_measure,
)
from dppo_jax.objectives.metrics import largest
from dppo_jax.objectives.policy_gradient import Form, policy_gradient
from dppo_jax.objectives.trust_region import (
    Decision,
    TrustRegion,
    by_sign,
    check_thresholds,
    moving_away,
    sides,
)
from dppo_jax.records import Batch, Max, Metrics, Objective, TokenStats

Budget = Callable[[Float[Array, "B T"], Bool[Array, "B T"]], Float[Array, "B 1"]]


def fixed_budget(value: float = 0.015) -> Budget:
    """The same b for every sequence: 0.015 for post-trained models, 0.002 with KL (sec. 5)."""
    if not value >= 0:
        raise ValueError(f"a budget must be >= 0, got {value}")
    return lambda distance, mask: jnp.full((mask.shape[0], 1), value, jnp.float32)


def quantile_budget(floor: float = 0.02, times: float = 2.0, quantile: float = 0.9) -> Budget:
    """b = clip(quantile of the sequence's D, floor, times·floor), base models; eq. 22.

    A sequence without tokens gets the floor. The floor is 0.015 for Qwen3-1.7B. `times` = 5 is
    verl's pull request 6731.
    """
    if floor < 0 or times < 1 or not 0 <= quantile <= 1:
        raise ValueError(
            f"a quantile budget needs floor >= 0, times >= 1, 0 <= quantile <= 1, got {floor}, "
            f"{times}, {quantile}"
        )

    def budget(distance: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B 1"]:
        ordered = jnp.sort(jnp.where(mask, distance, jnp.inf), axis=1)
        last = jnp.maximum(mask.sum(axis=1, keepdims=True) - 1, 0)
        place = quantile * last.astype(jnp.float32)
        below = jnp.floor(place).astype(jnp.int32)
        low = jnp.take_along_axis(ordered, below, axis=1)
        high = jnp.take_along_axis(ordered, jnp.minimum(below + 1, last), axis=1)
        found = jnp.where(mask.any(axis=1, keepdims=True), low, floor)
        rise = jnp.where(mask.any(axis=1, keepdims=True), high - low, 0.0)
        return jnp.clip(found + (place - below) * rise, floor, times * floor)

    return budget


class Prefix(NamedTuple):
    """Everything of eq. 8 at each token."""

    distance: Float[Array, "B T"]  # D_t
    weighted: Float[Array, "B T"]  # Z_t
    spent: Float[Array, "B T"]  # S_{t-1}
    granted: Float[Array, "B T"]  # b·W_{t-1}
    weights: Float[Array, "B T"]  # W_t


def prefix_sums(
    distance: Float[Array, "B T"], mask: Bool[Array, "B T"], *, w_min: float, budget: Budget
) -> Prefix:
    """The sums of eq. 8, each over the response tokens strictly before; two cumulative sums."""
    inside = mask.astype(jnp.float32)
    distance = jnp.where(mask, distance, 0.0)
    length = inside.sum(axis=1, keepdims=True)
    place = jnp.cumsum(inside, axis=1)
    fall = (1.0 - w_min) * (place - 1.0) / jnp.maximum(length - 1.0, 1.0)
    weight = jnp.where(mask, 1.0 - fall, 0.0)
    weighted = weight * distance
    granted = budget(distance, mask) * _before(weight)
    return Prefix(distance, weighted, _before(weighted), granted, jnp.cumsum(weight, axis=1))


def _before(values: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """The sum of all entries to the left of each."""
    return jnp.pad(jnp.cumsum(values, axis=1)[:, :-1], [(0, 0), (1, 0)])


def prefix_budget(
    measure: Measure,
    *,
    delta_low: float,
    delta_high: float,
    anchor: Callable[[], Anchor],
    w_min: float = 0.8,
    budget: Callable[[], Budget] = quantile_budget,
) -> TrustRegion:
    """CPPO's mask: M = 1 where not moving away or Z_t <= c_t; eq. 10. c_t may be negative."""

    def decide(prefix: Prefix, delta: Float[Array, "B T"], away: Bool[Array, "B T"]) -> Decision:
        ceiling = jnp.minimum(delta, delta + prefix.granted - prefix.spent)
        return Decision(~away | (prefix.weighted <= ceiling), prefix.distance)

    return _region(measure, (delta_low, delta_high), anchor, w_min, budget, decide)


def soft_prefix_budget(
    measure: Measure,
    *,
    delta_low: float,
    delta_high: float,
    anchor: Callable[[], Anchor],
    w_min: float = 0.8,
    budget: Callable[[], Budget] = quantile_budget,
) -> TrustRegion:
    """CPPO's soft gate: a token that moves away weighs min(1, 1/x_t) in place of the mask.

    x_t = max(w_t D_t / δ, S_t / (δ + b·W_{t-1})); both are 1 on their boundary.
    """
    if not min(delta_low, delta_high) > 0:
        raise ValueError(f"delta must be positive, got {delta_low} and {delta_high}")

    def decide(prefix: Prefix, delta: Float[Array, "B T"], away: Bool[Array, "B T"]) -> Decision:
        whole = (prefix.spent + prefix.weighted) / (delta + prefix.granted)
        excess = jnp.maximum(prefix.weighted / delta, whole)
        gate = jnp.where(away, 1.0 / jnp.maximum(excess, 1.0), 1.0)
        return Decision(jnp.ones(away.shape, jnp.bool_), prefix.distance, gate)

    return _region(measure, (delta_low, delta_high), anchor, w_min, budget, decide)


def _region(
    measure: Measure,
    deltas: tuple[float, float],
    anchor: Callable[[], Anchor],
    w_min: float,
    budget: Callable[[], Budget],
    decide: Callable[[Prefix, Float[Array, "B T"], Bool[Array, "B T"]], Decision],
) -> TrustRegion:
    check_thresholds(*deltas)
    if not 0 <= w_min <= 1:
        raise ValueError(f"w_min must be in [0, 1], got {w_min}")
    centre, made = anchor(), budget()

    def verdict(stats: TokenStats, batch: Batch) -> Decision:
        logps: AnchorLogps = centre.logps(batch)
        distance = jax.lax.stop_gradient(measure(stats, batch, logps))
        prefix = prefix_sums(distance, batch.rollout.response_mask, w_min=w_min, budget=made)
        found = decide(prefix, by_sign(batch, *deltas), moving_away(stats, batch, logps))
        if measure in KL_MEASURES or centre.needs:  # theorem 1: total variation, from μ
            return found
        return found._replace(metrics=_bound_terms(prefix, batch.rollout.response_mask))

    return TrustRegion(verdict, region_needs(measure, centre), "sequence")


def _bound_terms(prefix: Prefix, mask: Bool[Array, "B T"]) -> Metrics:
    """What theorem 1 (`bounds.penalty_prefix`) rests on: T, and the largest S_t / W_t of a sequence
    as δ_b, which no mean over sequences exceeds."""
    share = (prefix.spent + prefix.weighted) / jnp.maximum(prefix.weights, 1e-6)
    return {
        "bound/prefix_budget_max": largest(share, mask),
        "bound/length_max": Max(jnp.max(mask.sum(axis=1), initial=0).astype(jnp.float32)),
    }


KL_BUDGET = partial(fixed_budget, 0.002)


def cppo(
    measure: Measure = topk_tv_measure,
    delta: float = 0.15,
    delta_low: float | None = None,
    delta_high: float | None = None,
    w_min: float = 0.8,
    budget: Callable[[], Budget] = quantile_budget,
    anchor: Callable[[], Anchor] = rollout_anchor,
    cap: float = jnp.inf,
    aggregate: Aggregation = token_mean,
    form: Form = policy_gradient,
    rule: Callable[..., TrustRegion] = prefix_budget,
) -> Objective:
    """CPPO: DPPO whose threshold falls along the sequence and shrinks as its prefix drifts; eq. 10.

    δ = 0.15 for dense models, 0.20 for 30B-A3B; the measure is Top-K(20) TV in the main runs.
    `rule` is prefix_budget, the mask, or soft_prefix_budget, the gate.
    Differs from verl's pull request 6731: that counts padding in T and measures Binary-TV.
    """
    low, high = sides(delta, delta_low, delta_high)
    region = rule(
        measure, delta_low=low, delta_high=high, anchor=anchor, w_min=w_min, budget=budget
    )
    return form(region, cap=cap, aggregate=aggregate)


def cppo_kl(
    delta: float = 0.1,
    delta_low: float | None = None,
    delta_high: float | None = None,
    w_min: float = 0.8,
    budget: Callable[[], Budget] = KL_BUDGET,
    anchor: Callable[[], Anchor] = rollout_anchor,
    cap: float = jnp.inf,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """CPPO with Top-K KL: δ = 0.1 and b = 0.002 nats, the paper's KL variant."""
    return cppo(
        topk_kl_measure, delta, delta_low, delta_high, w_min, budget, anchor, cap, aggregate
    )


def cppo_soft(
    delta: float = 0.15,
    delta_low: float | None = None,
    delta_high: float | None = None,
    w_min: float = 0.8,
    budget: Callable[[], Budget] = quantile_budget,
    anchor: Callable[[], Anchor] = rollout_anchor,
    cap: float = jnp.inf,
    aggregate: Aggregation = token_mean,
) -> Objective:
    """CPPO's soft-gate variant, Top-K TV: see `soft_prefix_budget`."""
    return cppo(
        topk_tv_measure,
        delta,
        delta_low,
        delta_high,
        w_min,
        budget,
        anchor,
        cap,
        aggregate,
        rule=soft_prefix_budget,
    )
