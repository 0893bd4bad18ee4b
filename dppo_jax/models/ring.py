"""Attention over a mesh axis that splits columns: prompts are gathered, responses go around a ring.

Each device keeps the queries of its columns. A prompt's keys and values are gathered, since all of
its responses attend to them; those of the responses, and of packed rows, visit device after device,
and what a query has seen so far is its running maximum, sum and output (Liu et al., arXiv
2310.01889, section 3, with the softmax of Dao et al., arXiv 2205.14135). The backward pass goes
around once more, with the gradients of keys and values travelling beside them, and makes the scores
again: none is kept.

The steps are a loop, compiled once however many devices there are. What is passed on depends on no
product of its step, so that it travels meanwhile; the last time it brings keys home in vain.

Differs from the paper: columns are split in order, so that of causal attention the device with the
last ones computes the most, and steps that see only the future are computed and masked.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dppo_jax.models.attention import EVERYTHING, Keys, attend, bias_of, soft_capped
from dppo_jax.sharding import constrain, mesh_here, spec_of

AXIS = "sequence"
LARGEST = 2**26  # scores held at once; a device's queries are taken in as many blocks as that needs


class Seen(NamedTuple):
    """What queries have attended to so far, unnormalised: softmax output = out / total."""

    highest: Float[Array, "p h g r s 1"]  # of the scores
    total: Float[Array, "p h g r s 1"]  # Σ e^(score - highest)
    out: Float[Array, "p h g r s d"]  # Σ e^(score - highest) · v


def _nothing_seen(q: Array) -> Seen:
    zero = jnp.zeros((*q.shape[:-1], 1), jnp.float32)
    return Seen(zero - jnp.inf, zero, jnp.zeros(q.shape, jnp.float32))


def _product(form: str, left: Array, right: Array) -> Array:
    return jnp.einsum(form, left, right, preferred_element_type=jnp.float32)


def _blocks(q: Array, keys: Keys) -> int:
    """Into how many blocks the queries are cut, so that their scores stay below LARGEST."""
    blocks, queries = 1, q.shape[4]
    scores = q.size // q.shape[5] * keys.k.shape[-2]
    while scores > blocks * LARGEST and queries % (2 * blocks) == 0:
        blocks *= 2
    return blocks


def _cut(x: Array, blocks: int) -> Array:
    """Blocks of queries, axis 4, lead."""
    x = x.reshape(*x.shape[:4], blocks, x.shape[4] // blocks, x.shape[5])
    return jnp.moveaxis(x, 4, 0)


def _joined(x: Array) -> Array:
    """The inverse of `_cut`."""
    x = jnp.moveaxis(x, 0, 4)
    return x.reshape(*x.shape[:4], -1, x.shape[6])


def _look(q: Array, keys: Keys, soft_cap: float | None, before: Seen | None) -> Seen:
    """`before` and these keys."""
    blocks = _blocks(q, keys)
    if blocks == 1:
        return _look_block(q, keys, soft_cap, before)
    parts = jax.tree.map(lambda x: _cut(x, blocks), (q, keys.bias, before))
    seen = lax.map(lambda of: _look_block(of[0], keys._replace(bias=of[1]), soft_cap, of[2]), parts)
    return jax.tree.map(_joined, seen)


def _look_block(q: Array, keys: Keys, soft_cap: float | None, before: Seen | None) -> Seen:
    scores = _product(f"phgrsd,{keys.axes}->phgrst", q, keys.k)
    scores = soft_capped(scores, soft_cap) + keys.bias
    highest = jnp.max(scores, axis=-1, keepdims=True)
    if before is not None:
        highest = jnp.maximum(highest, before.highest)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = _product(f"phgrst,{keys.axes}->phgrsd", weights.astype(q.dtype), keys.v)
    if before is None:
        return Seen(highest, total, out)
    faded = jnp.exp(before.highest - highest)
    return Seen(highest, total + faded * before.total, out + faded * before.out)


def _gradients(q, keys: Keys, soft_cap, d_out, lse, row) -> tuple[Array, Array, Array]:
    """Of q, k and v through these keys, float32; weights recomputed as e^(score - lse)."""
    blocks = _blocks(q, keys)
    if blocks == 1:
        return _gradients_block(q, keys, soft_cap, d_out, lse, row)

    def add(sums, part):
        q, bias, *rest = part
        of_q, *more = _gradients_block(q, keys._replace(bias=bias), soft_cap, *rest)
        return jax.tree.map(jnp.add, sums, tuple(more)), of_q

    zeros = jnp.zeros(keys.k.shape, jnp.float32), jnp.zeros(keys.v.shape, jnp.float32)
    parts = jax.tree.map(lambda x: _cut(x, blocks), (q, keys.bias, d_out, lse, row))
    (of_k, of_v), of_q = lax.scan(add, zeros, parts)
    return _joined(of_q), of_k, of_v


def _gradients_block(q, keys: Keys, soft_cap, d_out, lse, row) -> tuple[Array, Array, Array]:
    raw = _product(f"phgrsd,{keys.axes}->phgrst", q, keys.k)
    weights = jnp.exp(soft_capped(raw, soft_cap) + keys.bias - lse)
    d_scores = weights * (_product(f"phgrsd,{keys.axes}->phgrst", d_out, keys.v) - row)
    if soft_cap is not None:
        d_scores *= 1.0 - jnp.tanh(raw / soft_cap) ** 2
    weights, d_scores = weights.astype(q.dtype), d_scores.astype(q.dtype)
    return (
        _product(f"phgrst,{keys.axes}->phgrsd", d_scores, keys.k),
        _product(f"phgrst,phgrsd->{keys.axes}", d_scores, q),
        _product(f"phgrst,phgrsd->{keys.axes}", weights, d_out),
    )


def _passed_on(arrays):
    """To the next device of the ring, from the one before."""
    devices = lax.axis_size(AXIS)
    ring = [(i, (i + 1) % devices) for i in range(devices)]
    return jax.tree.map(lambda x: lax.ppermute(x, AXIS, ring), arrays)


def _bias(
    segments: Int[Array, "p g T"], step: Int[Array, ""], length: int, window: Int[Array, ""]
) -> Float[Array, "p 1 g 1 s s"]:
    """Of this device's queries against the keys that have come to it after `step` steps."""
    here = lax.axis_index(AXIS)
    source = (here - step) % lax.axis_size(AXIS)
    columns = jnp.arange(length)
    distance = here * length + columns[:, None] - (source * length + columns[None, :])
    ours, theirs = (
        lax.dynamic_slice_in_dim(segments, device * length, length, axis=2)
        for device in (here, source)
    )
    seen = (distance >= 0) & (distance < window) & (ours[..., :, None] == theirs[..., None, :])
    return bias_of(seen)[:, None, :, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def ring_attention(
    q: Float[Array, "p h g r s d"],
    k: Float[Array, "p h g s d"],
    v: Float[Array, "p h g s d"],
    prefix: Keys | None,
    segments: Int[Array, "p g T"],
    window: Int[Array, ""],
    soft_cap: float | None,
) -> Float[Array, "p h g r s d"]:
    """softmax(soft_capped(q·k) + bias)·v of this device's columns, inside `jax.shard_map`.

    Over the `prefix`, which is whole here, and causally over those of all T columns that are of the
    same segment, of which each device along `sequence` has s; `window` as in `attention`.
    """
    return _ring_forward(q, k, v, prefix, segments, window, soft_cap)[0]


def _ring_forward(q, k, v, prefix, segments, window, soft_cap):
    def visit(step, carry):
        seen, (k, v) = carry
        keys = Keys(k, v, _bias(segments, step, q.shape[4], window))
        return _look(q, keys, soft_cap, seen), _passed_on((k, v))

    first = _nothing_seen(q) if prefix is None else _look(q, prefix, soft_cap, None)
    seen, _ = lax.fori_loop(0, lax.axis_size(AXIS), visit, (first, (k, v)))
    out = (seen.out / seen.total).astype(q.dtype)
    return out, (q, k, v, prefix, segments, window, out, seen.highest + jnp.log(seen.total))


def _ring_backward(soft_cap, saved, d_out):
    q, k, v, prefix, segments, window, out, lse = saved
    row = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1, keepdims=True)

    def visit(step, carry):
        d_q, (k, v), d_before = carry  # of the keys that were here a step ago
        keys = Keys(k, v, _bias(segments, step, q.shape[4], window))
        more_q, *more = _gradients(q, keys, soft_cap, d_out, lse, row)
        d_passing = jax.tree.map(jnp.add, _passed_on(d_before), tuple(more))
        return d_q + more_q, _passed_on((k, v)), d_passing

    d_q, of_prefix, dtype = jnp.zeros(q.shape, jnp.float32), None, q.dtype
    if prefix is not None:
        d_q, of_k, of_v = _gradients(q, prefix, soft_cap, d_out, lse, row)
        of_prefix = Keys(of_k.astype(dtype), of_v.astype(dtype), jnp.zeros_like(prefix.bias))
    nothing = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    d_q, _, d_passing = lax.fori_loop(0, lax.axis_size(AXIS), visit, (d_q, (k, v), nothing))
    d_k, d_v = _passed_on(d_passing)  # home
    return d_q.astype(dtype), d_k.astype(dtype), d_v.astype(dtype), of_prefix, None, None


ring_attention.defvjp(_ring_forward, _ring_backward)


def _queries(x: Array, samples: int, groups: int) -> Float[Array, "p h g r s d"]:
    rows, _, heads, size = x.shape
    x = x.reshape(rows, samples, -1, groups, heads // groups, size)
    return x.transpose(0, 3, 1, 4, 2, 5)


def _keys(x: Array, samples: int) -> Float[Array, "p h g s d"]:
    rows, _, groups, size = x.shape
    return x.reshape(rows, samples, -1, groups, size).transpose(0, 3, 1, 2, 4)


def _columns(out: Float[Array, "p h g r s d"]) -> Float[Array, "p N Hd"]:
    """The inverse of `_queries`, heads joined."""
    rows, groups, _, more, _, size = out.shape
    return out.transpose(0, 2, 4, 1, 3, 5).reshape(rows, -1, groups * more * size)


def _on_columns(local, q, k, v, masks, window: int | Array | None) -> Array:
    """`local` on each device's columns of q, k, v and of the masks, [P, ..., columns]."""
    mesh = mesh_here()
    window = jnp.int32(EVERYTHING) if window is None else jnp.asarray(window, jnp.int32)

    def spec(*axes):
        return spec_of(axes, mesh, "compute")

    of_heads = spec("batch", "columns", "heads")
    of_keys = spec("batch", "columns", "kv_heads")
    of_masks = (spec("batch", *(None,) * (mask.ndim - 2), "columns") for mask in masks)
    split = jax.shard_map(
        local,
        in_specs=(of_heads, of_keys, of_keys, *of_masks, spec()),
        out_specs=of_heads,
        check_vma=False,
    )
    return constrain(split(q, k, v, *masks, window), "batch", "columns", "heads")


def split_row_attention(
    q: Float[Array, "P N H d"],
    k: Float[Array, "P N Hkv d"],
    v: Float[Array, "P N Hkv d"],
    segments: Int[Array, "P N"],
    *,
    scale: float,
    soft_cap: float | None,
    window: int | Int[Array, ""] | None,
) -> Float[Array, "P N Hd"]:
    """Attention of each token to those before it in its own segment, columns split."""

    def local(q, k, v, segments, window):
        whole = lax.all_gather(segments, AXIS, axis=1, tiled=True)[:, None]
        q = _queries(q * scale, 1, k.shape[2])
        return _columns(ring_attention(q, _keys(k, 1), _keys(v, 1), None, whole, window, soft_cap))

    return _on_columns(local, q, k, v, (segments,), window)


def split_attention(
    q: Float[Array, "P N H d"],
    k: Float[Array, "P N Hkv d"],
    v: Float[Array, "P N Hkv d"],
    prompt_mask: Bool[Array, "P L"],
    mask: Bool[Array, "P G T"],
    *,
    scale: float,
    soft_cap: float | None,
    window: int | Int[Array, ""] | None,
) -> Float[Array, "P N Hd"]:
    """Attention of prompts and of their responses, columns split over `sequence`.

    Of the N = L + G·T columns each device has a piece of the prompt and then the same piece of each
    response (`decoder._split_response_states`). Column 0 of a response is the prompt's last one
    again: in the prefix nobody sees that.
    """
    length, (_, samples, _) = prompt_mask.shape[1], mask.shape

    def local(q, k, v, prompt_mask, mask, window):
        piece, groups = prompt_mask.shape[1], k.shape[2]
        here = lax.axis_index(AXIS)

        def gathered(x, axis=1):
            return lax.all_gather(x, AXIS, axis=axis, tiled=True)

        prompt_k, prompt_v = (gathered(x[:, :piece]).transpose(0, 2, 1, 3) for x in (k, v))
        real = gathered(prompt_mask)[:, None, None, None, None]
        at, keys_at = here * piece + jnp.arange(piece), jnp.arange(length)
        distance = at[:, None] - keys_at
        asked = real & (distance >= 0) & (distance < window)
        own = attend(
            _queries(q[:, :piece] * scale, 1, groups),
            [Keys(prompt_k, prompt_v, bias_of(asked))],
            soft_cap,
        )

        new = mask.shape[2]
        at = length - 1 + here * new + jnp.arange(new)
        before = real & (at[:, None] - keys_at < window) & (keys_at < length - 1)
        theirs = ring_attention(
            _queries(q[:, piece:] * scale, samples, groups),
            _keys(k[:, piece:], samples),
            _keys(v[:, piece:], samples),
            Keys(prompt_k, prompt_v, bias_of(before)),
            gathered(mask, axis=2).astype(jnp.int32),
            window,
            soft_cap,
        )
        return jnp.concatenate([_columns(own), _columns(theirs)], axis=1)

    return _on_columns(local, q, k, v, (prompt_mask, mask), window)
