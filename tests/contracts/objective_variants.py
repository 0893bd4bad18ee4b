"""The table of objective variants: a new objective is one row here and passes the same suite."""

from dataclasses import dataclass
from functools import partial

from dppo_jax import objectives as o
from dppo_jax.records import Need, Objective


@dataclass(frozen=True)
class Variant:
    """An objective and what the suite must know of it."""

    name: str
    objective: Objective
    cap: float = float("inf")
    needs: frozenset[Need] = frozenset()
    measures: bool = True


OLD = frozenset[Need]({"logp_old"})
HORIZON = partial(o.seq_mean_token_sum_norm, horizon=64)

VARIANTS = [
    Variant("dppo_binary_tv", o.dppo_binary_tv()),
    Variant("dppo_binary_kl", o.dppo_binary_kl()),
    Variant("dppo_topk_tv", o.dppo_topk_tv()),
    Variant("dppo_topk_kl", o.dppo_topk_kl()),
    Variant("dppo_topk_slots_tv", o.dppo(o.topk_slots_tv_measure, 0.15)),
    Variant("dppo_topk_slots_kl", o.dppo(o.topk_slots_kl_measure, 0.05)),
    Variant("dppo_binary_tv asymmetric", o.dppo_binary_tv(delta_low=0.05, delta_high=0.3)),
    Variant("dppo_binary_tv capped", o.dppo_binary_tv(0.2, cap=5.0), cap=5.0),
    Variant("dppo_binary_tv recomputed", o.dppo_binary_tv(anchor=o.old_anchor), needs=OLD),
    Variant("dppo_binary_kl recomputed", o.dppo_binary_kl(anchor=o.old_anchor), needs=OLD),
    Variant("dppo_topk_tv recomputed", o.dppo_topk_tv(anchor=o.old_anchor), needs=OLD),
    Variant("dppo_topk_kl recomputed", o.dppo_topk_kl(anchor=o.old_anchor), needs=OLD),
    Variant("dppo_binary_kl seq mean", o.dppo_binary_kl(aggregate=o.seq_mean_token_mean)),
    Variant("dppo_binary_tv seq sum", o.dppo_binary_tv(aggregate=o.seq_mean_token_sum)),
    Variant("dppo_binary_tv horizon", o.dppo_binary_tv(aggregate=HORIZON)),
    Variant("grpo", o.grpo()),
    Variant("grpo recomputed", o.grpo(anchor=o.old_anchor), needs=OLD),
    Variant("grpo_clip_higher", o.grpo_clip_higher(aggregate=o.seq_mean_token_mean)),
    Variant("grpo_relaxed", o.grpo_relaxed()),
    Variant("minirl", o.minirl(), needs=OLD),
    Variant("minirl_tis", o.minirl_tis(), cap=3.0, needs=OLD),
    Variant("pg_is", o.pg_is(), measures=False),
    Variant("pg_tis", o.pg_tis(), cap=3.0, measures=False),
]
