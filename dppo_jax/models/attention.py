"""Causal attention in XLA operations, with a prefix that the samples of a prompt share.

Axes inside: p rows, h key heads, g samples, r queries a key head, s queries, t keys, d head size.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

EVERYTHING = 2**30  # the window of a layer that has none, where one is wanted
NEGATIVE = -1e30  # finite, so that a row with nothing to attend to stays finite


class Keys(NamedTuple):
    """Keys and values that queries attend to; without the axis g all samples share them."""

    k: Float[Array, "*phg t d"]
    v: Float[Array, "*phg t d"]
    bias: Float[Array, "p 1 #g 1 #s t"]  # 0, or NEGATIVE where a key is not to be seen

    @property
    def axes(self) -> str:
        return "phgtd" if self.k.ndim == 5 else "phtd"


def _product(form: str, left: Array, right: Array) -> Float[Array, "..."]:
    return jnp.einsum(form, left, right, preferred_element_type=jnp.float32)


def soft_capped(z: Array, cap: float | None) -> Array:
    """cap·tanh(z / cap), or z where there is no cap (Gemma 2, arXiv 2408.00118, section 2)."""
    return z if cap is None else cap * jnp.tanh(z / cap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def attend(
    q: Float[Array, "p h g r s d"], keys: Sequence[Keys], soft_cap: float | None = None
) -> Float[Array, "p h g r s d"]:
    """softmax(soft_capped(q·k) + bias)·v over all of `keys` together; scores in float32.

    Weights W = E / Σ E, E = exp(score - the highest), are never made: the sum divides O and dO.
    Backward: dS = W·(dW - Σ_d dO·O), the rowwise sum over d instead of over the keys (Dao et al.,
    arXiv 2205.14135, section B.2); under a cap times 1 - tanh², the scores recomputed.
    """
    return _forward(q, keys, soft_cap)[0]


def _scores(q: Array, part: Keys) -> Array:
    return _product(f"phgrsd,{part.axes}->phgrst", q, part.k)


def _forward(q, keys, soft_cap):
    scores = [soft_capped(_scores(q, part), soft_cap) + part.bias for part in keys]
    highest = functools.reduce(jnp.maximum, [z.max(axis=-1, keepdims=True) for z in scores])
    each = [jnp.exp(z - highest) for z in scores]
    total = sum(jnp.sum(e, axis=-1, keepdims=True) for e in each)
    each = [e.astype(q.dtype) for e in each]
    out = jnp.zeros(q.shape, jnp.float32)
    for e, part in zip(each, keys, strict=True):
        out += _product(f"phgrst,{part.axes}->phgrsd", e, part.v)
    out = (out / total).astype(q.dtype)
    return out, (q, keys, each, total, out)


def _backward(soft_cap, saved, d_out):
    q, keys, each, total, out = saved
    d_out = d_out.astype(jnp.float32) / total
    # Summed without the axis r, which is often 1: XLA's CPU backend is slow with such axes here.
    row = jnp.sum((d_out * out).reshape(*out.shape[:3], -1, out.shape[-1]), axis=-1)
    row = row.reshape(*out.shape[:-1], 1)
    d_out = d_out.astype(q.dtype)
    d_q = jnp.zeros(q.shape, jnp.float32)
    d_keys = []
    for e, part in zip(each, keys, strict=True):
        d_e = _product(f"phgrsd,{part.axes}->phgrst", d_out, part.v)
        d_s = e * (d_e - row)
        if soft_cap is not None:
            d_s *= 1.0 - jnp.tanh(_scores(q, part) / soft_cap) ** 2
        d_s = d_s.astype(q.dtype)
        d_q += _product(f"phgrst,{part.axes}->phgrsd", d_s, part.k)
        d_k = _product(f"phgrst,phgrsd->{part.axes}", d_s, q)
        d_v = _product(f"phgrst,phgrsd->{part.axes}", e, d_out)
        nothing = jnp.zeros_like(part.bias)
        d_keys.append(Keys(d_k.astype(part.k.dtype), d_v.astype(part.v.dtype), nothing))
    return d_q.astype(q.dtype), type(keys)(d_keys)


attend.defvjp(_forward, _backward)


def bias_of(seen: Bool[Array, "..."]) -> Float[Array, "..."]:
    """What to add to the scores so that only seen keys count."""
    return jnp.where(seen, 0.0, NEGATIVE)


def _distance(queries: int, keys: int) -> Int[Array, "queries keys"]:
    """How many columns each query's is behind each key's."""
    return jnp.arange(queries)[:, None] - jnp.arange(keys)[None, :]


class Prefix(NamedTuple):
    """Keys and values that each of a row's G sequences attends wholly."""

    k: Float[Array, "P L Hkv d"]
    v: Float[Array, "P L Hkv d"]
    mask: Bool[Array, "P L"]


def attention(
    q: Float[Array, "P G S H d"],
    k: Float[Array, "P G S Hkv d"],
    v: Float[Array, "P G S Hkv d"],
    key_mask: Bool[Array, "P G S"],
    prefix: Prefix | None = None,
    segments: Int[Array, "P G S"] | None = None,
    *,
    scale: float,
    soft_cap: float | None = None,
    window: int | Int[Array, ""] | None = None,
) -> Float[Array, "P G S Hd"]:
    """softmax(q·k·scale)·v over the sequence so far, after the prefix that its group shares.

    Keys that a mask leaves out are attended by nobody, those of another of the `segments` by none
    but their own; with a `window` a query sees that many
    columns, its own the last. The first half of the queries meets the first half of the keys only:
    a quarter of the square that causality forbids is never computed.
    """
    rows, samples, length, heads, size = q.shape
    groups = k.shape[3]
    q = (q * scale).reshape(rows, samples, length, groups, heads // groups, size)
    q = q.transpose(0, 3, 1, 4, 2, 5)
    k, v = (t.transpose(0, 3, 1, 2, 4) for t in (k, v))
    allowed = jnp.tril(jnp.ones((length, length), bool)) & key_mask[:, :, None, :]
    if segments is not None:
        allowed &= segments[..., :, None] == segments[..., None, :]
    if window is not None:
        allowed &= _distance(length, length) < window
    bias = bias_of(allowed)[:, None, :, None]
    before = []
    if prefix is not None:
        seen = prefix.mask[:, None, None, None, None]
        if window is not None:  # the prefix's last column is the one before query 0
            columns = prefix.mask.shape[1]
            seen &= _distance(length, columns) + columns < window
        shared_k, shared_v = (t.transpose(0, 2, 1, 3) for t in (prefix.k, prefix.v))
        before = [Keys(shared_k, shared_v, bias_of(seen))]

    def part(start: int, stop: int):
        own = Keys(k[..., :stop, :], v[..., :stop, :], bias[..., start:stop, :stop])
        if window is not None:
            shared = [keys._replace(bias=keys.bias[..., start:stop, :]) for keys in before]
        else:
            shared = before
        return attend(q[..., start:stop, :], [*shared, own], soft_cap)

    half = length // 2
    halves = [(0, half), (half, length)] if half else [(0, length)]
    out = jnp.concatenate([part(*span) for span in halves], axis=4)
    return out.transpose(0, 2, 4, 1, 3, 5).reshape(rows, samples, length, -1)
