"""Verbs about whole runs: train, ablate, eval."""

import argparse
import hashlib
import json
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

from dppo_jax.verbs import command
from dppo_jax.verbs.command import GIN, GIVEN, Failure, add_hosts, add_verb


def add(verbs: Any) -> None:
    """Adds them to the parser's verbs."""
    train = add_verb(
        verbs,
        "train",
        _train,
        f"Train as a recipe says; {GIN}. Resumes by itself where the run directory holds a run.",
        "dppo train configs/recipes/arithmetic_cpu.gin --gin.STEPS=20",
    )
    train.add_argument("recipe", help="a .gin file")
    train.add_argument("--workdir", help="run directory (default: runs/RECIPE-DATE)")
    train.add_argument(
        "--over", nargs="+", default=[], metavar="GIN", help="files laid over the recipe"
    )
    add_hosts(train)

    ablate = add_verb(
        verbs,
        "ablate",
        _ablate,
        "Train each of some algorithms on a recipe with several seeds and compare them: table.json,"
        f" table.md and curves.svg in the run directory, a run in it for each cell; {GIN}. Runs "
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
    add_hosts(ablate)

    evaluate = add_verb(
        verbs,
        "eval",
        _eval,
        f"avg@k, pass@k and maj@k of a checkpoint on the recipe's evaluation sets; {GIN}.",
        "dppo eval configs/recipes/arithmetic_cpu.gin --checkpoint runs/RUN --json\n"
        "         dppo eval configs/recipes/arithmetic_cpu.gin --regrade runs/RUN/answers.jsonl",
    )
    evaluate.add_argument("recipe", help="a .gin file")
    answers = evaluate.add_mutually_exclusive_group(required=True)
    answers.add_argument("--checkpoint", help="a run or a Hugging Face folder")
    answers.add_argument("--regrade", nargs="+", metavar="FILE", help="answers to grade again")
    evaluate.add_argument(
        "--answers",
        metavar="FILE",
        help="where the answers are kept (default: eval_answers.jsonl in the run directory)",
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    add_hosts(evaluate)


def _train(options: argparse.Namespace) -> None:
    command.start_jax(options)
    from dppo_jax.config import load_recipe, split_overrides
    from dppo_jax.console import Console, duration
    from dppo_jax.evaluate import accuracies
    from dppo_jax.hosts import check_shared
    from dppo_jax.multihost import is_writer
    from dppo_jax.train import train
    from dppo_jax.verbs.evaluation import with_interval

    overrides, _ = split_overrides(options.overrides)
    recipe = load_recipe(options.recipe, train, overrides, GIVEN, options.over)
    workdir = _workdir(options, recipe.path.stem)
    _check_configuration(recipe.config_text())
    _refuse_other_run(recipe, workdir)
    check_shared(workdir)
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
            "most masked": ", ".join(map(repr, summary["most_masked"])) or "none",
            "steps": str(summary["steps"]),
            "time": duration(summary["wall_seconds"]),
            "run directory": str(workdir),
        },
    )


def _workdir(options: argparse.Namespace, name: str, **asked: str) -> Path:
    """The run directory; refuses hosts that have other code, devices, or were `asked` otherwise."""
    from dppo_jax.hosts import check_same, code_facts, exchange

    check_same(code_facts() | {"--workdir": options.workdir or ""} | asked)
    dated = f"runs/{name}-{datetime.now():%Y%m%d-%H%M%S}"
    return Path(options.workdir or exchange("workdir", dated)[0])


def _check_configuration(text: str) -> None:
    """Raises ValueError in every process where one has another configuration; says in what."""
    from dppo_jax.config import difference
    from dppo_jax.hosts import exchange, named

    if len(set(exchange("digest", hashlib.sha256(text.encode()).hexdigest()))) == 1:
        return
    every = exchange("configuration", text)
    usual = Counter(every).most_common(1)[0][0]
    other = next(process for process, its in enumerate(every) if its != usual)
    raise ValueError(
        f"{named([other])} has another configuration than the rest: "
        f"{difference(usual, every[other], 'there')}; all hosts need the same command and files"
    )


def _refuse_other_run(recipe: Any, workdir: Path) -> None:
    """Raises ValueError where a directory holds another run, or none, or cannot be written."""
    from dppo_jax.config import difference
    from dppo_jax.run_directory import check_writable

    asked = workdir / "config.gin"
    try:
        stored = asked.read_text(encoding="utf-8") if asked.exists() else None
        changed = stored is not None and difference(recipe.config_text(), stored)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{asked} cannot be read ({error}): get it back, or choose another --workdir"
        ) from error
    if changed:
        raise ValueError(
            f"{workdir} holds a run of another configuration: {changed}; "
            "choose another --workdir or undo the change"
        )
    if workdir.exists() and stored is None and any(workdir.iterdir()):
        raise ValueError(f"{workdir} is not empty and holds no run: choose another --workdir")
    check_writable(workdir)


def _run(recipe: Any, workdir: Path, console: Any) -> dict[str, Any]:
    """Trains as a loaded recipe says; its texts and its report go into the run directory."""
    from dppo_jax import report
    from dppo_jax.hosts import first_process_first
    from dppo_jax.multihost import is_writer
    from dppo_jax.preflight import write_files
    from dppo_jax.train import train

    with first_process_first("arguments"):  # which may make a tokenizer's file
        arguments = recipe.arguments(given=GIVEN)
    texts = {
        "operative_config.gin": recipe.operative_config_text(),
        "config.gin": recipe.config_text(),
    }
    try:
        summary = train(workdir=str(workdir), console=console, configuration=texts, **arguments)
    finally:
        console.finish_line()  # which has hidden the cursor
    if is_writer():
        write_files(workdir, {report.FILE: report.page(report.read([workdir]))})
    return summary


def _ablate(options: argparse.Namespace) -> None:
    command.start_jax(options)
    from dppo_jax import ablate
    from dppo_jax.config import load_recipe, split_overrides
    from dppo_jax.console import Console
    from dppo_jax.multihost import is_writer
    from dppo_jax.train import train

    overrides, _ = split_overrides(options.overrides)
    asked = repr((options.recipe, options.over, options.seeds, overrides))
    workdir = _workdir(options, f"ablate-{Path(options.recipe).stem}", configuration=asked)
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
        raise Failure(f"{failed} of {len(cells)} cells failed: see {workdir / 'table.md'}")


def _eval(options: argparse.Namespace) -> None:
    command.start_jax(options)
    from dppo_jax.config import load_recipe, split_overrides
    from dppo_jax.hosts import check_same, code_facts
    from dppo_jax.train import train
    from dppo_jax.verbs.evaluation import evaluate_run, grade_again

    overrides, _ = split_overrides(options.overrides)
    recipe = load_recipe(options.recipe, train, overrides, GIVEN)
    if options.regrade:
        grade_again(recipe, options)
    else:
        check_same(code_facts())
        _check_configuration(recipe.config_text())
        evaluate_run(recipe, options)
