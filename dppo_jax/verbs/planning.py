"""The verb that plans: dppo plan."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dppo_jax.verbs.command import GIN, GIVEN, Failure, add_verb


def add(verbs: Any) -> None:
    """Adds it to the parser's verbs."""
    plan = add_verb(
        verbs,
        "plan",
        _plan,
        "Compile a recipe's programs for hardware that is not here, TPUs by libtpu, GPUs by JAX's "
        "CUDA plugin where it is installed: memory, work, transfers, seconds and cost of a step, "
        f"and what to change where it does not fit (exit status 1); {GIN}.",
        "dppo plan configs/recipes/qwen3_8b_base.gin --topology v5p:4x4x4 --price 4.2\n"
        "         dppo plan configs/recipes/qwen3_8b_base.gin --topology h100:8 \\\n"
        "           --over configs/mesh/h100_8.gin\n"
        "         dppo plan configs/recipes/qwen3_8b_base.gin --scaling v5p:2x2x4,v5p:4x4x4",
    )
    plan.add_argument("recipe", help="a .gin file")
    where = plan.add_mutually_exclusive_group(required=True)
    where.add_argument("--topology", help="v5p:4x4x4, v6e:8x8, h100:8, ...")
    where.add_argument(
        "--scaling",
        metavar="TOPOLOGIES",
        help="by commas: decode and update of the same step on each, as a table",
    )
    plan.add_argument(
        "--over", nargs="+", default=[], metavar="GIN", help="files laid over the recipe"
    )
    plan.add_argument("--price", type=float, help="US dollars a chip and hour")
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.add_argument("-o", "--output", metavar="FILE", help="write the plan to a file too")
    plan.add_argument(
        "--kept",
        metavar="DIR",
        help="keep each program's numbers in this folder, and compile none that are there",
    )
    plan.add_argument(
        "--no-code",
        action="store_true",
        help="stop compiling where memory is assigned, several times sooner: without the size of "
        "the machine code and the compiler's seconds",
    )
    plan.add_argument(
        "--no-suggestions", action="store_true", help="compile no changes where it does not fit"
    )


def _plan(options: argparse.Namespace) -> None:
    from dppo_jax.plan import topology

    if options.price is not None and options.price < 0:
        raise ValueError(f"--price {options.price} must not be negative")
    named = [topology.parse(name) for name in (options.topology or options.scaling).split(",")]
    topology.prepare(named)  # before JAX is imported
    from dppo_jax.config import load_recipe, split_overrides
    from dppo_jax.plan.programs import Settings
    from dppo_jax.train import train

    overrides, _ = split_overrides(options.overrides)
    recipe = load_recipe(options.recipe, train, overrides, GIVEN, options.over)
    settings = Settings(**recipe.arguments(*Settings.names()))
    if options.scaling:
        _scale(options, settings, named)
    elif len(named) > 1:
        raise ValueError("--topology takes one; --scaling compares several")
    else:
        _plan_one(options, settings, named[0])


def _plan_one(options: argparse.Namespace, settings: Any, topology: Any) -> None:
    from dppo_jax.plan.report import text_of
    from dppo_jax.plan.step_plan import plan_step
    from dppo_jax.plan.suggest import suggestions

    kept = _kept(options)
    code = not options.no_code
    plan = plan_step(settings, topology, report=_say, kept=kept, code=code)
    found = plan.as_dict(options.price)
    text = text_of(plan, options.price)
    if not plan.fits and not options.no_suggestions:
        tried = []
        for each in suggestions(plan, _say, kept):
            _say(str(each))
            tried.append(each)
        found["suggestions"] = [vars(each) for each in tried]
        text += "\n\nchanges, each compiled:\n" + ("\n".join(map(str, tried)) or "none helps")
    _write(options, found, text)
    if not plan.fits:
        worst = max(plan.programs, key=lambda p: p.total)
        raise Failure(
            f"{worst.name} needs {worst.total / 2**30:.1f} GiB a device of {topology.name}, which "
            f"has {worst.hbm / 2**30:.1f}"
        )


def _scale(options: argparse.Namespace, settings: Any, topologies: Any) -> None:
    from dppo_jax.plan import scaling

    rows = scaling.rows_of(
        scaling.scale(settings, topologies, _say, _kept(options), not options.no_code)
    )
    _write(options, {"scaling": rows}, scaling.text_of(rows))


def _asked(options: argparse.Namespace) -> str:
    """The command, less where its numbers go."""
    one = "topology" if options.topology else "scaling"
    words = ["dppo plan", options.recipe, f"--{one}", getattr(options, one)]
    words += ["--over", *options.over] if options.over else []
    words += options.overrides
    words += ["--no-code"] if options.no_code else []
    words += [f"--price {options.price:g}"] if options.price is not None else []
    return " ".join(words)


def _kept(options: argparse.Namespace) -> Any:
    from dppo_jax.plan.kept import Kept

    return Kept(Path(options.kept)) if options.kept else None


def _write(options: argparse.Namespace, found: dict[str, Any], text: str) -> None:
    written = json.dumps(found) if options.json else f"{_asked(options)}\n\n{text}"
    print(written)
    if options.output:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(written + "\n")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
