"""The verb that plans: dppo plan."""

import argparse
import json
import sys
from typing import Any

from dppo_jax.verbs.command import GIN, GIVEN, Failure, add_verb


def add(verbs: Any) -> None:
    """Adds it to the parser's verbs."""
    plan = add_verb(
        verbs,
        "plan",
        _plan,
        "Compile a recipe's programs for hardware that is not here, TPUs by libtpu: memory, work, "
        f"transfers, seconds and cost of a step; {GIN}. Exit status 1 where it does not fit.",
        "dppo plan configs/recipes/qwen3_8b_base.gin --topology v5p:4x4x4 --price 4.2",
    )
    plan.add_argument("recipe", help="a .gin file")
    plan.add_argument("--topology", help="v5p:4x4x4, v6e:8x8, h100:8, ...")
    plan.add_argument(
        "--over", nargs="+", default=[], metavar="GIN", help="files laid over the recipe"
    )
    plan.add_argument("--price", type=float, help="US dollars a chip and hour")
    plan.add_argument("--json", action="store_true", help="print one JSON object")


def _plan(options: argparse.Namespace) -> None:
    from dppo_jax.plan import topology as topologies

    topology = topologies.parse(options.topology)
    topologies.prepare([topology])
    from dppo_jax.config import load_recipe, split_overrides
    from dppo_jax.plan.programs import Settings
    from dppo_jax.plan.report import text_of
    from dppo_jax.plan.step_plan import plan_step
    from dppo_jax.train import train

    overrides, _ = split_overrides(options.overrides)
    recipe = load_recipe(options.recipe, train, overrides, GIVEN, options.over)
    settings = Settings(**recipe.arguments(*Settings.names()))

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    plan = plan_step(settings, topology, report=say)
    if options.json:
        print(json.dumps(plan.as_dict(options.price)))
    else:
        print(text_of(plan, options.price))
    if not plan.fits:
        worst = max(plan.programs, key=lambda p: p.total)
        raise Failure(
            f"{worst.name} needs {worst.total / 2**30:.1f} GiB a device of {topology.name}, which "
            f"has {worst.hbm / 2**30:.1f}"
        )
