"""Exact divergences of two policies over the whole vocabulary, without an array of N x V.

Two passes over chunks of the vocabulary: the normaliser of each policy, then the sums, from the
logits computed anew. 8 N D V flops, forward only.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dppo_jax.kernels.xla import (
    Transform,
    _chunk,
    _over_chunks,
    chunk_columns,
    contract,
    logits_of,
    statistics_dtype,
)

# A chunk of C columns reads the hidden states once: C flops a byte in bfloat16, above the ridge of
# every accelerator we know (KERNELS: 166 to 560). Nothing else asks for more: no gradient is kept.
LEAST_COLUMNS = 1024


class Policy(NamedTuple):
    """softmax(z) at N tokens, z = soft_cap * tanh(x.w / soft_cap) / temperature."""

    hidden: Float[Array, "N D"]  # bfloat16 or float32
    unembedding: Float[Array, "V D"]
    temperature: float = 1.0  # known when tracing, as is the soft-cap
    soft_cap: float | None = None


class Divergences(NamedTuple):
    """Between two policies at each token; float32 (float64 from float64), >= 0, constants."""

    tv: Float[Array, " N"]  # ½ Σ_v |μ_v - π_v|, at most 1
    kl: Float[Array, " N"]  # KL(μ || π) = Σ_v μ_v log(μ_v/π_v), nats
    reverse_kl: Float[Array, " N"]  # KL(π || μ), nats


def divergences(mu: Policy, pi: Policy) -> Divergences:
    """Total variation and both KL divergences of two policies over the same vocabulary.

    With g = log μ - log π, each accurate where the policies nearly agree (no 1 - 1):
    μ - π = ± max(μ, π) (1 - e^{-|g|}), and Σ μ g = Σ (μ g - (μ - π)), whose terms are all >= 0.
    A probability of 0 adds 0 log 0 = 0; KL is +inf where its second policy alone has a 0.
    Equal policies give exactly 0. Nothing is differentiated: the outputs are constants.
    Widths D may differ; each policy's matrix product is in its own inputs' precision.

    Raises:
      ValueError: wrong ranks, sizes that disagree, no vocabulary, temperature or soft_cap not
        above 0, when tracing, with the shapes.
    """
    tokens, vocabulary = _check(mu, pi)
    mu, pi = (
        policy._replace(
            hidden=jax.lax.stop_gradient(policy.hidden),
            unembedding=jax.lax.stop_gradient(policy.unembedding),
        )
        for policy in (mu, pi)
    )
    transforms = [_transform(p) for p in (mu, pi)]
    dtype = jnp.promote_types(statistics_dtype(*mu[:2]), statistics_dtype(*pi[:2]))
    columns = chunk_columns(2 * tokens, vocabulary, LEAST_COLUMNS)

    def logits(index) -> list[Array]:
        both = []
        for policy, transform in zip((mu, pi), transforms, strict=True):
            chunk = _chunk(policy.unembedding, index, columns)
            z = logits_of(contract(policy.hidden, chunk.rows, 1, 1, dtype), transform)
            both.append(z if chunk.fresh is None else jnp.where(chunk.fresh, z, -jnp.inf))
        return both

    def normalise(index, state: list[_Normaliser]) -> list[_Normaliser]:
        return [seen.with_logits(z) for seen, z in zip(state, logits(index), strict=True)]

    def compare(index, sums: Divergences) -> Divergences:
        log_p, log_q = (n.log_probs(z) for n, z in zip(normalisers, logits(index), strict=True))
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        gap = jnp.where(log_p == log_q, 0.0, log_p - log_q)  # -inf - -inf is no number
        difference = jnp.sign(gap) * jnp.maximum(p, q) * -jnp.expm1(-jnp.abs(gap))
        return Divergences(
            sums.tv + 0.5 * jnp.abs(difference).sum(axis=1),
            sums.kl + (jnp.where(p > 0, p * gap, 0.0) - difference).sum(axis=1),
            sums.reverse_kl + (jnp.where(q > 0, q * -gap, 0.0) + difference).sum(axis=1),
        )

    zero = jnp.zeros((tokens,), dtype)
    none = _Normaliser(zero + jnp.finfo(dtype).min, zero)
    normalisers = _over_chunks(normalise, [none, none], vocabulary, columns)
    sums = _over_chunks(compare, Divergences(zero, zero, zero), vocabulary, columns)
    # rounding may leave a term of nearly equal probabilities below 0
    return Divergences(
        jnp.minimum(sums.tv, 1.0), jnp.maximum(sums.kl, 0.0), jnp.maximum(sums.reverse_kl, 0.0)
    )


class _Normaliser(NamedTuple):
    """Running m = max z and s = Σ e^(z-m). Kept apart to the end: m + log s would round away the
    digits of log s, and with them those of a small divergence, where |z| is large."""

    m: Float[Array, " N"]
    s: Float[Array, " N"]

    def with_logits(self, z: Float[Array, "N C"]) -> "_Normaliser":
        m = jnp.maximum(self.m, z.max(axis=1))
        s = jnp.exp(self.m - m) * self.s + jnp.exp(z - m[:, None]).sum(axis=1)
        return _Normaliser(m, s)

    def log_probs(self, z: Float[Array, "N C"]) -> Float[Array, "N C"]:
        return z - self.m[:, None] - jnp.log(self.s)[:, None]


def _transform(policy: Policy) -> Transform:
    for name, value in (("temperature", policy.temperature), ("soft_cap", policy.soft_cap)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a finite number above 0; got {value}")
    return Transform(policy.temperature, policy.soft_cap)


def _check(mu: Policy, pi: Policy) -> tuple[int, int]:
    shapes = ", ".join(
        f"{name}.hidden {p.hidden.shape}, {name}.unembedding {p.unembedding.shape}"
        for name, p in (("mu", mu), ("pi", pi))
    )
    if any(array.ndim != 2 for p in (mu, pi) for array in p[:2]):
        raise ValueError(f"divergences wants hidden [N,D] and unembedding [V,D]; got {shapes}")
    if any(p.hidden.shape[1] != p.unembedding.shape[1] for p in (mu, pi)):
        raise ValueError(f"divergences: a policy's widths D differ: {shapes}")
    if mu.hidden.shape[0] != pi.hidden.shape[0]:
        raise ValueError(f"divergences: the policies' token counts N differ: {shapes}")
    if mu.unembedding.shape[0] != pi.unembedding.shape[0] or not mu.unembedding.shape[0]:
        raise ValueError(f"divergences wants one vocabulary V of at least 1: {shapes}")
    return mu.hidden.shape[0], mu.unembedding.shape[0]
