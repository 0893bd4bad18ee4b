"""Attention of one new token a slot over a view of its pages.

Axes: B slots, h key heads, r queries a key head, t keys, d head size.
"""

from collections.abc import Sequence
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dppo_jax.models.attention import NEGATIVE, bias_of, soft_capped
from dppo_jax.sampling.paged_cache import Stored, View
from dppo_jax.sampling.segments import NOBODY, Segments


def with_column(view: View, new: Stored, column: Int[Array, ""]) -> View:
    """The view with one token of each slot; new leaves [B, Hkv, ...]."""

    def put(room, leaf):
        return jax.lax.dynamic_update_slice_in_dim(room, leaf[:, :, None], column, axis=2)

    return jax.tree.map(put, view, View(*new))


class Part(NamedTuple):
    """A softmax over some of a query's keys, for `combined`: the sum of values, weighted by the
    exponentials of scores less the largest, the sum of these weights, and the largest score."""

    out: Float[Array, "N h r d"]
    total: Float[Array, "N h r 1"]
    highest: Float[Array, "N h r 1"]


def room_bias(room: int, step: Int[Array, ""], window: int | None) -> Float[Array, " T"]:
    """0 where a column of the chunk is to be seen in step `step`, else NEGATIVE."""
    column = jnp.arange(room)
    return _bias(column <= step, column, step, window)


def segment_bias(
    segments: Segments, columns: int, now: Int[Array, " B"], window: int | None
) -> Float[Array, "..."]:
    """The same of the tokens of segments, for their slots, whose tokens are at positions `now`."""
    column = jnp.arange(columns)
    seen = (column < segments.tokens[:, None])[:, None]
    place = (segments.first[:, None] + column)[:, None]
    return _bias(seen, place, now[segments.slots][:, :, None], window)


def _bias(seen, place, now, window: int | None):
    if window is not None:
        seen &= now - place < window
    return bias_of(seen)


def attended(
    q: Float[Array, "B h r d"], view: View, bias: Float[Array, "#B #r t"], soft_cap: float | None
) -> Part:
    """Of the queries to the keys of their row. Scores and their softmax in float32; int8 keys and
    values are scaled after their products."""
    z = jnp.einsum("bhrd,bhtd->bhrt", q, view.k.astype(q.dtype), preferred_element_type=jnp.float32)
    z = z if view.k_scale is None else z * view.k_scale[:, :, None]
    z = soft_capped(z, soft_cap) + bias[:, None]
    highest = jnp.max(z, axis=-1, keepdims=True)
    weights = jnp.exp(z - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights if view.v_scale is None else weights * view.v_scale[:, :, None]
    weights, v = weights.astype(q.dtype), view.v.astype(q.dtype)
    out = jnp.einsum("bhrt,bhtd->bhrd", weights, v, preferred_element_type=jnp.float32)
    return Part(out, total, highest)


def attended_segments(
    q: Float[Array, "B h r d"],
    view: View,
    segments: Segments,
    now: Int[Array, " B"],
    soft_cap: float | None,
    window: int | None,
) -> Part:
    """Of each segment's slots to its keys: parts [S G, h, r, ...]."""
    count, sharers = segments.slots.shape
    _, heads, queries, size = q.shape
    asked = q[segments.slots].swapaxes(1, 2).reshape(count, heads, sharers * queries, size)
    bias = segment_bias(segments, view.v.shape[2], now, window)[:, :, None]
    bias = jnp.broadcast_to(bias, (count, sharers, queries, bias.shape[-1]))
    part = attended(asked, view, bias.reshape(count, sharers * queries, -1), soft_cap)

    def answered(x):
        x = x.reshape(count, heads, sharers, queries, -1).swapaxes(1, 2)
        return x.reshape(count * sharers, heads, queries, -1)

    return Part(*map(answered, part))


def answers_of(segments: Segments, batch: int) -> Int[Array, " B"]:
    """Which of the segments' S G places each slot has, for slots that have one at most; or NOBODY.

    The one that `of_slots` takes.
    """
    slots = segments.slots.reshape(-1)
    nowhere = jnp.full(batch, NOBODY, jnp.int32)
    return nowhere.at[jnp.where(slots == NOBODY, batch, slots)].set(
        jnp.arange(len(slots), dtype=jnp.int32), mode="drop"
    )


def of_slots(part: Part, answers: Int[Array, " B"]) -> Part:
    """Each slot's part [B, h, r, ...], which counts for nothing where it has none."""
    mine = jax.tree.map(lambda leaf: leaf[jnp.maximum(answers, 0)], part)
    there = (answers != NOBODY)[:, None, None, None]
    return mine._replace(highest=jnp.where(there, mine.highest, NEGATIVE))


def combined(own: Sequence[Part], others: Sequence[tuple[Part, Array]]) -> Float[Array, "B h r d"]:
    """The softmax of each slot over all of its keys: its own parts, one of which has a key that it
    sees, and others [N, h, r, ...] with their slots, of which it may have several."""
    everyone = jnp.arange(len(own[0].highest))[:, None]
    highest = reduce(jnp.maximum, [part.highest for part in own])
    for part, slots in others:
        by_head = part.highest.reshape(len(slots), -1).T[:, None]  # a CPU's maxima: along the last
        its = jnp.max(jnp.where(slots == everyone, by_head, NEGATIVE), axis=-1)
        highest = jnp.maximum(highest, its.T.reshape(highest.shape))
    scales = [jnp.exp(part.highest - highest) for part in own]
    out = reduce(jnp.add, [part.out * scale for part, scale in zip(own, scales, strict=True)])
    total = reduce(jnp.add, [part.total * scale for part, scale in zip(own, scales, strict=True)])
    for part, slots in others:
        # Nobody's is of any slot, and counts for none.
        scale = jnp.exp(jnp.minimum(part.highest - highest[slots], 0.0))
        add = partial(jnp.einsum, "bn,nhrd->bhrd", (slots == everyone) * 1.0, precision="highest")
        out, total = out + add(part.out * scale), total + add(part.total * scale)
    return out / total
