"""Who gets a slot and pages: the engine's bookkeeping, without a device.

Slots and pages come in shards, one for each part of the mesh that keeps its slots' pages to
itself; one in all without a mesh.
"""

import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import jax
import numpy as np

from dppo_jax.sampling.pages import Pages, prefix_keys
from dppo_jax.sampling.sequences import Sample

Key = tuple[int, int]  # a request, and the sample whose own context it is (-1: the prompt)


@dataclass(eq=False)
class Prefilled:
    """A context whose keys and values are in pages, waiting for the samples that start from it."""

    length: int
    pages: list[int]
    last: tuple[jax.Array, int] | None = None  # hidden states and the row; None: not yet computed
    experts: np.ndarray | None = None  # of its tokens, where they are recorded


@dataclass
class Prefill:
    """A context to compute: `tokens` after those of the `prefix` pages, into the pages `to`."""

    shard: int
    tokens: np.ndarray
    prefix: list[int]
    to: list[int]
    result: Prefilled
    samples: list[Sample]  # that wait for it


@dataclass
class Start:
    """A sample put in a slot; its last page is a copy of another where `copy` says so."""

    sample: Sample
    last: tuple[jax.Array, int]
    copy: tuple[int, int] | None  # from, to


@dataclass
class Round:
    """What the device has to do next: starts first, then prefills."""

    starts: list[Start] = field(default_factory=list)
    prefills: list[Prefill] = field(default_factory=list)


@dataclass(eq=False)
class Shard:
    pages: Pages
    slots: list[Sample | None]
    prefilled: dict[Key, Prefilled] = field(default_factory=dict)

    @property
    def free(self) -> int:
        return self.slots.count(None)


def key_of(sample: Sample) -> Key:
    """Samples with the same key start from the same context."""
    return (sample.request.id, sample.index if sample.count else -1)


class Scheduler:
    """A queue, served first come first, and the slots; `rounds` and `grow` before each chunk."""

    def __init__(
        self, shards: int, slots: int, pages: int, page_size: int, chunk: int, *,
        prefix_cache: bool, continuous: bool,
    ):  # fmt: skip
        self.page_size, self.chunk = page_size, chunk
        self.prefix_cache, self.continuous = prefix_cache, continuous
        self.shards = [Shard(Pages(pages), [None] * slots) for _ in range(shards)]
        self.queue: deque[Sample] = deque()
        self.preemptions = self.cached_tokens = self._admitted = 0

    @property
    def running(self) -> list[Sample]:
        """Samples in slots, the longest there first."""
        there = [s for shard in self.shards for s in shard.slots if s is not None]
        return sorted(there, key=lambda sample: sample.admitted)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def rounds(self) -> Iterator[Round]:
        """Work that fills the free slots; each is to be done before the next is asked for."""
        if not self.continuous and self.running:
            return
        while (round_ := self._round()).starts or round_.prefills:
            yield round_

    def grow(self) -> None:
        """Gives every sample pages for its next chunk; where they run out the youngest waits."""
        for sample in self.running:
            while sample.slot >= 0:
                need = self._pages_of_chunk(sample) - len(sample.pages)
                if (pages := self._allocate(self.shards[sample.shard], need)) is not None:
                    sample.pages += pages
                    break
                others = [s for s in self.running if s.shard == sample.shard]
                self.preemptions += 1
                self.preempt(others[-1])

    def preempt(self, sample: Sample) -> None:
        """Back to the head of the queue; its context is computed again when its turn comes."""
        self.release(sample)
        sample.waiting_since = time.monotonic()
        self.queue.appendleft(sample)

    def release(self, sample: Sample) -> None:
        """Takes a sample out of its slot."""
        shard = self.shards[sample.shard]
        shard.pages.release(sample.pages)
        shard.slots[sample.slot % len(shard.slots)] = None
        sample.pages, sample.length, sample.slot, sample.shard = [], 0, -1, -1

    def restart(self) -> None:
        """All samples wait again, and nothing computed is kept: there are new parameters."""
        for sample in reversed(self.running):
            self.preempt(sample)
        for shard in self.shards:
            for key in list(shard.prefilled):
                self._drop(shard, key)
            shard.pages.forget_all()

    def remove(self, request: int | None = None) -> list[Sample]:
        """Takes out all samples, or those of one request."""

        def wanted(sample):
            return request is None or sample.request.id == request

        removed = [sample for sample in self.running if wanted(sample)]
        for sample in removed:
            self.release(sample)
        removed += [sample for sample in self.queue if wanted(sample)]
        self.queue = deque(sample for sample in self.queue if not wanted(sample))
        for shard in self.shards:
            for key in [key for key in shard.prefilled if request in (None, key[0])]:
                self._drop(shard, key)
        return removed

    def _pages_of_chunk(self, sample: Sample) -> int:
        return self.pages_for(sample.length + min(self.chunk, sample.remaining))

    def _round(self) -> Round:
        round_, waiting = Round(), list(self.queue)
        alike = Counter(map(key_of, waiting))  # those that wait
        promised = [0] * len(self.shards)  # slots for samples whose context comes in this round
        jobs: dict[tuple[int, Key], Prefill] = {}
        coming: set[tuple[int, bytes]] = set()  # contents that this round computes
        for sample in waiting:
            key = key_of(sample)
            open_ = [i for i, s in enumerate(self.shards) if s.free > promised[i]]
            if not open_:
                break

            def preference(i: int, key=key) -> tuple[bool, bool, int]:
                known = key in self.shards[i].prefilled
                return known, (i, key) in jobs, self.shards[i].free - promised[i]

            at = max(open_, key=preference)
            if (at, key) in jobs:
                jobs[at, key].samples.append(sample)
                promised[at] += 1
            elif key in self.shards[at].prefilled:
                if (start := self._start(sample, at, key, siblings=alike[key] > 1)) is None:
                    break
                alike[key] -= 1
                round_.starts.append(start)
            else:
                keys = prefix_keys(sample.context[:-1], self.page_size)  # the last is computed
                if self.prefix_cache and any((at, key) in coming for key in keys):
                    promised[at] += 1  # to be found in the cache by the next round
                    continue
                if (job := self._prefill(sample, at, keys)) is None:
                    break
                jobs[at, key] = job
                coming |= {(at, key) for key in keys[len(job.prefix) :]}
                promised[at] += 1
        round_.prefills = list(jobs.values())
        return round_

    def _prefill(self, sample: Sample, at: int, keys: list[bytes]) -> Prefill | None:
        """Pages for a sample's context, those that are known already among them."""
        shard, context = self.shards[at], sample.context
        prefix = shard.pages.find(keys) if self.prefix_cache else []
        # Only where the first chunk has room as well: else it would be preempted at once.
        whole = self.pages_for(len(context) + min(self.chunk, sample.remaining))
        new = self._allocate(shard, whole - len(prefix))
        if new is None:
            shard.pages.release(prefix)
            return None
        count = self.pages_for(len(context)) - len(prefix)
        shard.pages.release(new[count:])
        to = new[:count]
        known = len(prefix) * self.page_size
        self.cached_tokens += known
        result = Prefilled(len(context), prefix + to)
        shard.prefilled[key_of(sample)] = result
        if self.prefix_cache:
            shard.pages.remember(keys, result.pages[: len(keys)])
        return Prefill(at, context[known:], prefix, to, result, [sample])

    def _start(self, sample: Sample, at: int, key: Key, *, siblings: bool) -> Start | None:
        """Puts a sample in a free slot; None where there are no pages for it.

        `siblings`: whether others wait that start from the same context.
        """
        shard = self.shards[at]
        context = shard.prefilled[key]
        assert context.last is not None, "a round was not done before the next"
        whole = context.length // self.page_size
        partial = context.pages[whole:]
        more = self.pages_for(context.length + min(self.chunk, sample.remaining))
        more -= len(context.pages)
        copy = None
        new = self._allocate(shard, more + len(partial), keep=key) if siblings else None
        if new is not None:
            shard.pages.share(context.pages[:whole])
            if partial:
                copy = (partial[0], new[0])
            pages = context.pages[:whole] + new
        else:  # the last one takes the context itself, and so does one that finds no room beside it
            new = self._allocate(shard, more, keep=key)
            if new is None:
                return None
            pages = shard.prefilled.pop(key).pages + new
        self.queue.remove(sample)
        if not siblings:
            for other in self.shards:  # where nobody of them came to be
                if key in other.prefilled:
                    self._drop(other, key)
        self._admitted += 1
        local = shard.slots.index(None)
        sample.admitted, sample.shard = self._admitted, at
        sample.slot = at * len(shard.slots) + local
        sample.pages, sample.length = pages, context.length
        sample.queue_seconds += time.monotonic() - sample.waiting_since
        if context.experts is not None and sample.prompt_experts is None:
            sample.prompt_experts = context.experts[: len(sample.request.prompt)]
        shard.slots[local] = sample
        return Start(sample, context.last, copy)

    def _allocate(self, shard: Shard, count: int, keep: Key | None = None) -> list[int] | None:
        """Pages, for which contexts that wait for their samples give way."""
        for key in list(shard.prefilled):
            if shard.pages.available >= count:
                break
            if key != keep and shard.prefilled[key].last is not None:
                self._drop(shard, key)
        return shard.pages.allocate(max(0, count))

    def _drop(self, shard: Shard, key: Key) -> None:
        shard.pages.release(shard.prefilled.pop(key).pages)
