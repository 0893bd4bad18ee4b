"""What the host writes for the engine's programs: rows of slots, and padded batches of prompts."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dppo_jax.models.config import DecoderConfig
from dppo_jax.sampling.engine_config import EngineConfig
from dppo_jax.sampling.engine_programs import Slots
from dppo_jax.sampling.paged_cache import page_bytes, storage_dtype, table_of
from dppo_jax.sampling.requests import SamplingParams
from dppo_jax.sampling.rows import row_of, stacked
from dppo_jax.sampling.scheduler import Prefill
from dppo_jax.sampling.segments import (
    Segments,
    SegmentShape,
    find_own,
    find_shared,
    joined,
    most_of,
    own_pages,
    segment_counts,
    shared_shape,
)
from dppo_jax.sampling.sequences import Sample

# Tokens that take as long as what a call of `prefill` costs beside its own. A CPU's: measured in
# a run (1, 4 and 16 rows of 32 tokens: 7.7, 20 and 57 ms; 4 layers of width 256); an accelerator
# multiplies some 240 tokens while it reads the weights.
CALL_TOKENS = {"cpu": 60, "accelerator": 240}


class Shape(NamedTuple):
    """Of the cache: equal shards, each with pages of its own."""

    shards: int
    pages: int  # of a shard
    pages_a_sequence: int


def shape_of(c: EngineConfig, model: DecoderConfig, shards: int) -> Shape:
    """The cache that a configuration asks for; ValueError where there is no page a shard."""
    most = -(-c.max_context // c.page_size)
    pages = c.pages or c.slots * most
    if c.cache_bytes is not None:
        each = page_bytes(model, c.cache_dtype, c.page_size)
        pages = min(pages, c.cache_bytes // each)
        if pages < shards:
            raise ValueError(
                f"cache_bytes={c.cache_bytes} is less than one page of {each} bytes a device: "
                "give more, or make page_size smaller"
            )
    if pages < shards:
        raise ValueError(f"pages={pages} is less than one of each of {shards} shards: give more")
    return Shape(shards, pages // shards, most)


class Reads(NamedTuple):
    """What of the pages a chunk reads, as the decoding loop is compiled for it."""

    table: int = 0  # pages of a slot, or
    own: tuple[SegmentShape, ...] = ()  # segments of single slots, as few as there are
    shared: SegmentShape | None = None  # and of several

    def each(self) -> list["Reads"]:
        """One for each program that is compiled, the largest last."""
        return [self._replace(own=(own,)) for own in self.own] or [self]


def reads_of(c: EngineConfig, model: DecoderConfig, shape: Shape, ragged: bool) -> Reads:
    """The ragged kernel reads no more than there is, and each slot's prompt."""
    most, slots = shape.pages_a_sequence, c.slots // shape.shards
    if ragged:
        return Reads(table=most)
    shared = shared_shape(slots, c.samples, min(c.shared_tokens // c.page_size, most))
    itemsize = storage_dtype(model, c.cache_dtype).itemsize
    pages = own_pages(c.page_size, most, model.heads // model.kv_heads, itemsize)
    numbers = [0] * bool(shared) + segment_counts(slots, -(-most // pages))
    own = tuple(SegmentShape(number, pages, 1) for number in numbers)
    return Reads(own=own, shared=shared)


class SlotRows:
    """The sampling parameters of whoever is in each slot, kept from chunk to chunk."""

    def __init__(self, slots: int, stop_ids: int, biases: int):
        nobody = row_of(SamplingParams(max_new_tokens=1), 0, biases=biases)
        self._biases = biases
        self._rows = stacked([nobody] * slots)
        self._stop_ids = np.full((slots, stop_ids), -1, np.int32)

    def put(self, slot: int, sample: Sample) -> None:
        sampling = sample.request.sampling
        row = row_of(sampling, sample.index, biases=self._biases)
        for leaf, value in zip(self._rows, row, strict=True):
            leaf[slot] = value
        self._stop_ids[slot] = -1
        self._stop_ids[slot, : len(sampling.stop_ids)] = sampling.stop_ids

    def slots(
        self, running: Sequence[Sample], c: EngineConfig, shape: Shape, reads: Reads
    ) -> Slots:
        """The batch of a chunk. Unused places hold page 0 to read and none to write."""
        size, slots = c.page_size, len(self._stop_ids)
        numbers: dict[str, Any] = {
            name: np.zeros(slots, np.int32) for name in ("length", "drawn", "remaining")
        }
        written: list[list[int]] = [[] for _ in range(slots)]
        read: list[list[int]] = [[] for _ in range(slots)]
        history = None
        if any(s.request.sampling.repetition_penalty != 1 for s in running):
            history = np.full((slots, c.max_context), -1, np.int32)
        for sample in running:
            at = sample.slot
            numbers["length"][at] = sample.length
            numbers["drawn"][at] = sample.count
            numbers["remaining"][at] = sample.remaining
            read[at] = sample.pages if reads.table else []
            written[at] = sample.pages[sample.length // size :]
            if history is not None:
                history[at, : sample.length] = sample.context
        numbers |= dict(
            table=table_of(read, reads.table, 0),
            segments=_segments(running, reads, shape.shards, slots // shape.shards, size),
            new_pages=table_of(written, -(-c.chunk // size) + 1, shape.pages),
            stop_ids=self._stop_ids.copy(),
            rows=jax.tree.map(np.copy, self._rows),
            history=history,
        )
        return Slots(**numbers)


def _segments(
    running: Sequence[Sample], reads: Reads, shards: int, slots: int, page_size: int
) -> tuple[Segments, ...]:
    """All tokens of all slots, in the smallest shape that holds them."""
    if not reads.own:
        return ()
    found: list[Segments] = []
    before: dict[int, int] = {}
    if reads.shared is not None:
        shared, before = find_shared(running, shards, slots, reads.shared, page_size)
        found.append(joined(shared, reads.shared))
    own = find_own(running, before, shards, slots, reads.own[0].pages, page_size)
    most = most_of(own)
    smallest = next(of for of in reads.own if of.number >= most)
    return (*found, *([joined(own, smallest)] if smallest.number else []))


class Call(NamedTuple):
    """One call of `prefill`, and the rows of its jobs."""

    jobs: dict[int, Prefill]
    arrays: dict[str, Any]


def prefill_calls(jobs: Sequence[Prefill], c: EngineConfig, shape: Shape) -> Iterator[Call]:
    """The jobs in as few calls as their lengths and the compiled shapes allow."""
    kinds: dict[tuple[int, bool], list[list[Prefill]]] = {}
    for job in jobs:
        bucket = next(b for b in c.buckets if b >= len(job.tokens))
        shards = kinds.setdefault((bucket, bool(job.prefix)), [[] for _ in range(shape.shards)])
        shards[job.shard].append(job)
    for (bucket, with_prefix), shards in kinds.items():
        first = 0
        for rows in rows_of_calls(max(map(len, shards)), row_counts(bucket, c, shape), bucket):
            some = [same[first : first + rows] for same in shards]
            first += rows
            placed = {
                shard * rows + i: job
                for shard, same in enumerate(some)
                for i, job in enumerate(same)
            }
            yield Call(placed, _arrays(placed, rows, bucket, with_prefix, c, shape))


def empty_calls(c: EngineConfig, shape: Shape) -> Iterator[Call]:
    """A call of every shape that `prefill_calls` makes, with nothing to compute."""
    for bucket in c.buckets:
        for rows in row_counts(bucket, c, shape):
            for with_prefix in sorted({False, c.prefix_cache}):
                yield Call({}, _arrays({}, rows, bucket, with_prefix, c, shape))


def row_counts(bucket: int, c: EngineConfig, shape: Shape) -> list[int]:
    """Prompts of each shard that a call may take: 1, 4, 16, ... and the most there is room for."""
    most = max(1, min(c.slots, c.prefill_tokens // bucket) // shape.shards)
    return [*(4**i for i in range(most) if 4**i < most), most]


def rows_of_calls(prompts: int, sizes: list[int], bucket: int) -> list[int]:
    """The rows of the calls, of these sizes, that take so many prompts in the least time.

    A call computes its empty rows too; and it costs a number of tokens more, `CALL_TOKENS`.
    """
    fixed = CALL_TOKENS["cpu" if jax.default_backend() == "cpu" else "accelerator"]
    best: list[tuple[int, list[int]]] = [(0, [])]  # the cost and the calls of 0, 1, ... prompts
    for count in range(1, prompts + 1):
        ways = ((size, *best[max(0, count - size)]) for size in sizes)
        best.append(min((cost + size * bucket + fixed, [*rest, size]) for size, cost, rest in ways))
    return sorted(best[-1][1], reverse=True)


def _arrays(
    jobs: dict[int, Prefill],
    rows_a_shard: int,
    bucket: int,
    with_prefix: bool,
    c: EngineConfig,
    shape: Shape,
) -> dict[str, Any]:
    rows, most = rows_a_shard * shape.shards, shape.pages_a_sequence
    tokens = np.zeros((rows, bucket), np.int32)
    lengths, prefix_lengths = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    prefix = np.zeros((rows, most), np.int32) if with_prefix else None
    to: list[list[int]] = [[] for _ in range(rows)]
    for row, job in jobs.items():
        tokens[row, : len(job.tokens)] = job.tokens
        lengths[row] = len(job.tokens)
        prefix_lengths[row] = len(job.prefix) * c.page_size
        if prefix is not None:
            prefix[row, most - len(job.prefix) :] = job.prefix
        to[row] = job.to
    return dict(
        tokens=tokens,
        lengths=lengths,
        to=table_of(to, bucket // c.page_size, shape.pages),
        prefix=prefix,
        prefix_lengths=prefix_lengths,
    )
