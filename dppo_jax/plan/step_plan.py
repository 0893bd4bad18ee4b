"""A recipe's step on a topology: every program compiled, and what a step takes and costs."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import jax

from dppo_jax.kernels.chips import GIB
from dppo_jax.plan import apart, engine
from dppo_jax.plan.apart import ApartStep, Sides, side_of
from dppo_jax.plan.assigned import Ended, in_child
from dppo_jax.plan.compiling import Compiled, compile_program
from dppo_jax.plan.kept import Kept
from dppo_jax.plan.programs import Program, Settings, Step
from dppo_jax.plan.topology import Topology

Report = Callable[[str], None]


@dataclass
class StepPlan:
    """Programs in the order of a step, and what follows from them."""

    topology: Topology
    mesh: dict[str, int]
    settings: Settings
    programs: list[Compiled] = field(default_factory=list)
    code: bool = True  # whether programs were compiled to their end
    sides: Sides | None = None  # where some devices sample and the others train

    @property
    def training(self) -> int:
        """Devices of the mesh of the recipe."""
        return self.sides.training if self.sides else self.topology.chips

    @property
    def fits(self) -> bool:
        return all(program.fits for program in self.programs)

    @property
    def known(self) -> bool:
        """Whether every program was compiled, so that their seconds are known."""
        return all(program.refused is None for program in self.programs)

    @property
    def step_seconds(self) -> float:
        """Of one step: every response as long as may be, rewards and host work left out."""
        if self.sides:
            return self.sides.seconds(self.programs)["step"]
        return sum(program.runs * program.seconds for program in self.programs)

    @property
    def tokens_per_second_per_chip(self) -> float:
        return self.settings.tokens_a_step / self.step_seconds / self.topology.chips

    def cost(self, price: float) -> dict[str, float]:
        """US dollars at so much a chip and hour, of a step and of the whole run."""
        step = price * self.topology.chips * self.step_seconds / 3600
        return {"step": step, "run": step * self.settings.steps}

    def as_dict(self, price: float | None = None) -> dict[str, Any]:
        found: dict[str, Any] = {
            "topology": self.topology.name,
            "chips": self.topology.chips,
            "mesh": self.mesh,
            "hbm_bytes": self.topology.chip.hbm_bytes,
            "estimated_memory": self.topology.estimated,
            "fits": self.fits,
            "programs": {program.name: program.as_dict() for program in self.programs},
            "tokens_a_step": self.settings.tokens_a_step,
        }
        if self.sides:
            found["sides"] = asdict(self.sides)
            for name, program in found["programs"].items():
                program["side"] = side_of(name)
        if self.known:
            if self.sides:
                found["sides"]["seconds"] = self.sides.seconds(self.programs)
            found["step_seconds"] = self.step_seconds
            found["tokens_per_second_per_chip"] = self.tokens_per_second_per_chip
            if price is not None:
                found["cost"] = self.cost(price)
        return found


def plan_step(
    settings: Settings,
    topology: Topology,
    only: tuple[str, ...] | None = None,
    report: Report = lambda line: None,
    kept: Kept | None = None,
    code: bool = True,
) -> StepPlan:
    """Compiles the programs of a step (or `only` some) for the topology, those that are not `kept`.

    ValueError where the recipe's sizes do not fit the mesh, or the mesh the topology. Without
    `code`, and for GPUs, no further than memory is assigned, each program in a process of its own:
    before JAX has a backend in this one.
    """
    code = code and topology.platform == "tpu"
    sides = _sides(settings, topology) if settings.sampler_devices else None
    plan = StepPlan(topology, {}, settings, code=code, sides=sides)
    sizes = settings.mesh.sizes(plan.training)
    plan.mesh = {axis: n for axis, n in sizes.items() if n > 1}
    step: Step | None = None
    for name in engine.names(settings) if sides is None else apart.names(settings):
        if only is not None and name not in only:
            continue
        if sides:
            found = _apart(partial(_numbers_apart, settings, topology, name, kept, code), topology)
            if not found:
                continue
            compiled = Compiled(**found)
        elif code:
            step = step or _step(settings, topology)
            compiled = _compiled(step, engine.program(step, name), topology, kept, code)
        else:
            compiled = Compiled(**in_child(partial(_numbers, settings, topology, name, kept)))
        plan.programs.append(compiled)
        report(
            f"{topology.name} {name}: {compiled.total / GIB:.1f} of {compiled.hbm / GIB:.1f} "
            f"GiB, compiled in {compiled.compile_seconds:.0f} s"
        )
    return plan


def _step(settings: Settings, topology: Topology) -> Step:
    return Step(settings, settings.mesh.build(topology.devices()))


def _numbers(
    settings: Settings, topology: Topology, name: str, kept: Kept | None
) -> dict[str, Any]:
    """Of a program that is compiled until memory is assigned: fields of `Compiled`."""
    step = _step(settings, topology)
    return asdict(_compiled(step, engine.program(step, name), topology, kept, code=False))


def _sides(settings: Settings, topology: Topology) -> Sides:
    return Sides(**_apart(lambda: asdict(ApartStep(settings, topology).sides()), topology))


def _numbers_apart(
    settings: Settings, topology: Topology, name: str, kept: Kept | None, code: bool
) -> dict[str, Any]:
    """The same of a program of one of two sides; nothing where the side has no such program."""
    both = ApartStep(settings, topology)
    program, step = both.program(name), both.step_of(name)
    return asdict(_compiled(step, program, topology, kept, code)) if program else {}


def _apart(function: Callable[[], dict[str, Any]], topology: Topology) -> dict[str, Any]:
    """In a process of its own: libtpu 0.0.42.1 ends it for parts of v5e's and v6e's slices."""
    try:
        return in_child(function)
    except Ended as error:
        raise ValueError(
            f"the compiler ended for a part of the devices of {topology.name}: set "
            "sampler_devices to 0, or plan for another topology"
        ) from error


def _compiled(
    step: Step, program: Program, topology: Topology, kept: Kept | None, code: bool
) -> Compiled:
    # The program was made without the mesh in force: optax makes an array or two.
    with jax.set_mesh(step.mesh):
        return compile_program(program, topology, kept, code)
