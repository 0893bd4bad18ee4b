"""What the contract suite runs over: every row of the table of methods, and options of some.

A method with its defaults needs nothing here: a row in dppo_jax/objectives/methods.py is enough.
`EXEMPT` says where theory asks for something else, and why.
"""

from dataclasses import dataclass
from functools import partial

from dppo_jax import objectives as o
from dppo_jax.objectives.methods import METHODS
from dppo_jax.records import Objective


@dataclass(frozen=True)
class Variant:
    """An objective under a name that says which."""

    name: str
    objective: Objective

    @property
    def method(self) -> str:
        """The row that it belongs to."""
        return self.name.split()[0]


HORIZON = partial(o.seq_mean_token_sum_norm, horizon=64)
NARROW = partial(o.quantile_budget, floor=0.005)

OPTIONS = [
    Variant("dppo_topk_tv slots", o.dppo(o.topk_slots_tv_measure, 0.15)),
    Variant("dppo_topk_kl slots", o.dppo(o.topk_slots_kl_measure, 0.05)),
    Variant("dppo_binary_tv asymmetric", o.dppo_binary_tv(delta_low=0.05, delta_high=0.3)),
    Variant("dppo_binary_tv differentiable", o.dppo_binary_tv(form=o.ratio_surrogate)),
    Variant("dppo_topk_kl recomputed", o.dppo_topk_kl(anchor=o.old_anchor)),
    Variant("dppo_exact_tv recomputed", o.dppo_exact_tv(anchor=o.old_anchor)),
    Variant("dppo_binary_kl seq mean", o.dppo_binary_kl(aggregate=o.seq_mean_token_mean)),
    Variant("dppo_binary_tv horizon", o.dppo_binary_tv(aggregate=HORIZON)),
    Variant("grpo recomputed", o.grpo(anchor=o.old_anchor)),
    Variant("drpo tight", o.drpo(0.15)),
    Variant("cppo binary", o.cppo(o.binary_tv_measure, 0.1, budget=NARROW)),
    Variant("cppo differentiable", o.cppo(form=o.ratio_surrogate, budget=o.fixed_budget)),
    Variant("trm_max wide", o.trm_max(delta=0.6)),
    Variant("trm_avg wide", o.trm_avg(delta=0.2)),
    Variant("ppo_clip dual", o.ppo_clip(dual_clip=3.0)),
    Variant("cpgd drift", o.cpgd(drift=0.1)),
    Variant("grpo_tis sequence", o.corrected(o.dapo(anchor=o.old_anchor), o.sequence_tis())),
    Variant(
        "grpo_mis geometric", o.corrected(o.gspo(anchor=o.old_anchor), o.geometric_mask(0.8, 1.25))
    ),
    Variant("grpo_opsm token", o.corrected(o.drpo(), o.opsm_token())),
    Variant("rebel weighted", o.corrected(o.rebel(anchor=o.old_anchor), o.sequence_tis())),
    Variant(
        "grpo_icepop product",
        o.corrected(
            o.dppo_binary_tv(), o.product(o.icepop(policy=o.current_policy), o.product_mask())
        ),
    ),
]
VARIANTS = [Variant(method.name, method.factory()) for method in METHODS] + OPTIONS

# Score-function losses, -A · min(r, C) · M · log π: their caps, where they have one.
SCORES = {
    "dppo_binary_tv": None, "dppo_binary_kl": None, "dppo_topk_tv": None, "dppo_topk_kl": None,
    "dppo_topk_tv slots": None, "dppo_topk_kl slots": None, "dppo_binary_tv asymmetric": None,
    "dppo_topk_kl recomputed": None, "dppo_binary_kl seq mean": None, "cppo": None,
    "dppo_binary_tv horizon": None, "grpo": None, "grpo recomputed": None, "cppo_kl": None,
    "grpo_clip_higher": None, "grpo_relaxed": None, "minirl": None, "minirl_tis": 3.0,
    "dppo_exact_tv": None, "dppo_exact_kl": None, "capo": None, "dppo_exact_tv recomputed": None,
    "mask_bad_updates": None, "pg_is": None, "pg_tis": 3.0, "trm_max": None, "trm_avg": None,
}  # fmt: skip

# Others, and options, that weigh log π by something that is constant for the gradient.
WEIGHTED = {
    "reinforce", "cispo", "minpro", "vespo", "cppo_soft",
    "cppo binary", "trm_max wide", "trm_avg wide", "grpo_icepop product",
}  # fmt: skip

EXEMPT = {
    "on policy it is REINFORCE": {
        "clip_cov": "drops random tokens whatever the policy is",
        "capo": "drops by curvature, on policy too",
        "rover": "regresses on the advantage: twice as much, and on the next state",
        "rebel": "regresses on the difference of advantages",
        "rebel weighted": "regresses on the difference of advantages",
    },
    "moving back is kept": {
        "trm_max": "drops whole sequences whatever their direction",
        "trm_avg": "drops whole sequences whatever their direction",
        "trm_max wide": "drops whole sequences whatever their direction",
        "trm_avg wide": "drops whole sequences whatever their direction",
        "vespo": "its weight closes on both sides",
        "rover": "regresses on a target on both sides",
        "rebel": "regresses on a target on both sides",
        "rebel weighted": "regresses on a target on both sides",
        "bapo": "dual clip",
        "ppo_clip dual": "dual clip",
        "clip_cov": "drops random tokens whatever their direction",
        "capo": "drops by curvature, whatever their direction",
        "grpo_mis": "drops what is too far from the sampler's policy, on both sides",
        "grpo_mis geometric": "drops what is too far from the sampler's policy, on both sides",
        "grpo_icepop": "drops what is too far from the sampler's policy, on both sides",
        "grpo_icepop product": "drops what is too far from the sampler's policy, on both sides",
    },
    "no advantage, no gradient": {
        "dro": "its square pulls towards the anchor",
        "r2vpo": "its penalty pulls towards the anchor",
        "rover": "regresses on the target that is left, which is the next state's",
        "rebel": "regresses on the target that is left, which is no difference",
        "rebel weighted": "regresses on the target that is left, which is no difference",
        "kl_cov": "its penalty pulls towards the anchor",
        "cpgd drift": "its drift pulls towards the anchor",
    },
    "something is kept": {
        "trm_max": "all sequences of the batch are too far off",
        "trm_avg": "all sequences of the batch are too far off",
    },
    "what is dropped is silent": {
        "cpgd drift": "its drift is of all tokens, clipped ones too",
        "rebel": "drops nothing, but what has no partner is silent",
        "rebel weighted": "drops nothing, but what has no partner is silent",
    },
}
