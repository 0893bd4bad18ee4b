"""What the host writes for the engine's programs: rows of slots, and padded batches of prompts."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dppo_jax.sampling.engine_config import EngineConfig
from dppo_jax.sampling.engine_programs import Slots
from dppo_jax.sampling.paged_cache import table_of
from dppo_jax.sampling.requests import SamplingParams
from dppo_jax.sampling.rows import row_of, stacked
from dppo_jax.sampling.scheduler import Prefill
from dppo_jax.sampling.sequences import Sample


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
        self, running: Sequence[Sample], c: EngineConfig, pages: int, width: int | None = None
    ) -> Slots:
        """The batch of a chunk. Unused places hold page 0 to read and none to write."""
        size, slots = c.page_size, len(self._stop_ids)
        numbers: dict[str, Any] = {
            name: np.zeros(slots, np.int32) for name in ("length", "drawn", "remaining")
        }
        read: list[list[int]] = [[] for _ in range(slots)]
        written: list[list[int]] = [[] for _ in range(slots)]
        history = None
        if any(s.request.sampling.repetition_penalty != 1 for s in running):
            history = np.full((slots, c.max_context), -1, np.int32)
        for sample in running:
            at = sample.slot
            numbers["length"][at] = sample.length
            numbers["drawn"][at] = sample.count
            numbers["remaining"][at] = sample.remaining
            read[at] = sample.pages[: -(-sample.length // size)]
            written[at] = sample.pages[sample.length // size :]
            if history is not None:
                history[at, : sample.length] = sample.context
        if width is None:
            most = max(map(len, read))
            width = next(w for w in view_widths(-(-c.max_context // size)) if w >= most)
        numbers |= dict(
            table=table_of(read, width, 0),
            new_pages=table_of(written, -(-c.chunk // size) + 1, pages),
            stop_ids=self._stop_ids.copy(),
            rows=jax.tree.map(np.copy, self._rows),
            history=history,
        )
        return Slots(**numbers)


def view_widths(most: int) -> list[int]:
    """Pages a slot that the decoding loop is compiled for: 1, 2, 4, ... `most`."""
    return [*(2**i for i in range((most - 1).bit_length())), most]


class Call(NamedTuple):
    """One call of `prefill`: job i is row i."""

    jobs: list[Prefill]
    arrays: dict[str, Any]


def prefill_calls(
    jobs: Sequence[Prefill], c: EngineConfig, pages: int, pages_a_sequence: int
) -> Iterator[Call]:
    """The jobs in as few calls as their lengths and the compiled shapes allow."""
    kinds: dict[tuple[int, bool], list[Prefill]] = {}
    for job in jobs:
        bucket = next(b for b in c.buckets if b >= len(job.tokens))
        kinds.setdefault((bucket, bool(job.prefix)), []).append(job)
    for (bucket, with_prefix), same in kinds.items():
        most = rows_of(bucket, c)
        for first in range(0, len(same), most):
            some = same[first : first + most]
            rows = most if len(some) > 1 else 1
            yield Call(some, _arrays(some, rows, bucket, with_prefix, c, pages, pages_a_sequence))


def empty_calls(c: EngineConfig, pages: int, pages_a_sequence: int) -> Iterator[Call]:
    """A call of every shape that `prefill_calls` makes, with nothing to compute."""
    for bucket in c.buckets:
        for rows in sorted({1, rows_of(bucket, c)}):
            for with_prefix in sorted({False, c.prefix_cache}):
                arrays = _arrays([], rows, bucket, with_prefix, c, pages, pages_a_sequence)
                yield Call([], arrays)


def rows_of(bucket: int, c: EngineConfig) -> int:
    """Prompts that one call takes at most."""
    return max(1, min(c.slots, c.prefill_tokens // bucket))


def _arrays(jobs, rows, bucket, with_prefix, c, pages, pages_a_sequence) -> dict[str, Any]:
    tokens = np.zeros((rows, bucket), np.int32)
    lengths, prefix_lengths = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    prefix = np.zeros((rows, pages_a_sequence), np.int32) if with_prefix else None
    for row, job in enumerate(jobs):
        tokens[row, : len(job.tokens)] = job.tokens
        lengths[row] = len(job.tokens)
        prefix_lengths[row] = len(job.prefix) * c.page_size
        if prefix is not None:
            prefix[row, pages_a_sequence - len(job.prefix) :] = job.prefix
    return dict(
        tokens=tokens,
        lengths=lengths,
        to=table_of([job.to for job in jobs] + [[]] * (rows - len(jobs)),
                    bucket // c.page_size, pages),
        prefix=prefix,
        prefix_lengths=prefix_lengths,
    )  # fmt: skip
