"""The same step on more and more chips: what falls as it should, and what does not."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from dppo_jax.kernels.chips import GIB
from dppo_jax.plan.kept import Kept
from dppo_jax.plan.programs import Settings
from dppo_jax.plan.report import table
from dppo_jax.plan.step_plan import Report, StepPlan, plan_step
from dppo_jax.plan.topology import Topology

PROGRAMS = ("decode", "update")


def spread(settings: Settings, chips: int) -> Settings:
    """The settings on so many chips: the recipe's tensor and expert axes, rows over the rest.

    Where there are more chips than prompts in a gradient step, the columns of a sequence are split
    further; where fewer, as many microbatches as leave each group of chips one prompt at a time.
    Where a rollout batch has too few prompts for all of them, there are fewer, larger ones.
    """
    s, mesh = settings, settings.mesh
    if s.sampler_devices:
        raise ValueError("--scaling is of steps on one mesh: leave sampler_devices at 0")
    prompts = s.prompts_per_step // s.minibatches
    sequence = mesh.sequence
    while (rows := chips // (mesh.tensor * sequence)) > prompts:
        sequence *= 2
    if rows * mesh.tensor * sequence != chips or rows % mesh.expert or prompts % rows:
        raise ValueError(
            f"{chips} chips do not take {prompts} prompts of a gradient step over tensor="
            f"{mesh.tensor} x expert={mesh.expert}: choose other slices, or another mesh"
        )
    mesh = dataclasses.replace(mesh, data=1, fsdp=rows // mesh.expert, sequence=sequence)
    batches = s.rollout_batches
    while s.prompts_per_step // batches % rows and batches % 2 == 0:
        batches //= 2
    return dataclasses.replace(s, mesh=mesh, microbatches=prompts // rows, rollout_batches=batches)


def scale(
    settings: Settings,
    topologies: Sequence[Topology],
    report: Report = lambda line: None,
    kept: Kept | None = None,
    code: bool = True,
) -> list[StepPlan]:
    """Decode and update of one and the same step on each topology."""
    spreads = [spread(settings, t.chips) for t in topologies]  # all of them before any compiles
    return [
        plan_step(s, topology, PROGRAMS, report, kept, code)
        for s, topology in zip(spreads, topologies, strict=True)
    ]


def rows_of(plans: Sequence[StepPlan]) -> list[dict[str, Any]]:
    """A row for each program and topology; `flops_share` is 1 where flops fall as 1/chips."""
    found = []
    for name in PROGRAMS:
        first = None
        for plan in plans:
            program = next(p for p in plan.programs if p.name == name)
            # A device's flops in a step, over all of its gradient steps.
            work = program.flops * program.runs * plan.topology.chips
            first = first if first is not None else work
            found.append(
                {
                    "program": name,
                    "topology": plan.topology.name,
                    "chips": plan.topology.chips,
                    "mesh": plan.mesh,
                    "microbatches": plan.settings.microbatches,
                    "flops": program.flops * program.runs,
                    "flops_share": work / first if first else None,
                    "bytes": program.total,
                    "fits": program.fits,
                    "sent": program.sent * program.runs,
                    "seconds": program.seconds * program.runs if program.refused is None else None,
                }
            )
    return found


def exceptions(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What does not go as it should from one slice to the next larger one.

    Flops a chip fall as 1/chips within a tenth, memory falls, and a chip sends at the most twice
    what it sends on the first.
    """
    found = []
    for name in PROGRAMS:
        of = [row for row in rows if row["program"] == name and row["seconds"] is not None]
        for before, row in zip(of, of[1:], strict=False):
            where = f"{name} on {row['chips']} chips"
            if row["flops_share"] is not None and abs(row["flops_share"] - 1) > 0.1:
                found.append(f"{where}: flops a chip are {row['flops_share']:.2f} of 1/chips")
            if row["bytes"] >= before["bytes"]:
                found.append(f"{where}: memory a chip does not fall")
            if row["sent"] > 2 * of[0]["sent"]:
                more = row["sent"] / of[0]["sent"] if of[0]["sent"] else math.inf
                found.append(f"{where}: a chip sends {more:.1f} times what it does on the first")
    return found


def text_of(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table, and under it what does not go as it should."""
    head = ("program", "chips", "mesh", "TFLOP a chip", "of 1/chips", "GiB a chip", "GB sent", "s")
    lines = [head]
    for row in rows:
        mesh = " x ".join(f"{axis}={size}" for axis, size in row["mesh"].items())
        known = row["seconds"] is not None
        lines.append(
            (
                row["program"],
                str(row["chips"]),
                mesh,
                f"{row['flops'] / 1e12:.4g}" if known else "?",
                f"{row['flops_share']:.3f}" if known and row["flops_share"] else "?",
                f"{row['bytes'] / GIB:.1f}" + ("" if row["fits"] else " too much"),
                f"{row['sent'] / 1e9:.4g}" if known else "?",
                f"{row['seconds']:.4g}" if known else "?",
            )
        )
    found = exceptions(rows) or ["flops and memory a chip fall, and what it sends is bounded"]
    return "\n".join([table(lines), "", *found])
