"""The references' loss modes, composed of this package's public objectives."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from dppo_jax import objectives
from dppo_jax.records import Objective

REFERENCE_CAP = math.exp(20.0)  # both references clamp log π/μ at 20 before they apply C


class Unchecked(Exception):
    """A row outside what the package composes, or one whose inputs are not at hand."""


Build = Callable[[float, float, float, objectives.Aggregation], Objective]


@dataclass(frozen=True)
class Mode:
    """How to compose a reference's loss mode here, and which log-probabilities play mu."""

    build: Build  # (low, high, cap, aggregate)
    rollout_is: str | None = None  # a case's array; None: the one that the row calls old
    topk: bool = False


def dppo(measure: objectives.Measure, **options: Any) -> Build:
    return lambda low, high, cap, aggregate: objectives.dppo(
        measure, high, delta_low=low, cap=cap, aggregate=aggregate, **options
    )


def relaxed(positive: bool, negative: bool) -> Build:
    """The ablations read a clip ratio as alpha on their side, with the clip itself fixed."""
    return lambda low, high, cap, aggregate: objectives.grpo_relaxed(
        delta_low=0.2 if negative else low,
        delta_high=0.28 if positive else high,
        alpha_low=low if negative else 0.0,
        alpha_high=high if positive else 0.0,
        cap=cap,
        aggregate=aggregate,
    )


def clipped_weight(low: float, high: float, cap: float, aggregate: Any) -> Objective:
    return objectives.cispo(max(1 - low, 0.0), min(1 + high, REFERENCE_CAP), aggregate=aggregate)


def by_sequence(method: Callable[..., Objective]) -> Build:
    """The references aggregate these as a mean of sequence means, whatever they are told."""
    return lambda low, high, cap, aggregate: method(low, high)


def dual_clipped(low: float, high: float, cap: float, aggregate: Any) -> Objective:
    return objectives.ppo_clip(low, high, dual_clip=cap, aggregate=aggregate)


OLD = {"anchor": objectives.old_anchor}
MU = "rollout_log_prob"
BINARY_TV, BINARY_KL = objectives.binary_tv_measure, objectives.binary_kl_measure
SLOTS_TV, SLOTS_KL = objectives.topk_slots_tv_measure, objectives.topk_slots_kl_measure
MODES = {
    ("Stable-RL", "dppo_binary_tv"): Mode(dppo(BINARY_TV), MU),
    ("Stable-RL", "dppo_binary_kl"): Mode(dppo(BINARY_KL), MU),
    ("Stable-RL", "dppo_binary_tv_recompute"): Mode(dppo(BINARY_TV, **OLD), MU),
    ("Stable-RL", "dppo_binary_kl_recompute"): Mode(dppo(BINARY_KL, **OLD), MU),
    ("Stable-RL", "dppo_topk_tv"): Mode(dppo(SLOTS_TV), MU, topk=True),
    ("Stable-RL", "dppo_topk_kl"): Mode(dppo(SLOTS_KL), MU, topk=True),
    ("Stable-RL", "ppo"): Mode(
        lambda low, high, cap, aggregate: objectives.grpo_clip_higher(
            low, high, cap=cap, aggregate=aggregate
        ),
        MU,
    ),
    ("Stable-RL", "ppo_recompute"): Mode(objectives.minirl, MU),
    ("Stable-RL", "ppo_ablation_positive"): Mode(relaxed(True, False), MU),
    ("Stable-RL", "ppo_ablation_negative"): Mode(relaxed(False, True), MU),
    ("Stable-RL", "ppo_ablation_both"): Mode(relaxed(True, True), MU),
    ("Stable-RL", "pg_no_mask"): Mode(
        lambda low, high, cap, aggregate: objectives.pg_tis(cap, aggregate), MU
    ),
    ("verl", "dppo_tv"): Mode(dppo(BINARY_TV)),
    ("verl", "dppo_kl"): Mode(dppo(BINARY_KL)),
    # the recordings' dro_beta, which their rows do not say
    ("verl", "dro"): Mode(
        lambda low, high, cap, aggregate: objectives.dro(0.1, aggregate=aggregate)
    ),
}
for implementation in ("Stable-RL", "verl"):
    MODES[implementation, "cispo"] = Mode(clipped_weight)
    MODES[implementation, "vanilla"] = Mode(dual_clipped)
    MODES[implementation, "gspo"] = Mode(by_sequence(objectives.gspo_token))
    MODES[implementation, "geo_mean"] = Mode(by_sequence(objectives.gmpo))
    MODES[implementation, "sapo"] = Mode(lambda low, high, cap, aggregate: objectives.sapo())
    MODES[implementation, "gpg"] = Mode(
        lambda low, high, cap, aggregate: objectives.reinforce(aggregate)
    )


def aggregation(implementation: str, name: str, mask: np.ndarray) -> objectives.Aggregation:
    if name == "seq-mean-token-sum-norm" and implementation == "Stable-RL":
        # sum over sequences / T, not their mean: the same as a horizon shorter by their number
        horizon = mask.shape[1] / max(int(mask.any(axis=1).sum()), 1)
        return partial(objectives.seq_mean_token_sum_norm, horizon=horizon)
    known = {
        "token-mean": objectives.token_mean,
        "seq-mean-token-mean": objectives.seq_mean_token_mean,
        "seq-mean-token-sum": objectives.seq_mean_token_sum,
        "seq-mean-token-sum-norm": objectives.seq_mean_token_sum_norm,
    }
    if name not in known:
        raise Unchecked(f"aggregation {name} is not known")
    return known[name]
