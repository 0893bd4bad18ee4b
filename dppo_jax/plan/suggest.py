"""What to change where a step does not fit, each change compiled before it is told."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dppo_jax.kernels.chips import GIB
from dppo_jax.plan.engine import engine_of
from dppo_jax.plan.kept import Kept
from dppo_jax.plan.programs import Settings
from dppo_jax.plan.step_plan import Report, StepPlan, plan_step
from dppo_jax.sampling.rollouts import Continuous

SAMPLING = frozenset({"prefill", "recompute", "decode"})
MOST_DOUBLINGS = 4


@dataclass
class Suggestion:
    """A change, as options of the command line, and what the programs need with it."""

    change: str
    programs: dict[str, dict[str, float]]  # bytes a device before and after, of those it is for
    fits: bool  # all programs that did not; the others were compiled without the change
    hbm: float

    def __str__(self) -> str:
        parts = [
            f"{name} {each['after'] / GIB:.1f} GiB instead of {each['before'] / GIB:.1f}, "
            + ("fits" if each["after"] <= self.hbm else "does not fit")
            for name, each in self.programs.items()
        ]
        return f"{self.change}: {'; '.join(parts)}"


@dataclass(frozen=True)
class _Change:
    option: str
    fields: dict[str, Any]  # of the settings

    def of(self, settings: Settings) -> Settings:
        return dataclasses.replace(settings, **self.fields)

    def __add__(self, other: "_Change") -> "_Change":
        return _Change(f"{self.option} {other.option}", self.fields | other.fields)


def suggestions(
    plan: StepPlan, report: Report = lambda line: None, kept: Kept | None = None
) -> Iterator[Suggestion]:
    """Changes that make the programs that do not fit smaller, those that cost least first.

    Each is made stronger until its programs fit or it helps no more. Last, where no change alone
    makes all programs fit, those together that each make one fit.
    """
    hbm = plan.topology.chip.hbm_bytes
    failed = {program.name: program.total for program in plan.programs if not program.fits}
    fitting: dict[str, _Change] = {}

    def tried(change: _Change, names: list[str]) -> Suggestion | None:
        settings, only = change.of(plan.settings), tuple(names)
        try:
            made = plan_step(settings, plan.topology, only, report, kept, plan.code)
        except ValueError:
            return None  # sizes that do not divide
        after = {program.name: program.total for program in made.programs}
        found = {name: {"before": failed[name], "after": after[name]} for name in names}
        fits = all(after.get(name, total) <= hbm for name, total in failed.items())
        return Suggestion(change.option, found, fits, hbm)

    solved = False
    for of, changes in _knobs(plan, set(failed), fitting):
        names = [name for name in failed if name in of]
        least = {name: failed[name] for name in names}
        for change in changes:
            found = tried(change, names)
            after = {name: each["after"] for name, each in found.programs.items()} if found else {}
            if found is None or not any(after[name] < least[name] for name in names):
                break
            yield found
            least, solved = after, solved or found.fits
            for name in names:
                if after[name] <= hbm:
                    fitting.setdefault(name, change)
            if all(after[name] <= hbm for name in names):
                break
    together = list({change.option: change for change in fitting.values()}.values())
    if not solved and len(fitting) == len(failed) and len(together) > 1:
        found = tried(functools.reduce(_Change.__add__, together), list(failed))
        if found is not None:
            yield found


def _knobs(
    plan: StepPlan, failed: set[str], fitting: Mapping[str, _Change]
) -> Iterator[tuple[set[str], Iterator[_Change]]]:
    """The programs that a knob is for, and its settings, weaker ones first.

    `fitting`, which grows meanwhile, are those that fit by a knob before.
    """
    s = plan.settings
    trains, samples = failed & {"update"}, failed & SAMPLING
    engine = engine_of(s.rollouts)
    if s.model.dtype == "float32":
        model = dataclasses.replace(s.model, dtype="bfloat16")
        yield failed, _once("decoder.DecoderConfig.dtype", "bfloat16", model=model)
    if trains and not s.model.remat:
        model = dataclasses.replace(s.model, remat=True)
        yield trains, _once("decoder.DecoderConfig.remat", True, model=model)
    if trains and s.tokens_per_microbatch is not None:
        yield trains, _series("tokens_per_microbatch", s.tokens_per_microbatch, more=False)
    elif trains:
        yield trains, _series("microbatches", s.microbatches)
    if samples and engine is not None:
        yield samples, _fewer_slots(engine)
    elif samples:
        yield samples, _series("rollout_batches", s.rollout_batches)
    sizes = s.mesh.sizes(plan.training)
    for axis in ("sequence", "tensor"):
        if sizes["fsdp"] % 2 == 0:
            fewer, more = sizes["fsdp"] // 2, 2 * sizes[axis]
            mesh = dataclasses.replace(s.mesh, fsdp=fewer, **{axis: more})
            name = "sharding.MeshConfig"
            option = f"{fewer} --gin.{name}.{axis}={more}"
            yield failed, _once(f"{name}.fsdp", option, mesh=mesh)
    if failed - {"update"} - fitting.keys():  # which is another run
        yield failed - {"update"}, _series("prompts_per_step", s.prompts_per_step, more=False)


def _once(name: str, value: Any, **fields: Any) -> Iterator[_Change]:
    yield _Change(f"--gin.{name}={value}", fields)


def _series(field: str, value: int, more: bool = True) -> Iterator[_Change]:
    """A setting of `train` doubled again and again, or halved."""
    for _ in range(MOST_DOUBLINGS):
        value = 2 * value if more else value // 2
        if value == 0:
            return
        yield from _once(f"train.train.{field}", value, **{field: value})


def _fewer_slots(engine: Any) -> Iterator[_Change]:
    for _ in range(min(MOST_DOUBLINGS, engine.slots.bit_length() - 1)):
        engine = dataclasses.replace(engine, slots=engine.slots // 2)
        rollouts = functools.partial(Continuous, config=engine)
        yield from _once("engine.EngineConfig.slots", engine.slots, rollouts=rollouts)
