"""The engine's device programs: prefill into pages, and a chunk of decoding.

Pure functions of parameters, pages and plain numbers that the host writes; `engine` calls them.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dppo_jax.kernels.drawing import Drawn
from dppo_jax.kernels.rows import RowSampling, row_numbers
from dppo_jax.kernels.sampler import sample_rows
from dppo_jax.models.attention import Prefix, attention
from dppo_jax.models.config import DecoderConfig
from dppo_jax.models.decoder import Model, Params, rope_tables
from dppo_jax.models.moe import stored_ids
from dppo_jax.sampling.decode_forms import SLOTS, TOKENS, Ragged, Viewed, Where, by_shard
from dppo_jax.sampling.paged_cache import (
    LayerPages,
    copy_pages,
    restored,
    rounded,
    storage_dtype,
    tokens_of,
    write_pages,
)
from dppo_jax.sampling.segments import Segments
from dppo_jax.sampling.weights import Weights, bound, unembedding_of
from dppo_jax.sharding import constrain, on_each_copy, sampler_layout, viewed


@dataclass(frozen=True)
class Programs:
    """What is compiled into `decode_chunk`; everything else is data."""

    chunk: int
    max_context: int
    top_k_capture: int
    raw_logp: bool
    cache_dtype: str
    replay: bool = False
    record_experts: bool = False
    ragged: bool = False  # attention by the TPU kernel, `decode_forms.Ragged`


class Slots(NamedTuple):
    """The decode slots at a chunk's beginning, written by the host."""

    table: Int[Array, "B E"]  # all pages, for the kernel that reads them where they are; else E = 0
    segments: tuple[Segments, ...]  # and the pages of the tokens so far are these
    new_pages: Int[Array, "B F"]  # the chunk's, from the one that token `length` goes to
    length: Int[Array, " B"]  # tokens so far, prompt included
    drawn: Int[Array, " B"]  # of them, tokens of the response
    remaining: Int[Array, " B"]  # tokens that may yet be drawn; 0: nobody is in the slot
    stop_ids: Int[Array, "B S"]  # -1 where there is room
    rows: RowSampling
    history: Int[Array, "B max_context"] | None  # tokens so far, -1 after them


class Chunk(NamedTuple):
    """What a chunk drew: the first `counts` columns of each slot."""

    drawn: Drawn  # [B, C, ...]
    experts: Int[Array, "B C layers k"] | None  # that the drawn tokens went to
    counts: Int[Array, " B"]
    stopped: Bool[Array, " B"]  # the last of them is a stop id
    steps: Int[Array, " copies"]  # of the loop, on each that went on alone


@functools.partial(
    jax.jit,
    static_argnames=("model", "max_context", "cache_dtype", "record_experts"),
    donate_argnames=("pages",),
)
def prefill(
    params: Params,
    pages: list[LayerPages],
    tokens: Int[Array, "N L"],
    lengths: Int[Array, " N"],
    to: Int[Array, "N E"],
    prefix: Int[Array, "N Q"] | None,
    prefix_lengths: Int[Array, " N"],
    *,
    model: Model,
    max_context: int,
    cache_dtype: str,
    record_experts: bool,
    weights: Weights | None = None,
) -> tuple[list[LayerPages], Float[Array, "N D"], Int[Array, "N L layers k"] | None]:
    """Writes the keys and values of `tokens` to pages `to`; the last token's hidden state, and the
    experts of all where they are asked.

    A row's first `lengths` tokens are real, and follow `prefix_lengths` tokens that lie in the
    pages `prefix`, right-aligned. Keys and values are rounded as they are stored before anything
    attends to them, so that recomputing a context gives what decoding it gave.
    """
    (decoder, blocks), c = bound(model, params, weights), model.config
    rows, width = tokens.shape
    page_size, axes = pages[0].page_size, pages[0].axes
    columns = jnp.arange(width)
    mask = columns < lengths[:, None]
    positions = (prefix_lengths[:, None] + columns).reshape(-1)
    tables = rope_tables(c, max_context + width)
    ropes = [(cos[positions], sin[positions]) for cos, sin in tables]
    dtype = storage_dtype(c, cache_dtype)
    x = constrain(decoder.embed(tokens.reshape(-1)), "tokens", "width")
    new_pages: list[LayerPages] = []
    experts: list[Any] = []
    write = by_shard(write_pages, axes, TOKENS, SLOTS, gives=axes)
    for block, layer, window in zip(blocks, pages, c.windows, strict=True):
        q, k, v = block.queries_keys_values(x, ropes[0 if window is None else -1])
        new = rounded(k, v, dtype)
        k, v = restored(new, x.dtype)
        q, k, v = (t.reshape(rows, 1, width, *t.shape[1:]) for t in (q, k, v))
        before = None
        if prefix is not None:
            kept = by_shard(tokens_of, axes, SLOTS, gives=TOKENS)(layer, prefix)
            places = prefix.shape[1] * page_size
            seen = jnp.arange(places) >= places - prefix_lengths[:, None]
            before = Prefix(*restored(kept, x.dtype), seen)
        out = attention(
            q, k, v, mask[:, None], before,
            scale=c.attention_scale, soft_cap=c.attention_soft_cap, window=window,
        )  # fmt: skip
        x, chosen, _ = block.finish_routed(x, out.reshape(rows * width, -1))
        experts.append(chosen)
        new = jax.tree.map(lambda leaf: leaf.reshape(rows, width, *leaf.shape[1:]), new)
        new_pages.append(write(layer, new, to))
    last = x.reshape(rows, width, -1)[jnp.arange(rows), jnp.maximum(lengths - 1, 0)]
    routed = None
    if record_experts:  # whole, for the host
        routed = constrain(jnp.stack(experts, axis=1).reshape(rows, width, c.layers, -1))
    return new_pages, decoder.normed(last), routed


@functools.partial(jax.jit, donate_argnames=("pages",))
def copy(pages: list[LayerPages], source: Int[Array, " N"], to: Int[Array, " N"]):
    """The pages with some copied; numbers beyond the last page are copied nowhere."""
    axes = pages[0].axes
    do = by_shard(copy_pages, axes, SLOTS, SLOTS, gives=axes)
    return [do(layer, source, to) for layer in pages]


@functools.partial(jax.jit, donate_argnames=("hidden",))
def place(hidden: Float[Array, "B D"], last: Float[Array, "N D"], row: Int[Array, " B"]):
    """The slots' hidden states, those with row >= 0 taken from `last`."""
    with viewed("decode"):
        placed = jnp.where(row[:, None] >= 0, last[jnp.maximum(row, 0)], hidden)
        return constrain(placed, "tokens", "width")


def empty_hidden(config: DecoderConfig, slots: int) -> Float[Array, "B D"]:
    """Hidden states that nobody has put there yet."""
    with viewed("decode"):
        return constrain(jnp.zeros((slots, config.width), config.dtype), "tokens", "width")


class _Progress(NamedTuple):
    step: Int[Array, ""]
    hidden: Float[Array, "B D"]  # of the last token, which predicts the next
    states: list  # of the layers, `decode_forms`
    active: Bool[Array, " B"]
    stopped: Bool[Array, " B"]
    counts: Int[Array, " B"]
    record: Drawn  # [C, B, ...]
    experts: Int[Array, "C B layers k"] | None
    history: Int[Array, "B max_context"] | None


@functools.partial(
    jax.jit, static_argnames=("model", "programs"), donate_argnames=("pages", "hidden")
)
def decode_chunk(
    params: Params,
    pages: list[LayerPages],
    hidden: Float[Array, "B D"],
    slots: Slots,
    *,
    model: Model,
    programs: Programs,
    weights: Weights | None = None,
) -> tuple[list[LayerPages], Float[Array, "B D"], Chunk]:
    """Draws up to `programs.chunk` tokens in each slot, fewer where all have ended before.

    A step draws from the hidden states, then runs the drawn tokens through the layers, which
    attend as the `decode_forms` say. Devices with a copy of the parameters each go on until their
    own slots have ended (`on_each_copy`).
    """
    drawn = functools.partial(_drawn_chunk, model, programs)
    whole, split = PartitionSpec(), PartitionSpec("data")
    decode = on_each_copy(drawn, (whole, whole, split, split, split), split)
    pages, hidden, chunk = decode(params, weights, pages, hidden, slots)
    return pages, hidden, jax.tree.map(constrain, chunk)  # whole, for the host


def _drawn_chunk(
    model: Model,
    programs: Programs,
    params: Params,
    weights: Weights | None,
    pages: list[LayerPages],
    hidden: Float[Array, "B D"],
    slots: Slots,
) -> tuple[list[LayerPages], Float[Array, "B D"], Chunk]:
    (decoder, blocks), c = bound(model, params, weights), model.config
    unembedding = unembedding_of(decoder, weights)
    batch = len(slots.length)
    tables = rope_tables(c, programs.max_context)
    dtype = storage_dtype(c, programs.cache_dtype)
    form = (Ragged if programs.ragged else Viewed)(c, dtype, programs.chunk)
    where = Where(slots.length, slots.new_pages, slots.table, slots.segments)
    states = form.start(pages, where)
    everyone = jnp.arange(batch)
    ahead = row_numbers(slots.rows, slots.drawn, programs.chunk)

    def through_layers(token, step, states, active):
        position = jnp.minimum(slots.length + step, programs.max_context - 1)
        ropes = [(cos[position], sin[position]) for cos, sin in tables]
        x = constrain(decoder.embed(constrain(token, "tokens")), "tokens", "width")
        new_states, experts = [], []
        for i, (block, state) in enumerate(zip(blocks, states, strict=True)):
            q, k, v = block.queries_keys_values(x, ropes[0 if c.windows[i] is None else -1])
            attended, state = form.step(i, state, q, k, v, step, active)
            x, chosen, _ = block.finish_routed(x, attended)
            new_states.append(state)
            experts.append(chosen)
        return decoder.normed(x), new_states, experts

    def advance(p: _Progress) -> _Progress:
        drawn = sample_rows(
            p.hidden,
            unembedding,
            slots.rows,
            slots.drawn + p.step,
            p.history,
            top_k_capture=programs.top_k_capture,
            soft_cap=c.final_soft_cap,
            raw_logp=programs.raw_logp,
            replay=programs.replay,
            ahead=jax.tree.map(lambda u: u[p.step], ahead),
            layout=sampler_layout(batch),
        )
        if drawn.raw_logp is not None:
            drawn = drawn._replace(logp=drawn.raw_logp)
        kept = drawn.kept_count if programs.replay else jnp.zeros_like(drawn.token)
        drawn = drawn._replace(raw_logp=None, kept_count=kept)
        record = jax.tree.map(lambda room, leaf: room.at[p.step].set(leaf), p.record, drawn)
        stop = p.active & jnp.any(drawn.token[:, None] == slots.stop_ids, axis=1)
        counts = p.counts + p.active
        history = p.history
        if history is not None:
            at = jnp.where(p.active, slots.length + p.step, programs.max_context)
            history = history.at[everyone, at].set(drawn.token, mode="drop")
        with viewed("decode"):
            hidden, states, chosen = through_layers(drawn.token, p.step, p.states, p.active)
        experts = p.experts
        if experts is not None:
            experts = experts.at[p.step].set(jnp.stack(chosen, axis=1))
        return _Progress(
            step=p.step + 1,
            hidden=hidden,
            states=states,
            active=p.active & ~stop & (counts < slots.remaining),
            stopped=p.stopped | stop,
            counts=counts,
            record=record,
            experts=experts,
            history=history,
        )

    def room(shape, kind):
        return jnp.zeros((programs.chunk, batch, *shape), kind)

    stored, experts = (programs.top_k_capture,), None
    if programs.record_experts:
        experts = room((c.layers, c.experts_per_token), stored_ids(c.experts))
    p = _Progress(
        step=jnp.int32(0),
        hidden=hidden,
        states=states,
        active=slots.remaining > 0,
        stopped=jnp.zeros((batch,), bool),
        counts=jnp.zeros((batch,), jnp.int32),
        record=Drawn(
            token=room((), jnp.int32),
            logp=room((), jnp.float32),
            topk_ids=room(stored, jnp.int32),
            topk_logp=room(stored, jnp.float32),
            entropy=room((), jnp.float32),
            kept_count=room((), jnp.int32),
        ),
        experts=experts,
        history=slots.history,
    )
    for width in form.rooms:
        p = p._replace(states=form.grown(p.states, width))

        def unfinished(p: _Progress, width=width) -> Bool[Array, ""]:
            return (p.step < width) & jnp.any(p.active)

        p = jax.lax.while_loop(unfinished, advance, p)
    new_pages = form.finish(pages, p.states, p.counts)
    drawn, routed = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), (p.record, p.experts))
    found = Chunk(drawn, routed, p.counts, p.stopped, p.step[None])
    with viewed("decode"):
        hidden = constrain(p.hidden, "tokens", "width")
    return new_pages, hidden, found
