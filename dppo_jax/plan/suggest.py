"""What to change where a step does not fit, each change compiled before it is told."""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dppo_jax.kernels.chips import GIB
from dppo_jax.plan.engine import engine_of
from dppo_jax.plan.kept import Kept
from dppo_jax.plan.programs import Settings
from dppo_jax.plan.step_plan import Report, StepPlan, plan_step
from dppo_jax.sampling.rollouts import Continuous


@dataclass
class Suggestion:
    """A change, as options of the command line, and what the programs need with it."""

    change: str
    programs: dict[str, dict[str, float]]  # bytes a device before and after, of those that failed
    fits: bool  # those programs; the others were compiled without the change

    def __str__(self) -> str:
        parts = [
            f"{name} {each['after'] / GIB:.1f} GiB instead of {each['before'] / GIB:.1f}"
            for name, each in self.programs.items()
        ]
        return f"{self.change}: {'fits' if self.fits else 'does not fit'} ({'; '.join(parts)})"


def suggestions(
    plan: StepPlan, report: Report = lambda line: None, kept: Kept | None = None
) -> Iterator[Suggestion]:
    """Changes that make the programs that do not fit smaller, those that cost least first."""
    failed = {program.name: program.total for program in plan.programs if not program.fits}
    for change, settings in _changes(plan, set(failed)):
        try:
            tried = plan_step(settings, plan.topology, tuple(failed), report, kept, plan.code)
        except ValueError:
            continue  # sizes that do not divide
        found = {
            program.name: {"before": failed[program.name], "after": program.total}
            for program in tried.programs
        }
        if any(each["after"] < each["before"] for each in found.values()):
            yield Suggestion(change, found, tried.fits)


def _changes(plan: StepPlan, failed: set[str]) -> Iterator[tuple[str, Settings]]:
    s = plan.settings

    def changed(name: str, value: Any, **fields: Any) -> tuple[str, Settings]:
        return f"--gin.{name}={value}", dataclasses.replace(s, **fields)

    trains, samples = "update" in failed, bool(failed & {"prefill", "recompute", "decode"})
    engine = engine_of(s.rollouts)
    if s.model.dtype == "float32":
        model = dataclasses.replace(s.model, dtype="bfloat16")
        yield changed("decoder.DecoderConfig.dtype", "bfloat16", model=model)
    if trains and not s.model.remat:
        model = dataclasses.replace(s.model, remat=True)
        yield changed("decoder.DecoderConfig.remat", True, model=model)
    if trains and s.tokens_per_microbatch is not None:
        half = s.tokens_per_microbatch // 2
        yield changed("train.train.tokens_per_microbatch", half, tokens_per_microbatch=half)
    elif trains:
        twice = 2 * s.microbatches
        yield changed("train.train.microbatches", twice, microbatches=twice)
    if samples and engine is not None:
        half = engine.slots // 2
        smaller = functools.partial(Continuous, config=dataclasses.replace(engine, slots=half))
        yield changed("engine.EngineConfig.slots", half, rollouts=smaller)
    elif samples:
        twice = 2 * s.rollout_batches
        yield changed("train.train.rollout_batches", twice, rollout_batches=twice)
    sizes = s.mesh.sizes(plan.topology.chips)
    for axis in ("sequence", "tensor"):
        if sizes["fsdp"] % 2 == 0:
            fewer, more = sizes["fsdp"] // 2, 2 * sizes[axis]
            mesh = dataclasses.replace(s.mesh, fsdp=fewer, **{axis: more})
            name = "sharding.MeshConfig"
            yield changed(f"{name}.fsdp", f"{fewer} --gin.{name}.{axis}={more}", mesh=mesh)
    if failed - {"update"}:
        half = s.prompts_per_step // 2
        yield changed("train.train.prompts_per_step", half, prompts_per_step=half)
