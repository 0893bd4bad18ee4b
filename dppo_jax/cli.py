"""The command `dppo`: verbs, exit statuses, and errors of one line.

Exit status 0: done; 1: a run failed; 2: bad usage or bad input. Heavy imports happen inside the
verbs, so that `--help` answers at once.
"""

import argparse
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from dppo_jax import data_command, hf_command

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2
GIVEN = ("workdir", "console", "configuration")  # what `train` gets from here, not from a recipe


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one verb and exits."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    overrides = [a for a in given if a.startswith("--gin.")]
    options = _parser().parse_args([a for a in given if not a.startswith("--gin.")])
    options.overrides = overrides
    # Libraries below warn about what a user cannot change; our own words go through Console.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        options.verb(options)
    except KeyboardInterrupt:
        _fail(
            "interrupted; dppo train with --workdir RUN_DIRECTORY goes on from its newest "
            "checkpoint",
            EXIT_FAILED,
        )
    except Exception as error:
        if options.debug:
            raise
        # Bad input is a ValueError or a missing file wherever it is found; the rest is a failure.
        bad_input = isinstance(error, ValueError | FileNotFoundError | NotADirectoryError)
        message = " ".join(str(error).split()) or type(error).__name__
        if not bad_input:
            message = f"{type(error).__name__}: {message} (--debug shows where)"
        _fail(message, EXIT_BAD_INPUT if bad_input else EXIT_FAILED)


def _fail(message: str, status: int) -> None:
    print(f"dppo: {message}", file=sys.stderr)
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(
        prog="dppo", description="Trust-region reinforcement learning of language models in JAX."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(parent: Any, name: str, run: Callable, summary: str, example: str):
        sub = parent.add_parser(
            name,
            help=summary,
            description=summary,
            parents=[common],
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(verb=run)
        return sub

    gin = "any --gin.NAME=VALUE overrides the recipe"
    train = verb(
        verbs,
        "train",
        _train,
        f"Train as a recipe says; {gin}. Resumes by itself where the run directory holds a run.",
        "dppo train configs/recipes/arithmetic_cpu.gin --gin.STEPS=20",
    )
    train.add_argument("recipe", help="a .gin file")
    train.add_argument("--workdir", help="run directory (default: runs/RECIPE-DATE)")

    ablate = verb(
        verbs,
        "ablate",
        _ablate,
        "Train each of some algorithms on a recipe with several seeds and compare them: table.json,"
        f" table.md and curves.svg in the run directory, a run in it for each cell; {gin}. Runs "
        "that are there are not repeated, one that was stopped goes on.",
        "dppo ablate configs/recipes/arithmetic_cpu.gin --seeds 3 --workdir runs/grid \\\n"
        "           --over algorithms/dppo_binary_tv.gin algorithms/grpo.gin",
    )
    ablate.add_argument("recipe", help="a .gin file")
    ablate.add_argument(
        "--over", nargs="+", required=True, metavar="GIN", help="files laid over the recipe"
    )
    ablate.add_argument("--seeds", type=int, default=3, help="0, 1, ... (default: 3)")
    ablate.add_argument(
        "--workdir", help="directory of the grid (default: runs/ablate-RECIPE-DATE)"
    )
    ablate.add_argument("--json", action="store_true", help="print one JSON object")

    evaluate = verb(
        verbs,
        "eval",
        _eval,
        f"avg@k, pass@k and maj@k of a checkpoint on the recipe's evaluation sets; {gin}.",
        "dppo eval configs/recipes/arithmetic_cpu.gin --checkpoint runs/RUN --json\n"
        "         dppo eval configs/recipes/arithmetic_cpu.gin --regrade runs/RUN/answers.jsonl",
    )
    evaluate.add_argument("recipe", help="a .gin file")
    answers = evaluate.add_mutually_exclusive_group(required=True)
    answers.add_argument("--checkpoint", help="a run directory, to sample answers from")
    answers.add_argument("--regrade", nargs="+", metavar="FILE", help="answers to grade again")
    evaluate.add_argument(
        "--answers",
        metavar="FILE",
        help="where the answers are kept (default: eval_answers.jsonl in the run directory)",
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")

    methods = verb(
        verbs,
        "methods",
        _methods,
        "Every training method: what it needs, where it comes from. NAME stands for "
        "configs/algorithms/NAME.gin.",
        "dppo methods --json",
    )
    methods.add_argument("--json", action="store_true", help="with defaults, as one JSON object")

    def after_jax(command: Callable) -> Callable:
        def run(options: argparse.Namespace) -> None:
            _start_jax()
            command(options)

        return run

    hf_command.add_verbs(
        lambda name, run, *texts: verb(verbs, name, after_jax(run), *texts), _recipe_arguments
    )

    bench = verbs.add_parser("bench", help="Measure speed.").add_subparsers(
        required=True, metavar="WHAT"
    )
    step = verb(
        bench,
        "step",
        _bench_step,
        "Seconds of one training step: sampling, scoring, update, against the matmul peak.",
        "dppo bench step --json",
    )
    step.add_argument("--json", action="store_true", help="print one JSON object")
    for flag, default in (
        ("vocab", 1024), ("width", 256), ("layers", 4), ("head-size", 64), ("mlp", 1024),
        ("prompts", 16), ("samples", 8), ("prompt-length", 32), ("response-length", 128),
        ("top-k", 20), ("microbatches", 4), ("repeats", 5),
    ):  # fmt: skip
        step.add_argument(f"--{flag}", type=int, default=default, help=f"(default: {default})")

    data = verbs.add_parser("data", help="Data sets on disk.").add_subparsers(
        required=True, metavar="WHAT"
    )
    data_command.add_verbs(data, verb, _data_show)
    return parser


def _train(options: argparse.Namespace) -> None:
    _start_jax()
    from dppo_jax.config import load_recipe, split_overrides
    from dppo_jax.console import Console, duration
    from dppo_jax.eval_command import with_interval
    from dppo_jax.evaluate import accuracies
    from dppo_jax.multihost import is_writer
    from dppo_jax.train import train

    overrides, _ = split_overrides(options.overrides)
    recipe = load_recipe(options.recipe, train, overrides, GIVEN)
    workdir = Path(options.workdir or _dated(recipe.path.stem))
    _refuse_other_run(recipe, workdir)
    console = Console(quiet=not is_writer())
    summary = _run(recipe, workdir, console)
    console.table(
        f"{recipe.path.stem}: done",
        {
            **{
                f"{name} {when}": with_interval(each)
                for when in ("before", "after")
                for name, each in accuracies(summary[when]).items()
            },
            "steps": str(summary["steps"]),
            "time": duration(summary["wall_seconds"]),
            "run directory": str(workdir),
        },
    )


def _dated(name: str) -> str:
    return f"runs/{name}-{datetime.now():%Y%m%d-%H%M%S}"


def _refuse_other_run(recipe: Any, workdir: Path) -> None:
    """Raises ValueError where a directory holds a run of another configuration, or no run."""
    from dppo_jax.config import difference

    asked = workdir / "config.gin"
    if asked.exists() and (changed := difference(recipe.config_text(), asked.read_text())):
        raise ValueError(
            f"{workdir} holds a run of another configuration: {changed}; "
            "choose another --workdir or undo the change"
        )
    if workdir.exists() and not asked.exists() and any(workdir.iterdir()):
        raise ValueError(f"{workdir} is not empty and holds no run: choose another --workdir")


def _run(recipe: Any, workdir: Path, console: Any) -> dict[str, Any]:
    """Trains as a loaded recipe says; its texts go into the run directory."""
    from dppo_jax.train import train

    arguments = recipe.arguments(given=GIVEN)
    texts = {
        "operative_config.gin": recipe.operative_config_text(),
        "config.gin": recipe.config_text(),
    }
    return train(workdir=str(workdir), console=console, configuration=texts, **arguments)


def _ablate(options: argparse.Namespace) -> None:
    _start_jax()
    from dppo_jax import ablate
    from dppo_jax.config import load_recipe, split_overrides
    from dppo_jax.console import Console
    from dppo_jax.multihost import is_writer
    from dppo_jax.train import train

    overrides, _ = split_overrides(options.overrides)
    workdir = Path(options.workdir or _dated(f"ablate-{Path(options.recipe).stem}"))
    cells = ablate.grid(options.over, options.seeds, workdir)
    if workdir.exists() and any(workdir.iterdir()):
        if not any(cell.workdir.exists() for cell in cells):
            raise ValueError(f"{workdir} holds no run of this grid: choose another --workdir")

    def load(cell: ablate.Cell) -> Any:
        # the argument itself, whatever macro a recipe binds it by
        given = [*overrides, f"train.train.seed={cell.seed}"]
        recipe = load_recipe(options.recipe, train, given, GIVEN, [cell.overlay])
        _refuse_other_run(recipe, cell.workdir)
        return recipe

    for cell in cells:  # all of them before anything runs
        load(cell)
    console = Console(quiet=options.json or not is_writer())
    outcomes = ablate.run_grid(
        cells, lambda cell: _run(load(cell), cell.workdir, console), console.say
    )
    failed = sum(outcome.error is not None for outcome in outcomes)
    if is_writer():
        rows = ablate.write(workdir, outcomes)
        if options.json:
            print(json.dumps({"workdir": str(workdir), "table": rows}, allow_nan=False))
        console.say(f"\n{ablate.markdown(rows)}\n{workdir}: table.json, table.md, curves.svg")
    if failed:
        _fail(f"{failed} of {len(cells)} cells failed: see {workdir / 'table.md'}", EXIT_FAILED)


def _eval(options: argparse.Namespace) -> None:
    _start_jax()
    from dppo_jax.config import load_recipe, split_overrides
    from dppo_jax.eval_command import evaluate_run, grade_again
    from dppo_jax.train import train

    overrides, _ = split_overrides(options.overrides)
    recipe = load_recipe(options.recipe, train, overrides, GIVEN)
    if options.regrade:
        grade_again(recipe, options)
    else:
        evaluate_run(recipe, options)


def _methods(options: argparse.Namespace) -> None:
    from dppo_jax.objectives.methods import METHODS

    if options.json:
        print(json.dumps({"methods": [method.as_dict() for method in METHODS]}))
        return
    rows = [("method", "needs", "source", "what it does")]
    for method in METHODS:
        name = method.name + " (experimental)" * method.experimental
        rows.append((name, ", ".join(method.needs) or "-", method.source, method.summary))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(line.rstrip())


def _bench_step(options: argparse.Namespace) -> None:
    _start_jax()
    from dppo_jax.bench import bench_step, show_step

    shape = {
        name: value
        for name, value in vars(options).items()
        if name not in ("verb", "json", "debug", "overrides")
    }
    result = bench_step(**shape)
    print(json.dumps(result)) if options.json else show_step(result)


def _recipe_arguments(path: Path, *names: str) -> dict[str, Any]:
    from dppo_jax.config import load_recipe
    from dppo_jax.train import train

    return load_recipe(path, train, (), GIVEN).arguments(*names)


def _data_show(options: argparse.Namespace) -> None:
    if options.recipe is None:
        tokenizer = data_command.tokenizer_of(options)
        data_command.show(options, tokenizer, options.data_dir or "runs/data", None)
        return
    if options.tokenizer is not None:
        raise ValueError("the recipe has a tokenizer of its own: give --recipe or --tokenizer")
    _start_jax()
    from dppo_jax.config import load_recipe, split_overrides
    from dppo_jax.train import train

    overrides, _ = split_overrides(options.overrides)
    recipe = load_recipe(options.recipe, train, overrides, GIVEN)
    given = recipe.arguments("tokenizer", "data_dir", "max_prompt_tokens")
    data_dir = options.data_dir or given["data_dir"]
    data_command.show(options, given["tokenizer"], data_dir, given["max_prompt_tokens"])


def _start_jax() -> None:
    """Keeps compiled programs for the next call and, on a CPU, freed memory for the next step."""
    if _cpu_only():
        # Before jax is imported: the allocator's settings bind only what has not been set up yet.
        from dppo_jax.allocator import keep_freed_memory

        keep_freed_memory()
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path.home() / ".cache" / "dppo_jax" / "programs"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _cpu_only() -> bool:
    """Whether JAX will run on the CPU: it was told to, or there is nothing else for it."""
    plugins = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")
    asked = os.environ.get("JAX_PLATFORMS")
    return asked == "cpu" if asked else not any(map(importlib.util.find_spec, plugins))
