"""The one table of methods: what the library trains with, and where each comes from.

A new method is one row here, a file configs/algorithms/NAME.gin and a line of README's table; tests
hold the three together and run the contract suite over every row with its defaults.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dppo_jax import objectives as o
from dppo_jax.records import Objective


@dataclass(frozen=True)
class Method:
    """One row: `factory()` is the method with its paper's defaults."""

    factory: Callable[..., Objective]
    summary: str  # the mask or the loss, in one line
    source: str  # arXiv number and place, or repository
    topk: bool = False  # reads the K most likely tokens that the sampler recorded
    experimental: bool = False  # no official formula: what is assumed is in the docstring

    @property
    def name(self) -> str:
        """The factory's, which is also that of the gin file."""
        return self.factory.__name__

    @property
    def needs(self) -> list[str]:
        """What the run must provide: "topk" from the sampler, the rest as in `records.Need`."""
        return ["topk"] * self.topk + sorted(self.factory().needs)

    @property
    def defaults(self) -> dict[str, Any]:
        """Arguments by name; functions by their names."""
        return {
            parameter.name: _plain(parameter.default)
            for parameter in inspect.signature(self.factory).parameters.values()
            if parameter.default is not parameter.empty
        }

    def as_dict(self) -> dict[str, Any]:
        """The row as plain values, for JSON."""
        return {
            "name": self.name,
            "summary": self.summary,
            "source": self.source,
            "defaults": self.defaults,
            "needs": self.needs,
            "scope": self.factory().scope,
            "experimental": self.experimental,
        }


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value == float("inf"):
        return "inf"
    while hasattr(value, "func"):  # a partial
        return f"{value.func.__name__}({', '.join(map(str, value.args))})"
    return value.__name__ if callable(value) else value


METHODS: tuple[Method, ...] = (
    Method(o.dppo_binary_tv, "masks |μ - π| of the sampled token > δ", "2602.04879 eq. 13"),
    Method(o.dppo_binary_kl, "masks KL of {sampled, rest} > δ", "2602.04879 eq. 14"),
    Method(
        o.dppo_topk_tv, "masks TV over TopK(μ) ∪ {sampled}, rest > δ", "2602.04879 eq. 15", True
    ),
    Method(
        o.dppo_topk_kl, "masks KL over TopK(μ) ∪ {sampled}, rest > δ", "2602.04879 eq. 16", True
    ),
    Method(o.dppo_exact_tv, "masks TV over the whole vocabulary > δ", "2602.04879 eq. 12"),
    Method(o.dppo_exact_kl, "masks KL over the whole vocabulary > δ", "2602.04879 eq. 12"),
    Method(o.drpo, "penalty |A|·μ·(r - 1)² / 2δ, no mask", "2606.09821 eq. 8"),
    Method(o.mask_drpo, "DRPO's penalty only where DPPO-Binary-TV would mask", "2606.09821"),
    Method(o.spo, "penalty |A|·(r - 1)² / 2δ, no mask", "2606.09821"),
    Method(
        o.cppo,
        "masks TV by place in the sequence and by the prefix's budget",
        "2606.10968 eqs. 8, 10",
        True,
    ),
    Method(o.cppo_kl, "CPPO with Top-K KL", "2606.10968", True),
    Method(o.cppo_soft, "CPPO with a soft gate in place of the mask", "2606.10968", True),
    Method(o.trm_max, "drops sequences whose largest KL > δ", "2512.23075", True),
    Method(o.trm_avg, "drops sequences whose mean KL > δ", "2512.23075", True),
    Method(o.grpo, "masks r outside [1 - δ_low, 1 + δ_high]", "2402.03300"),
    Method(o.grpo_clip_higher, "GRPO with a wider upper bound", "2503.14476"),
    Method(o.grpo_relaxed, "GRPO-ClipHigher that never masks where μ < α", "2602.04879 sec. 6"),
    Method(
        o.mask_bad_updates, "masks A < 0 tokens with μ - π > 0.5, nothing else", "2602.04879 sec. 6"
    ),
    Method(o.minirl, "masks π/old outside the clip, weight π/μ", "2512.01374"),
    Method(o.minirl_tis, "MiniRL with weight min(π/μ, C)", "2602.04879 app. C"),
    Method(o.reinforce, "never masks, no weight: one step a batch", "2505.23585, verl@1dda039b"),
    Method(o.pg_is, "never masks, weight r", "2602.04879 app. C"),
    Method(o.pg_tis, "never masks, weight min(r, C)", "2602.04879 app. C"),
    Method(o.cispo, "never masks, weight clip(r, lowest, highest)", "2506.13585"),
    Method(o.ppo_clip, "PPO's clipped surrogate, dual clip optional", "1707.06347"),
    Method(o.dapo, "PPO's clip, wider above, every token alike", "2503.14476"),
    Method(o.dr_grpo, "PPO's clip, summed over a fixed horizon", "2503.20783"),
    Method(o.gspo, "clips the sequence's geometric mean ratio", "2507.18071"),
    Method(o.gspo_token, "GSPO for advantages that vary by token", "2507.18071"),
    Method(o.luspo, "GSPO summed over tokens", "TRL@f2cd57710"),
    Method(o.gmpo, "geometric mean of clipped token ratios", "2507.20673"),
    Method(o.sapo, "a sigmoid of r in place of the clip", "2511.20347"),
    Method(o.vespo, "weight w^k·e^{λ(1 - w)}, w = Π r", "2602.10693"),
    Method(o.cpgd, "clips log π around the anchor, no ratio", "2505.12504"),
    Method(o.dro, "A·log π less β/2·(log r)²", "2405.19107, verl@1dda039b"),
    Method(o.bapo, "PPO's clip, bounds searched for each batch", "2510.18927"),
    Method(o.clip_cov, "PPO's clip, random high-covariance tokens off", "2505.22617"),
    Method(o.kl_cov, "|log r| at tokens of highest covariance", "2505.22617"),
    Method(
        o.rebel, "regresses reward differences on log-ratio differences, pairs", "2404.16767 eq. 1"
    ),
    Method(o.rover, "regresses ρ·log π/old on A + the uniform policy's next Q", "2509.24981"),
    Method(o.r2vpo, "penalty λ·(r - 1)², λ by dual ascent", "2601.03320", experimental=True),
    Method(o.minpro, "weight r_t·min of the ratios before", "2601.22718", experimental=True),
    Method(
        o.capo,
        "drops tokens whose own step bodes ill, by last-layer curvature",
        "2510.00819",
        experimental=True,
    ),
    Method(o.grpo_tis, "GRPO at old, tokens weigh min(old/μ, 2)", "verl@1dda039b"),
    Method(o.grpo_mis, "GRPO at old, sequences with Π old/μ > 3 off", "TRL@f2cd57710"),
    Method(o.grpo_icepop, "GRPO at old, tokens with old/μ outside 0.5, 5 off", "NeMo-RL"),
    Method(o.grpo_opsm, "GRPO, A < 0 sequences that drifted off", "DeepSeek-V3.2"),
    Method(o.ppo_critic, "PPO's clip with a critic, values clipped", "1707.06347 eqs. 7, 9"),
    Method(o.dvpo, "PPO's clip with a critic of quantiles", "2512.03847", experimental=True),
)
