"""A plan as a table for people."""

from collections.abc import Callable, Sequence

from dppo_jax.kernels.chips import GIB
from dppo_jax.plan.apart import IN, OUT, Sides
from dppo_jax.plan.compiling import Compiled
from dppo_jax.plan.engine import engine_of
from dppo_jax.plan.step_plan import StepPlan
from dppo_jax.sampling.rollouts import Lockstep

Cell = Callable[[Compiled], str]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns under each other: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join(line(row) for row in rows)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def text_of(plan: StepPlan, price: float | None = None) -> str:
    """Memory, work and seconds of each program, and of the step."""
    programs = plan.programs

    def row(name: str, cell: Cell, known: bool = True) -> list[str]:
        """`known`: of compiled programs only."""
        return [name, *(cell(p) if not known or p.refused is None else "?" for p in programs)]

    def sent(kind: str) -> Cell:
        def cell(p: Compiled) -> str:
            moved = p.collectives.get(kind)
            return f"{moved['bytes'] / 1e9:.3g} ({moved['count']:.0f})" if moved else "0"

        return cell

    node = plan.topology.node
    kinds = sorted({kind for program in programs for kind in program.collectives})
    rows = [
        ["", *(p.name for p in programs)],
        row("runs a step", lambda p: str(p.runs), known=False),
        row("GiB: arguments", lambda p: _gib(p.arguments)),
        row("  temporaries", lambda p: _gib(p.temporaries)),
        row("  of them cache", lambda p: _gib(p.cache), known=False),
        row("  output", lambda p: _gib(p.output)),
        row("  program", lambda p: _gib(p.code)),
        row("  waiting beside it", lambda p: _gib(p.resident), known=False),
        row("  in all", lambda p: _gib(p.total), known=False),
        row("fits", lambda p: "yes" if p.fits else "NO", known=False),
        row("  GiB left", lambda p: _gib(p.hbm - p.total), known=False),
        row("TFLOP", lambda p: f"{p.flops / 1e12:.4g}"),
        row("GB to and from HBM", lambda p: f"{p.moved / 1e9:.4g}"),
        *(row(f"GB sent, {kind} (number)", sent(kind)) for kind in kinds),
        *([row("GB sent to other nodes", lambda p: f"{p.far / 1e9:.3g}")] if node else []),
        row("seconds, roofline", lambda p: _seconds(p.roofline_seconds)),
        row("seconds, compiler", lambda p: _seconds(p.compiler_seconds)),
        row("compiled in, s", lambda p: f"{p.compile_seconds:.0f}", known=False),
    ]
    return "\n".join([_title(plan), "", table(rows), "", *_step(plan, price)])


def _title(plan: StepPlan) -> str:
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items()) or "one device"
    kind = "GPUs" if plan.topology.platform == "gpu" else "chips"
    title = (
        f"{plan.topology.name}: {plan.topology.chips} {kind} of "
        f"{_gib(plan.topology.chip.hbm_bytes)} GiB, mesh {mesh}; all numbers are of one of them"
    )
    if sides := plan.sides:
        title += (
            f"\n{sides.training} train on that mesh (weight sync, {OUT}, scoring, update), "
            f"{sides.sampling} sample ({IN}, the others)"
        )
    return title


def _overlap(sides: Sides, plan: StepPlan) -> list[str]:
    found = sides.seconds(plan.programs)
    how = f"{sides.depth} ahead, the longer of the two" if sides.depth else "in turn, their sum"
    return [
        f"both sides {how}: trainer {_seconds(found['trainer'])} s, sampler "
        f"{_seconds(found['sampler'])} with {sides.sent / 1e9:.3g} GB of weights sent in "
        f"{_seconds(sides.copy_seconds)}",
        f"idle: trainer {found['trainer_idle']:.0%}, sampler {found['sampler_idle']:.0%}",
    ]


def _step(plan: StepPlan, price: float | None) -> list[str]:
    s = plan.settings
    lines = []
    if plan.known:
        parts = ", ".join(f"{p.name} {_seconds(p.runs * p.seconds)}" for p in plan.programs)
        lines = [
            f"a step: {plan.step_seconds:.1f} s ({parts})",
            *(_overlap(plan.sides, plan) if plan.sides else []),
            f"tokens a second a chip: {plan.tokens_per_second_per_chip:.1f} "
            f"({s.tokens_a_step:,} response tokens a step)",
        ]
        if price is not None:
            cost = plan.cost(price)
            lines.append(
                f"cost at {price:g} USD a chip and hour: {cost['step']:.2f} USD a step, "
                f"{cost['run']:,.0f} USD for {s.steps} steps"
            )
    lines += [
        "Loops count as often as they run. Seconds are the larger of the compiler's estimate and",
        "the roofline's (each operation at a peak of the chip, transfers hidden behind them), with",
        "every response at its longest and every token decoded against the full cache; grading",
        "and the host are left out. Nothing was run.",
    ]
    if not plan.code and plan.topology.platform == "tpu":
        lines.append(
            "No machine code was made (--no-code): its size is that of constants, and seconds are "
            "the roofline's."
        )
    if engine_of(s.rollouts) is not None:
        lines.append(
            "Sampling is the engine's, all slots busy and each prompt computed once; recompute is "
            "of sequences\nwhose pages were given to others, which a step with enough of them "
            "never does."
        )
    elif s.rollouts is not Lockstep:
        lines.append(
            "The recipe samples by another source; prefill and decode are the lockstep sampler's."
        )
    if node := plan.topology.node:
        by = (
            "Memory and work are an estimate: as XLA's CPU compiler assigns and orders them for as "
            "many devices,\nbfloat16 kept. A GPU's own kernels (its attention keeps no scores) and "
            "fusions are not in it."
            if plan.topology.estimated
            else "Memory and work are those of XLA's GPU compiler (JAX's CUDA plugin), which could "
            "measure nothing:\nevery product is cuBLAS's."
        )
        lines.append(
            f"{by} Links are\nNVLink's in a node of {node.devices}, and "
            f"{node.network_bytes / 1e9:g} GB/s a card between nodes."
        )
    return lines
