"""Which slots begin with the same pages of a prompt: one reading of these serves them all."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Int

from dppo_jax.sampling.sequences import Sample


class SharedShape(NamedTuple):
    """What is compiled of them, for each shard."""

    rows: int  # prompts
    sharers: int  # slots of one
    pages: int  # of one


class Shared(NamedTuple):
    """Prompts of several slots. Shards lie one after the other; slots and rows count within one."""

    pages: Int[Array, "R P"]
    slots: Int[Array, "R G"]  # whose queries a row's keys meet
    place: Int[Array, " B"]  # of a slot among those: row * G + g
    length: Int[Array, " B"]  # tokens in the row's pages; 0: the slot shares nothing


def shared_shape(slots: int, samples: int, pages: int) -> SharedShape | None:
    """For a shard's slots, `samples` of a prompt and `pages` of it; None where nothing is shared.

    Half as many rows again as full ones would be: some of a prompt's samples have ended.
    """
    sharers = min(samples, slots)
    if sharers < 2 or not pages:
        return None
    full = -(-slots // sharers)
    return SharedShape(full + -(-full // 2), sharers, pages)


def find_shared(
    running: Sequence[Sample], shards: int, slots: int, of: SharedShape, page_size: int
) -> Shared:
    """The prompts' whole pages that at least two of a shard's `slots` slots have.

    Where there are more than rows, those are left out that save least.
    """
    pages = np.zeros((shards, of.rows, of.pages), np.int32)
    who = np.zeros((shards, of.rows, of.sharers), np.int32)
    place, length = np.zeros((2, shards, slots), np.int32)
    alike: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for sample in running:
        whole = min(of.pages, len(sample.request.prompt) // page_size)
        alike.setdefault((sample.shard, tuple(sample.pages[:whole])), []).append(sample.slot)
    rows = [
        (shard, first, sharing[i : i + of.sharers])
        for (shard, first), sharing in alike.items()
        for i in range(0, len(sharing), of.sharers)
    ]
    rows = [row for row in rows if row[1] and len(row[2]) > 1]
    rows.sort(key=lambda row: -len(row[1]) * (len(row[2]) - 1))
    used = [0] * shards
    for shard, first, sharing in rows:
        if (at := used[shard]) == of.rows:
            continue
        used[shard] += 1
        pages[shard, at, : len(first)] = first
        for g, slot in enumerate(slot % slots for slot in sharing):
            who[shard, at, g] = slot
            place[shard, slot] = at * of.sharers + g
            length[shard, slot] = len(first) * page_size
    leaves: list[Any] = [leaf.reshape(-1, *leaf.shape[2:]) for leaf in (pages, who, place, length)]
    return Shared(*leaves)
