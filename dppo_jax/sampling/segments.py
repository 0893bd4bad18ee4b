"""Segments: some pages of a sequence, and the slots whose tokens attend to them.

What slots share is read once for all of them, and what is read follows the tokens in use, whatever
the longest slot has.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Int

from dppo_jax.sampling.sequences import Sample

NOBODY = -1
SHORTEST = 32  # tokens of a slot's own segments


class Segments(NamedTuple):
    """Segments of one size. Shards lie one after the other; slots count within one."""

    pages: Int[Array, "S P"]
    slots: Int[Array, "S G"]  # that attend to it; NOBODY where there is room
    first: Int[Array, " S"]  # position of its first token
    tokens: Int[Array, " S"]  # in its pages

    @property
    def shared(self) -> bool:
        """Whether they are of several slots: such a slot has one of them, else it may have more."""
        return self.slots.shape[1] > 1


class SegmentShape(NamedTuple):
    """What is compiled of them, for each shard."""

    number: int
    pages: int  # of one
    slots: int  # of one


def own_pages(page_size: int, most: int, queries: int, itemsize: int) -> int:
    """Pages of a slot's own segments, of `most` of a sequence, for `queries` heads of a key head.

    Longer ones are filled less, shorter ones give more sums to add up. Of n tokens 2 n d itemsize
    bytes are read; their float32 sums, queries x d, are written twice and read twice. That is an
    eighth at n = 64 queries / itemsize.
    """
    tokens = max(SHORTEST, 64 * queries // itemsize)
    return min(most, -(-tokens // page_size))


def segment_counts(slots: int, most: int) -> list[int]:
    """Own segments of a shard that the decoding loop is compiled for, where a slot has `most`.

    slots x 1, 1.5, 2, 3, 4, 6, 8, 12, ... `most`.
    """
    halves = {step << i for step in (2, 3) for i in range(most.bit_length())}
    return sorted({*(-(-slots * n // 2) for n in halves if n < 2 * most), slots * most})


def shared_shape(slots: int, samples: int, pages: int) -> SegmentShape | None:
    """For a shard's slots, `samples` of a prompt and `pages` of it; None where nothing is shared.

    Half as many as full ones would be are added: some of a prompt's samples have ended.
    """
    sharers = min(samples, slots)
    if sharers < 2 or not pages:
        return None
    full = -(-slots // sharers)
    return SegmentShape(full + -(-full // 2), pages, sharers)


ByShard = list[list[Segments]]


def find_shared(
    running: Sequence[Sample], shards: int, slots: int, of: SegmentShape, page_size: int
) -> tuple[ByShard, dict[int, int]]:
    """The prompts' whole pages that at least two of a shard's `slots` slots have, and how many
    tokens that are of each such slot.

    Where there are more than `of.number`, those are left out that save least.
    """
    alike: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for sample in running:
        whole = min(of.pages, len(sample.request.prompt) // page_size)
        alike.setdefault((sample.shard, tuple(sample.pages[:whole])), []).append(sample.slot)
    groups = [
        (shard, pages, sharing[i : i + of.slots])
        for (shard, pages), sharing in alike.items()
        for i in range(0, len(sharing), of.slots)
    ]
    groups = [group for group in groups if group[1] and len(group[2]) > 1]
    groups.sort(key=lambda group: -len(group[1]) * (len(group[2]) - 1))
    found: ByShard = [[] for _ in range(shards)]
    tokens: dict[int, int] = {}
    for shard, pages, sharing in groups:
        if len(found[shard]) < of.number:
            one = nothing(of._replace(number=1))
            one.pages[0, : len(pages)] = pages
            one.slots[0, : len(sharing)] = np.array(sharing) % slots
            one.tokens[:] = len(pages) * page_size
            found[shard].append(one)
            tokens |= dict.fromkeys(sharing, len(pages) * page_size)
    return found, tokens


def find_own(
    running: Sequence[Sample],
    before: dict[int, int],
    shards: int,
    slots: int,
    pages: int,
    page_size: int,
) -> ByShard:
    """The tokens after `before` of each slot, `pages` in a segment."""
    found: ByShard = [[] for _ in range(shards)]
    for sample in running:
        start = before.get(sample.slot, 0)
        first = np.arange(start, sample.length, pages * page_size)
        there = sample.pages[start // page_size : -(-sample.length // page_size)]
        one = nothing(SegmentShape(len(first), pages, 1))
        one.pages.reshape(-1)[: len(there)] = there
        one.slots[:] = sample.slot % slots
        one.first[:] = first
        one.tokens[:] = np.minimum(sample.length - first, pages * page_size)
        found[sample.shard].append(one)
    return found


def nothing(of: SegmentShape) -> Any:
    """Segments on the host of page 0, which nobody attends to."""
    leaves: dict[str, Any] = dict(
        pages=np.zeros((of.number, of.pages), np.int32),
        slots=np.full((of.number, of.slots), NOBODY, np.int32),
        first=np.zeros(of.number, np.int32),
        tokens=np.zeros(of.number, np.int32),
    )
    return Segments(**leaves)


def most_of(found: ByShard) -> int:
    """Segments of the shard that has the most."""
    return max(sum(len(one.first) for one in shard) for shard in found)


def joined(found: ByShard, of: SegmentShape) -> Segments:
    """All of them, `of.number` a shard."""
    whole = nothing(of._replace(number=len(found) * of.number))
    for shard, some in enumerate(found):
        at = shard * of.number
        for one in some:
            for leaf, part in zip(whole, one, strict=True):
                leaf[at : at + len(part)] = part
            at += len(one.first)
    return whole
