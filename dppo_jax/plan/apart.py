"""A step whose rollouts are drawn on devices of their own (`sampler_devices`).

trainer    weight sync, weights out (`elsewhere.Transfer` lays them out), scoring, update
sampler    weights in (it divides what has come), prefill, decode
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax

from dppo_jax.elsewhere import (
    Transfer,
    check_source,
    divide,
    lies_so,
    relaying,
    sampler_mesh,
)
from dppo_jax.plan import engine
from dppo_jax.plan.abstract import bytes_of, laid_out
from dppo_jax.plan.compiling import Compiled
from dppo_jax.plan.programs import Program, Settings, Step
from dppo_jax.plan.topology import Topology
from dppo_jax.rollout_policy import current
from dppo_jax.sharding import MeshConfig, check_divides

OUT, IN = "weights out", "weights in"
SAMPLERS = frozenset({IN, "prefill", "recompute", "decode"})


@dataclass(frozen=True)
class Sides:
    """How a topology is divided, and what goes from one side to the other in a step."""

    training: int  # devices
    sampling: int
    depth: int  # of rollouts ahead: 0 samples and trains in turn
    sent: float  # bytes of weights, to all that sample
    copy_seconds: float  # at the links' peak

    def seconds(self, programs: list[Compiled]) -> dict[str, float]:
        """Of a step: each side's work, that of the step, and the share in which each side waits.

        The sampler waits for its weights, so that their way counts as its own.
        """
        sides = {"trainer": 0.0, "sampler": self.copy_seconds}
        for program in programs:
            sides[side_of(program.name)] += program.runs * program.seconds
        step = max(sides.values()) if self.depth else sum(sides.values())
        idle = {f"{side}_idle": 1 - seconds / step for side, seconds in sides.items()}
        return {"step": step, **sides, **idle}


def side_of(name: str) -> str:
    """Whose program it is."""
    return "sampler" if name in SAMPLERS else "trainer"


def names(settings: Settings) -> list[str]:
    """Of the programs of a step, in its order."""
    first, *others = engine.names(settings)
    return [first, OUT, IN, *others]


class _Trainer(Step):
    """The devices that train: what they hold beside a program's own."""

    @property
    def held(self) -> float:
        """Bytes a device of weights that were cast to be sent, until others are."""
        leaves = zip(jax.tree.leaves(self.sampled_with), self.handed_on, strict=True)
        return sum(bytes_of(leaf) for leaf, source in leaves if source is None)

    @property
    def lives(self) -> float:
        """Bytes a device of what lives while weights are sent, those of the step before too."""
        return self.trained + 2 * self.held + self.ahead


class _Sampler(Step):
    """The devices that sample, with weights as they are sent there."""

    def __init__(self, home: Step, wanted: list[Any], mesh: Any, fresh: list[bool]):
        # Its devices know nothing of gradient steps, nor of what is done before weights are sent.
        alone = dataclasses.replace(
            home.settings, mesh=MeshConfig(fsdp=mesh.size), minibatches=1, microbatches=1,
            tokens_per_microbatch=None, rollout_policy=current(), async_depth=0,
        )  # fmt: skip
        super().__init__(alone, mesh)
        structure = jax.tree.structure(home.sampled_with)
        self.sampled_with = laid_out(home.sampled_with, jax.tree.unflatten(structure, wanted))
        leaves = zip(jax.tree.leaves(self.sampled_with), fresh, strict=True)
        self.version = sum(bytes_of(leaf) for leaf, new in leaves if new)
        self._depth = home.settings.async_depth

    @property
    def while_sampling(self) -> float:
        """Bytes a device of the weights of the rollouts that are to be drawn next."""
        return self._depth * self.version


class ApartStep:
    """The programs of both sides, one by one. ValueError as the run has it."""

    def __init__(self, settings: Settings, topology: Topology):
        s = settings
        sampling, training = divide(topology.devices(), s.sampler_devices, topology.host_of)
        self._topology = topology
        self._home = home = _Trainer(s, s.mesh.build(training))
        there = sampler_mesh(home.mesh, sampling, s.model.width)
        check_divides(
            there, "batch", {"prompts of a rollout": s.prompts_per_step // s.rollout_batches}
        )
        check_source(there, engine.engine_of(s.rollouts) is None)
        self._transfer = Transfer(home.mesh, there, home.model.policy_axes)
        leaves = jax.tree.leaves(home.sampled_with)
        courses = self._transfer.courses(home.sampled_with)
        # What the run finds to be the arrays that it has sent before: a base under adapters.
        given, frozen = jax.tree.leaves(home.policy), set(map(id, jax.tree.leaves(home.base)))
        fresh = [source is None or id(given[source]) not in frozen for source in home.handed_on]
        together = zip(leaves, courses, fresh, strict=True)
        self._sent = [(leaf, course) for leaf, course, new in together if new]
        self._there = _Sampler(home, [course.wanted for course in courses], there, fresh)

    def sides(self) -> Sides:
        """The division, and the bytes that it has sent every step."""
        sampling, training = self._there.mesh.size, self._home.mesh.size
        pieces = sum(bytes_of(leaf) for leaf in self._arriving())
        link = self._topology.chip.link_bytes
        return Sides(
            training, sampling, self._home.settings.async_depth, sampling * pieces,
            self._transfer.most_sent * pieces / link,
        )  # fmt: skip

    def step_of(self, name: str) -> Step:
        """The side that runs a program."""
        return self._there if name in SAMPLERS else self._home

    def program(self, name: str) -> Program | None:
        """The one of that name; None where the weights lie already as it would lay them out."""
        if name == OUT:
            asked = [(leaf, course.leaves) for leaf, course in self._sent]
            return _layer(name, asked, self._home.lives)
        if name == IN:
            come, wanted = self._arriving(), [course.wanted for _, course in self._sent]
            # Beside what has come: versions of rollouts to be drawn, or of the one before.
            there, depth = self._there, max(1, self._home.settings.async_depth)
            before = bytes_of(there.sampled_with) + (depth - 1) * there.version
            return _layer(name, list(zip(come, wanted, strict=True)), before + bytes_of(come))
        program = engine.program(self.step_of(name), name)
        if name in SAMPLERS:
            return program
        return dataclasses.replace(program, resident=program.resident + self._home.held)

    def _arriving(self) -> list[Any]:
        return [laid_out(leaf, course.arrives) for leaf, course in self._sent]


def _layer(name: str, asked: list[tuple[Any, Any]], lives: float) -> Program | None:
    """What lays arrays out as they are asked for: those that lie otherwise."""
    moved = [(leaf, goal) for leaf, goal in asked if not lies_so(leaf, goal)]
    if not moved:
        return None
    given = [leaf for leaf, _ in moved]
    return Program(name, relaying([goal for _, goal in moved]), (given,), lives - bytes_of(given))
