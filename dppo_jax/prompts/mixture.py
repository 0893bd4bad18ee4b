"""Several training sets as one, and curricula: which prompts a step may ask.

Both are functions of the position alone, so that a run resumes at an exact prompt and every
process agrees on it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from dppo_jax.prompts.examples import Example
from dppo_jax.prompts.store import load

ALWAYS = range(2**31)

Curriculum = Callable[[Example], range]
"""Example -> the steps at which it may be asked, `ALWAYS` for all of them."""

Dataset = str | Mapping[str, int | float]
"""A data set's name, or the names of several with the share of prompts that each gives."""


def by_level(first_step: Mapping[str, int]) -> Curriculum:
    """A curriculum: prompts of a level join at that level's step; other levels from the start."""
    for level, step in first_step.items():
        if step < 0:
            raise ValueError(f"first_step of level {level!r} is {step}; steps count from 0")
    return lambda example: range(first_step.get(example.level, 0), ALWAYS.stop)


class Part(NamedTuple):
    """A stretch of a mixture's rows that came from one set."""

    name: str
    weight: int | float
    rows: range


class Mixture(Sequence[Example]):
    """Sets one after the other, each with its share of the prompts; ids become `set/id`."""

    def __init__(
        self, sources: Mapping[str, Sequence[Example]], weights: Mapping[str, int | float]
    ):
        if not sources or sources.keys() != weights.keys():
            raise ValueError(f"a mixture of {list(sources)} needs the weight of each")
        for name, weight in weights.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"the weight of {name} is {weight}; it must be positive")
        self._sources = list(sources.values())
        ends = np.cumsum([len(source) for source in self._sources]).tolist()
        self.parts = [
            Part(name, weights[name], range(end - len(source), end))
            for (name, source), end in zip(sources.items(), ends, strict=True)
        ]

    def __len__(self) -> int:
        return self.parts[-1].rows.stop

    def __getitem__(self, index: Any) -> Any:  # an Example; slices are not supported
        row = range(len(self))[index]
        for part, source in zip(self.parts, self._sources, strict=True):
            if row in part.rows:
                example = source[row - part.rows.start]
                return example._replace(id=f"{part.name}/{example.id}")
        raise AssertionError


def load_train(dataset: Dataset, data_dir: str) -> Sequence[Example]:
    """The training split of a set, or of each set of a mixture."""
    if isinstance(dataset, str):
        return load(dataset, data_dir, "train")
    return Mixture({name: load(name, data_dir, "train") for name in dataset}, dataset)


class Stage(NamedTuple):
    """Steps with one pool of prompts: an endless stream of their rows, in shuffled passes."""

    first_step: int
    stream: grain.MapDataset
    pools: dict[str, tuple[int, float]]  # of each set: prompts, share

    def passes(self, drawn: int) -> dict[str, int]:
        """Complete passes over each set after so many prompts; of a mixture's to one prompt."""
        return {name: int(drawn * share) // size for name, (size, share) in self.pools.items()}


def stages(
    source: Sequence[Example], kept: Sequence[int], curriculum: Curriculum | None, seed: int
) -> list[Stage]:
    """The stages of a run over the rows `kept`: one, unless the curriculum makes more.

    A stage begins wherever some prompt joins or leaves, with fresh passes over what is left.
    """
    parts = source.parts if isinstance(source, Mixture) else [Part("", 1.0, range(len(source)))]
    allowed = {row: curriculum(source[row]) if curriculum else ALWAYS for row in kept}
    edges = {0} | {edge for steps in allowed.values() for edge in (steps.start, steps.stop)}
    made: list[Stage] = []
    for first_step in sorted(edge for edge in edges if 0 <= edge < ALWAYS.stop):
        rows = [row for row in kept if first_step in allowed[row]]
        pools = [(part, [row for row in rows if row in part.rows]) for part in parts]
        pools = [(part, pool) for part, pool in pools if pool]
        if not pools:
            raise ValueError(f"the curriculum leaves no prompt from step {first_step} on")
        total = sum(part.weight for part, _ in pools)
        streams = [
            # Grain shuffles pass e with seed + e: without spreading, pass 1 of seed 0 would be
            # pass 0 of seed 1, and runs that differ in the seed would see the same orders.
            grain.MapDataset.source(pool)
            .shuffle(seed=_spread(seed, len(made), parts.index(part)))
            .repeat()
            for part, pool in pools
        ]
        mixed = streams[0]
        if len(streams) > 1:
            mixed = grain.MapDataset.mix(streams, [part.weight for part, _ in pools])
        sizes = {part.name: (len(pool), part.weight / total) for part, pool in pools}
        made.append(Stage(first_step, mixed, sizes))
    return made


def _spread(seed: int, stage: int, part: int) -> int:
    entropy = (seed, stage, part) if stage or part else seed
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])
