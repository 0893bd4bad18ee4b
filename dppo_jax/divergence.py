"""Per-token divergences D(anchor || current) from log-probabilities; never differentiated.

Every function takes natural log-probabilities of any leading shape, computes in float32 under
``stop_gradient`` and returns one value >= 0 a token, in nats for KL. ``anchor`` is the policy that
the trust region is drawn around (the rollout policy mu in the paper), ``logp`` the current one.
Values are finite for log-probabilities down to -1e4 and for anchors at -inf (a filtered token);
KL is +inf, its true value, only where the current policy is at -inf and the anchor is not.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LOGP_CEILING = -1e-7  # float32 resolves 1 - p no finer; keeps log(1 - p) finite when p rounds to 1
SLOT_RESIDUAL_FLOOR = 1e-12  # Stable-RL's floor of the mass outside the stored slots


def log1mexp(logp: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """log(1 - eˣ), accurate at both ends; x is clipped at -1e-7, so the result is >= -16.2."""
    clipped = jnp.minimum(logp, LOGP_CEILING)
    return jnp.where(
        clipped > -0.6931472, jnp.log(-jnp.expm1(clipped)), jnp.log1p(-jnp.exp(clipped))
    )


def binary_tv(logp_anchor: Float[Array, "*N"], logp: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Total variation of the two-outcome policies {sampled token, rest}.

    |μ(a) - π(a)|. DPPO (arXiv 2602.04879) eq. 13. In [0, 1].
    """
    return jnp.abs(_difference(*_constants(logp_anchor, logp)))


def binary_kl(logp_anchor: Float[Array, "*N"], logp: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """KL(μ || π) of the two-outcome policies {sampled token, rest}, in nats.

    μ log(μ/π) + (1-μ) log((1-μ)/(1-π)). DPPO (arXiv 2602.04879) eq. 14.
    Differs from the paper: 1 - p is at least 1e-7, so a certain token costs at most 16 nats.
    """
    anchor, current = _constants(logp_anchor, logp)
    rest = _kl_term(log1mexp(anchor), log1mexp(current))
    return jnp.maximum(_kl_term(anchor, current) + rest, 0.0)


def topk_tv(
    logp_anchor: Float[Array, "*N"],
    logp: Float[Array, "*N"],
    tokens: Int[Array, "*N"],
    topk_ids: Int[Array, "*N K"],
    topk_logp_anchor: Float[Array, "*N K"],
    topk_logp: Float[Array, "*N K"],
) -> Float[Array, "*N"]:
    """Total variation over TopK(μ) ∪ {sampled} and one bucket for every other token.

    ½ Σ_{A''} |μ - π|. DPPO (arXiv 2602.04879) eq. 15. In [0, 1]; K = 0 gives the binary form.
    """
    anchor, current = _constants(
        _union(logp_anchor, tokens, topk_ids, topk_logp_anchor),
        _union(logp, tokens, topk_ids, topk_logp),
    )
    difference = _difference(anchor, current)
    # both policies sum to one, so the buckets' differences sum to minus that of the rest
    return 0.5 * (jnp.abs(difference).sum(-1) + jnp.abs(difference.sum(-1)))


def topk_kl(
    logp_anchor: Float[Array, "*N"],
    logp: Float[Array, "*N"],
    tokens: Int[Array, "*N"],
    topk_ids: Int[Array, "*N K"],
    topk_logp_anchor: Float[Array, "*N K"],
    topk_logp: Float[Array, "*N K"],
) -> Float[Array, "*N"]:
    """KL(μ || π) over TopK(μ) ∪ {sampled} and one bucket for every other token, in nats.

    Σ_{A''} μ log(μ/π). DPPO (arXiv 2602.04879) eq. 16. K = 0 gives the binary form.
    Differs from the paper: the rest holds at least 1e-7 of either policy.
    """
    anchor, current = _constants(
        _union(logp_anchor, tokens, topk_ids, topk_logp_anchor),
        _union(logp, tokens, topk_ids, topk_logp),
    )
    rest = _kl_term(_log_rest(anchor), _log_rest(current))
    return jnp.maximum(_kl_term(anchor, current).sum(-1) + rest, 0.0)


def topk_slots_tv(
    topk_logp_anchor: Float[Array, "*N K"], topk_logp: Float[Array, "*N K"]
) -> Float[Array, "*N"]:
    """Total variation over the given K slots and the rest.

    ½ (Σ_k |μ_k - π_k| + |μ_rest - π_rest|), p_rest = max(1 - Σ_k p_k, 1e-12).
    sail-sg/Stable-RL@c6af1d11 verl/workers/actor/utils.py compute_topk_kl.
    Differs from the paper: a sampled token outside the slots is part of the rest.
    """
    anchor, current = _constants(topk_logp_anchor, topk_logp)
    rest = jnp.abs(_slot_residual(anchor) - _slot_residual(current))
    return 0.5 * (jnp.abs(_difference(anchor, current)).sum(-1) + rest)


def topk_slots_kl(
    topk_logp_anchor: Float[Array, "*N K"], topk_logp: Float[Array, "*N K"]
) -> Float[Array, "*N"]:
    """KL(μ || π) over the given K slots and the rest, in nats.

    Σ_k μ_k log(μ_k/π_k) + μ_rest log(μ_rest/π_rest), p_rest = max(1 - Σ_k p_k, 1e-12).
    sail-sg/Stable-RL@c6af1d11 verl/workers/actor/utils.py compute_topk_kl, clamped at 0 here.
    Differs from the paper: a sampled token outside the slots is part of the rest.
    """
    anchor, current = _constants(topk_logp_anchor, topk_logp)
    rest = _kl_term(jnp.log(_slot_residual(anchor)), jnp.log(_slot_residual(current)))
    return jnp.maximum(_kl_term(anchor, current).sum(-1) + rest, 0.0)


def exact_tv(
    log_probs_anchor: Float[Array, "*N V"], log_probs: Float[Array, "*N V"]
) -> Float[Array, "*N"]:
    """Total variation ½ Σ_v |μ_v - π_v| from whole log-probability vectors. In [0, 1]."""
    return 0.5 * jnp.abs(_difference(*_constants(log_probs_anchor, log_probs))).sum(-1)


def exact_kl(
    log_probs_anchor: Float[Array, "*N V"], log_probs: Float[Array, "*N V"]
) -> Float[Array, "*N"]:
    """KL(μ || π) = Σ_v μ_v log(μ_v/π_v) from whole log-probability vectors, in nats."""
    return jnp.maximum(_kl_term(*_constants(log_probs_anchor, log_probs)).sum(-1), 0.0)


def _constants(
    logp_anchor: Float[Array, "*N"], logp: Float[Array, "*N"]
) -> tuple[Float[Array, "*N"], Float[Array, "*N"]]:
    anchor, current = jax.lax.stop_gradient((logp_anchor, logp))
    return anchor.astype(jnp.float32), current.astype(jnp.float32)


def _difference(logp_anchor: Float[Array, "*N"], logp: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """μ - π without cancellation: the larger of the two times 1 - e^{-|log μ - log π|}."""
    both_zero = (logp_anchor == -jnp.inf) & (logp == -jnp.inf)
    gap = jnp.where(both_zero, 0.0, logp_anchor) - jnp.where(both_zero, 0.0, logp)
    larger = jnp.exp(jnp.maximum(logp_anchor, logp))
    return jnp.sign(gap) * larger * -jnp.expm1(-jnp.abs(gap))


def _kl_term(logp_anchor: Float[Array, "*N"], logp: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """μ log(μ/π), which is 0 where μ is 0 whatever π is."""
    probability = jnp.exp(logp_anchor)
    possible = probability > 0
    gap = jnp.where(possible, logp_anchor, 0.0) - jnp.where(possible, logp, 0.0)
    return probability * gap


def _union(
    logp: Float[Array, "*N"],
    tokens: Int[Array, "*N"],
    topk_ids: Int[Array, "*N K"],
    topk_logp: Float[Array, "*N K"],
) -> Float[Array, "*N K+1"]:
    """The buckets of TopK ∪ {sampled}: the sampled token first, slots that repeat it emptied."""
    repeats: Bool[Array, "*N K"] = topk_ids == tokens[..., None]
    slots = jnp.where(repeats, -jnp.inf, topk_logp)
    return jnp.concatenate([logp[..., None], slots], axis=-1)


def _log_rest(log_buckets: Float[Array, "*N J"]) -> Float[Array, "*N"]:
    """log(1 - Σ p), with as many digits as the complement of the largest bucket has."""
    largest = jnp.argmax(log_buckets, axis=-1, keepdims=True)
    is_largest = jnp.arange(log_buckets.shape[-1]) == largest
    others = jnp.where(is_largest, 0.0, jnp.exp(log_buckets)).sum(-1)
    complement = -jnp.expm1(log_buckets.max(-1))
    return jnp.log(jnp.maximum(complement - others, -LOGP_CEILING))


def _slot_residual(topk_logp: Float[Array, "*N K"]) -> Float[Array, "*N"]:
    return jnp.maximum(1.0 - jnp.exp(topk_logp).sum(-1), SLOT_RESIDUAL_FLOOR)
