"""One program compiled: what it needs of a device's memory, and what it costs."""

import dataclasses
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
from jax.interpreters import mlir

from dppo_jax.kernels.chips import bytes_asked_for
from dppo_jax.plan import assigned
from dppo_jax.plan.abstract import bytes_of
from dppo_jax.plan.hlo import Costs, costs_of
from dppo_jax.plan.kept import Kept
from dppo_jax.plan.programs import Program
from dppo_jax.plan.topology import Topology


@dataclass
class Compiled:
    """A program of one device. Bytes; seconds of one run.

    Where the compiler refuses for want of memory, `refused` is what it said that it needs, and
    nothing else is known. `compiler_seconds` is XLA's `optimal_seconds`, its loops weighed by the
    compiler's cycle estimates; None where it has none.
    """

    name: str
    runs: int
    loop_trips: int
    outer_trips: int | None
    hbm: float
    resident: float
    cache: float = 0.0
    arguments: float = 0.0
    temporaries: float = 0.0
    output: float = 0.0  # beyond the arguments' own memory
    code: float = 0.0
    refused: float | None = None
    flops: float = 0.0
    moved: float = 0.0
    collectives: dict[str, dict[str, float]] = field(default_factory=dict)
    sent: float = 0.0
    far: float = 0.0  # of what is sent, to other nodes
    roofline_seconds: float = 0.0
    compiler_seconds: float | None = None
    compile_seconds: float = 0.0

    @property
    def total(self) -> float:
        """Bytes a device while it runs."""
        if self.refused is not None:
            return self.resident + self.refused
        return self.resident + self.arguments + self.temporaries + self.output + self.code

    @property
    def fits(self) -> bool:
        return self.total <= self.hbm

    @property
    def seconds(self) -> float:
        """The larger of the two estimates of a run."""
        return max(self.roofline_seconds, self.compiler_seconds or 0.0)

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "total": self.total,
            "fits": self.fits,
            "left": self.hbm - self.total,
        }


def compile_program(
    program: Program, topology: Topology, kept: Kept | None = None, code: bool = True
) -> Compiled:
    """Compiles for the topology, under the mesh that is set, unless it is `kept`.

    Without `code` no further than memory is assigned, by `assigned.measured`, which see.
    """
    chip = topology.chip
    result = Compiled(
        program.name,
        program.runs,
        program.loop_trips,
        program.outer_trips,
        chip.hbm_bytes,
        program.resident,
        program.cache,
    )
    started = time.monotonic()
    traced = program.function.trace(*program.arguments, **program.keywords)
    if topology.estimated:
        _sum_in_steps()
    lowered = traced.lower(lowering_platforms=("tpu" if topology.platform == "tpu" else "cuda",))
    order = [device.id for device in jax.sharding.get_mesh().devices.flat]
    trips = program.loop_trips, program.outer_trips
    name = kept and kept.name_of(lowered.as_text(), topology, order, *trips)
    known = kept.read(name, code) if kept and name else None
    if known is None:
        known = numbers, text = _compiled(lowered, code)
        numbers["compile_seconds"] = time.monotonic() - started
        if kept and name:
            kept.write(name, code, numbers, text)
    numbers, text = known
    if "refused" in numbers:
        return dataclasses.replace(result, **numbers)
    result = dataclasses.replace(result, **_with_costs(numbers, text, program, topology))
    # Arguments that it does not use are not handed to it, but live.
    result.resident += max(0.0, bytes_of(program.arguments) - result.arguments)
    return result


def _sum_in_steps() -> None:
    """Cumulative sums for GPUs as for other platforms, in this process from now on.

    JAX 0.12 makes one operation of them, at which the CPU's compiler, asked for a GPU's program,
    ends the process.
    """

    def sums(x, *, axis: int, reverse: bool):
        return jax.lax.associative_scan(jax.lax.add, x, reverse=reverse, axis=axis)

    lowering = mlir.lower_fun(sums, multiple_results=False)
    mlir.register_lowering(jax.lax.cumsum_p, lowering, platform="cuda")


def _compiled(lowered: Any, code: bool) -> tuple[dict[str, Any], str]:
    """What compiling tells: fields of `Compiled`, and the program's HLO text."""
    try:
        if not code:
            return assigned.measured(lowered)
        memory, compiled = assigned.compiled(lowered)
        optimal = (compiled.cost_analysis() or {}).get("optimal_seconds", -1.0)
        return memory | {"compiler_seconds": optimal if optimal > 0 else None}, compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        refused = bytes_asked_for(str(error))
        if refused is None:
            raise
        return {"refused": refused}, ""


def _with_costs(
    numbers: dict[str, Any], text: str, program: Program, topology: Topology
) -> dict[str, Any]:
    """Those numbers, the compiler's seconds with every loop as often as it runs; and all costs."""
    chip, node = topology.chip, topology.node
    total, once = costs_of(
        text, chip, unknown_trips=program.loop_trips, outer_trips=program.outer_trips, node=node
    )
    optimal = numbers.get("compiler_seconds")
    return numbers | {
        "flops": total.flops,
        "moved": total.bytes,
        "sent": total.sent,
        "far": total.far,
        "collectives": {kind: asdict(moved) for kind, moved in sorted(total.collectives.items())},
        "roofline_seconds": total.roofline(chip, node),
        "compiler_seconds": optimal and optimal * _loops(total, once),
    }


def _loops(total: Costs, once: Costs) -> float:
    """How much longer a program takes than with each loop's body run once."""
    if once.cycles:
        return total.cycles / once.cycles
    return total.seconds / once.seconds if once.seconds else 1.0
