"""How the decoding loop keeps and reads keys and values: two forms with one interface.

`start` gives each layer's state of the loop with room for the first of `rooms`, `grown` with more;
`step` attends with one new token a slot, `finish` gives the pages back. On a mesh everything here
is done shard by shard: a slot's pages lie on the devices that hold the slot, and heads are split
over tensor.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jaxtyping import Array, Bool, Float, Int

from dppo_jax.models.config import DecoderConfig
from dppo_jax.sampling.paged_attention import (
    answers_of,
    attended,
    attended_segments,
    combined,
    of_slots,
    room_bias,
    with_column,
)
from dppo_jax.sampling.paged_cache import (
    RAGGED,
    SPLIT,
    LayerPages,
    RaggedPages,
    SplitPages,
    View,
    empty_view,
    rounded,
    view_of,
)
from dppo_jax.sampling.segments import Segments
from dppo_jax.sharding import mesh_here, spec_of

# Logical axes that split arrays [slots, tokens, heads, ...], [slots, heads, ...], and of slots.
TOKENS = ("queries", None, "kv_heads")
HEADS = ("queries", "kv_heads")
SLOTS = ("queries",)
WHOLE: tuple[str, ...] = ()
SMALLEST_HALVED = 32  # tokens of a chunk
# Of the ragged kernel: keys of one block, and queries, which are slots here.
BLOCK, QUERIES = 512, 8


def by_shard(function: Callable, *given: tuple, gives: tuple) -> Callable:
    """`function` on each device's part of its arguments, which lie as these axes say.

    `gives` are the axes of its result, or a tuple of those of its results.
    """
    mesh = mesh_here()
    if mesh.empty or mesh.size == 1:
        return function

    def spec(axes):
        return spec_of(axes, mesh, "decode")

    out = tuple(map(spec, gives)) if gives and isinstance(gives[0], tuple) else spec(gives)
    # Pallas kernels do not say over which axes their results vary.
    return jax.shard_map(function, in_specs=tuple(map(spec, given)), out_specs=out, check_vma=False)


class Where(NamedTuple):
    """Where a slot's tokens lie: how many there are, the chunk's pages, and all of them, as
    `Ragged` reads them or as `Viewed` does."""

    length: Int[Array, " B"]
    new_pages: Int[Array, "B F"]
    table: Int[Array, "B E"]
    segments: tuple[Segments, ...]

    def places(self, columns: Array, page_size: int) -> tuple[Array, Array]:
        """Page and place of token `length` + column, for columns [C] or a single one."""
        place = self.length[:, None] % page_size + jnp.atleast_1d(columns)
        pages = jnp.take_along_axis(self.new_pages, place // page_size, axis=1)
        return pages, place % page_size


class DecodeForm(Protocol):
    """One way to attend in the loop, which is compiled for each of `rooms`."""

    rooms: list[int]  # new tokens of a slot; the last is the chunk's

    def start(self, pages: Sequence[Any], where: Where) -> list[Any]: ...

    def grown(self, states: list[Any], room: int) -> list[Any]: ...

    def step(
        self,
        layer: int,
        state: Any,
        q: Float[Array, "B H d"],
        k: Float[Array, "B Hkv d"],
        v: Float[Array, "B Hkv d"],
        step: Int[Array, ""],
        active: Bool[Array, " B"],
    ) -> tuple[Float[Array, "B Hd"], Any]: ...

    def finish(
        self, pages: Sequence[Any], states: list[Any], counts: Int[Array, " B"]
    ) -> list[LayerPages]: ...


class Viewed:
    """A dense copy of the segments is made once a chunk, and room for what the loop draws, which
    goes to its pages at the end. For backends whose gathers cost more than the memory of the copy.

    Each token reads the whole room: one that grows half way is read 3/4 as much.
    """

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, chunk: int):
        self.config, self.dtype = config, dtype
        self.rooms = [chunk // 2, chunk] if chunk >= SMALLEST_HALVED else [chunk]

    def start(self, pages: Sequence[Any], where: Where) -> list[View]:
        self.where = where

        def copied(layer: SplitPages, segments: Sequence[Segments]) -> list[View]:
            return [view_of(layer, one.pages) for one in segments]

        def room(layer: SplitPages, length) -> View:
            return empty_view(layer, len(length), self.rooms[0])

        def answers(where: Where) -> list[Array | None]:
            batch = len(where.length)
            return [answers_of(one, batch) if one.shared else None for one in where.segments]

        self.answers = by_shard(answers, SLOTS, gives=SLOTS)(where)
        copied = by_shard(copied, SPLIT, SLOTS, gives=HEADS)
        room = by_shard(room, SPLIT, SLOTS, gives=HEADS)
        self.views = [copied(layer, where.segments) for layer in pages]
        return [room(layer, where.length) for layer in pages]

    def grown(self, states, room):
        def grow(leaf):
            more = (leaf.shape[0], leaf.shape[1], room - leaf.shape[2], *leaf.shape[3:])
            return jnp.concatenate([leaf, jnp.zeros(more, leaf.dtype)], axis=2)

        if room == self.rooms[0]:
            return states
        grow_view = by_shard(partial(jax.tree.map, grow), HEADS, gives=HEADS)
        return [grow_view(state) for state in states]

    def step(self, layer, state, q, k, v, step, active):
        c, window = self.config, self.config.windows[layer]

        def attend(q, new, room: View, views: Sequence[View], where: Where, answers, step):
            batch, heads, size = q.shape
            groups = room.k.shape[1]
            room = with_column(room, new, step)
            q = (q * c.attention_scale).reshape(batch, groups, heads // groups, size)
            cap, now = c.attention_soft_cap, where.length + step
            bias = room_bias(room.v.shape[2], step, window)
            own, others = [attended(q, room, bias[None, None], cap)], []
            for view, one, mine in zip(views, where.segments, answers, strict=True):
                part = attended_segments(q, view, one, now, cap, window)
                if mine is None:
                    others.append((part, one.slots.reshape(-1)))
                else:
                    own.append(of_slots(part, mine))
            return combined(own, others).astype(q.dtype).reshape(batch, -1), room

        given = (HEADS, HEADS, HEADS, HEADS, SLOTS, SLOTS, WHOLE)
        attend = by_shard(attend, *given, gives=(HEADS, HEADS))
        new, views = rounded(k, v, self.dtype), self.views[layer]
        return attend(q, new, state, views, self.where, self.answers, step)

    def finish(self, pages, states, counts):
        def write(layer: SplitPages, room: View, where: Where, counts):
            columns = jnp.arange(self.rooms[-1])
            to, at = where.places(columns, layer.page_size)
            to = jnp.where(columns < counts[:, None], to, len(layer.k))
            return layer.with_tokens(SplitPages(*room).tokens, to, at)

        write = by_shard(write, SPLIT, HEADS, SLOTS, SLOTS, gives=SPLIT)
        return [write(*both, self.where, counts) for both in zip(pages, states, strict=True)]


class Ragged:
    """JAX's ragged paged attention for TPUs, which reads the pages where they are.

    Each step writes its tokens to their pages; the table lists the chunk's pages too. Knows no
    int8, and only heads that fill a register: `why_not_ragged`.
    """

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, chunk: int):
        self.config, self.dtype, self.rooms = config, dtype, [chunk]

    def start(self, pages: Sequence[Any], where: Where) -> list[RaggedPages]:
        self.where = where
        return list(pages)

    def grown(self, states, room):
        return states

    def step(self, layer, state, q, k, v, step, active):
        c = self.config

        def attend(q, new, pages: RaggedPages, where: Where, step, active):
            slots, page_size = len(q), pages.page_size
            to, at = where.places(step, page_size)
            to = jnp.where(active, to[:, 0], len(pages.kv))
            pages = pages.with_tokens(new, to, at[:, 0])
            attended = ragged_paged_attention(
                q,
                pages.kv,
                jnp.where(active, where.length + step + 1, 1),
                where.table,
                jnp.arange(slots + 1, dtype=jnp.int32),
                jnp.array([slots], jnp.int32),
                sm_scale=c.attention_scale,
                soft_cap=c.attention_soft_cap,
                sliding_window=c.windows[layer],
                num_kv_pages_per_block=max(1, min(where.table.shape[1], BLOCK // page_size)),
                num_queries_per_block=min(slots, QUERIES),
            )
            return attended.reshape(slots, -1), pages

        given = (HEADS, HEADS, RAGGED, SLOTS, WHOLE, SLOTS)
        attend = by_shard(attend, *given, gives=(HEADS, RAGGED))
        return attend(q, rounded(k, v, self.dtype), state, self.where, step, active)

    def finish(self, pages, states, counts):
        return states


def why_not_ragged(config: DecoderConfig, dtype: jnp.dtype, tensor: int) -> str | None:
    """Why `Ragged` cannot serve this model with heads split over `tensor` devices, or None."""
    heads = 2 * config.kv_heads // tensor
    packed, rest = divmod(heads, 4 // dtype.itemsize)
    if dtype == jnp.int8:
        return "its scales are of whole arrays, the int8 cache's of tokens and heads"
    if config.head_size % 128:
        return f"head_size={config.head_size} is no multiple of 128"
    if rest or (packed not in (1, 2, 4, 8) and packed % 8):
        return f"{heads} key and value heads a device do not fill its tiles"
    return None
