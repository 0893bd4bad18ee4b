"""Exact divergences of two policies over the whole vocabulary, without an array of N x V.

Two passes over chunks of the vocabulary: the normaliser of each policy, then the sums, from the
logits computed anew. 8 N D V flops, forward only.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dppo_jax.kernels.head import checked_transform
from dppo_jax.kernels.sharded import Layout, on_mesh
from dppo_jax.kernels.xla import (
    chunk_at,
    chunk_columns,
    contract,
    logits_of,
    over_chunks,
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


def divergences(mu: Policy, pi: Policy, *, layout: Layout | None = None) -> Divergences:
    """Total variation and both KL divergences of two policies over the same vocabulary.

    With g = log μ - log π, each accurate where the policies nearly agree (no 1 - 1):
    μ - π = ± max(μ, π) (1 - e^{-|g|}), and Σ μ g = Σ (μ g - (μ - π)), whose terms are all >= 0.
    A probability of 0 adds 0 log 0 = 0; KL is +inf where its second policy alone has a 0.
    Equal policies give exactly 0. Nothing is differentiated: the outputs are constants.
    Widths D may differ; each policy's matrix product is in its own inputs' precision. `layout` as
    in `head`: of both policies, on the mesh that is set.

    Raises:
      ValueError: wrong ranks, sizes that disagree, no vocabulary, temperature or soft_cap not
        above 0, when tracing, with the shapes.
    """
    _check(mu, pi)
    arrays = lax.stop_gradient((*mu[:2], *pi[:2]))
    transforms = [checked_transform(p.temperature, p.soft_cap) for p in (mu, pi)]
    if layout is None:
        return _streamed(*arrays, transforms=transforms)
    for policy in (mu, pi):
        layout.check(len(policy.hidden), *policy.unembedding.shape)
    local = partial(_streamed, transforms=transforms, axis=layout.vocabulary)
    policies = (layout.rows, layout.matrix, layout.rows, layout.matrix)
    return on_mesh(local, policies, layout.rows)(*arrays)


def _streamed(
    hidden_mu, unembedding_mu, hidden_pi, unembedding_pi, *, transforms, axis: str | None = None
) -> Divergences:
    """`divergences`; where the vocabulary is split over the mesh axis `axis`, on one of its
    devices."""
    policies = ((hidden_mu, unembedding_mu), (hidden_pi, unembedding_pi))
    (tokens, _), (vocabulary, _) = hidden_mu.shape, unembedding_mu.shape
    dtype = jnp.promote_types(*(statistics_dtype(*policy) for policy in policies))
    columns = chunk_columns(2 * tokens, vocabulary, LEAST_COLUMNS)

    def logits(index) -> list[Array]:
        both = []
        for (hidden, unembedding), transform in zip(policies, transforms, strict=True):
            chunk = chunk_at(unembedding, index, columns)
            z = logits_of(contract(hidden, chunk.rows, 1, 1, dtype), transform)
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
    normalisers = over_chunks(normalise, [none, none], vocabulary, columns)
    if axis is not None:
        normalisers = [n.over(axis) for n in normalisers]
    sums = over_chunks(compare, Divergences(zero, zero, zero), vocabulary, columns)
    if axis is not None:
        sums = lax.psum(sums, axis)
    # rounding may leave a sum over nearly equal probabilities below 0
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

    def over(self, axis: str) -> "_Normaliser":
        """That of the whole vocabulary, from its parts on the devices along a mesh axis."""
        m = lax.pmax(self.m, axis)
        return _Normaliser(m, lax.psum(self.s * jnp.exp(self.m - m), axis))

    def log_probs(self, z: Float[Array, "N C"]) -> Float[Array, "N C"]:
        return z - self.m[:, None] - jnp.log(self.s)[:, None]


def _check(mu: Policy, pi: Policy) -> None:
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
