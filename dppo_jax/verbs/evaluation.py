"""What `dppo eval` does with a recipe: evaluates a run's checkpoint, or grades answers again."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dppo_jax.answers import write_answers
from dppo_jax.checkpoint import newest_step
from dppo_jax.config import Recipe
from dppo_jax.console import Console
from dppo_jax.evaluate import evaluate_checkpoint, regrade_files
from dppo_jax.hf_exchange import is_hf
from dppo_jax.hosts import first_process_first
from dppo_jax.multihost import is_writer, own_file

_NEEDED = (
    "model", "tokenizer", "dataset", "data_dir", "verifier", "sampling", "prompts_per_step",
    "max_prompt_tokens", "too_long", "mesh", "rollouts", "eval_split", "eval_prompts", "eval_sets",
    "seed",
)  # fmt: skip


def evaluate_run(recipe: Recipe, options: argparse.Namespace) -> None:
    """Samples answers to the recipe's evaluation sets, prints the numbers, keeps the answers."""
    directory = Path(options.checkpoint)
    with first_process_first("arguments"):
        arguments = recipe.arguments(*_NEEDED)
    done = evaluate_checkpoint(directory, **arguments)
    beside = Path() if is_hf(directory) else directory  # others' folders stay as they are
    file = own_file(Path(options.answers or beside / "eval_answers.jsonl"))
    write_answers(file, [(newest_step(directory) or 0, row) for row in done.answers])
    if not is_writer():
        return
    if options.json:
        print(json.dumps({"sets": done.as_dict(), "answers": str(file)}))
        return
    console = Console()
    for name, each in done.as_dict().items():
        console.table(f"{options.checkpoint} on {name}", table_of(each))
    console.say(f"answers: {file}")


def grade_again(recipe: Recipe, options: argparse.Namespace) -> None:
    """Puts kept answers before the recipe's verifiers and prints the numbers of each evaluation."""
    results, rows = regrade_files(
        [Path(file) for file in options.regrade], **recipe.arguments("verifier", "eval_sets")
    )
    if options.answers:
        write_answers(Path(options.answers), rows)
    if options.json:
        print(json.dumps({"evaluations": [result.as_dict() for result in results]}))
        return
    for result in results:
        title = f"{result.set} after {result.step} steps: {result.changed} scores changed"
        Console().table(title, table_of(result.evaluation.as_dict()))


def with_interval(evaluation: Mapping[str, Any]) -> str:
    """The accuracy of `Evaluation.as_dict()` for people."""
    return _interval(*(evaluation[f"accuracy{end}"] for end in ("", "_low", "_high")))


def table_of(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """The lines of a table of `Evaluation.as_dict()`."""
    k = evaluation["k"]
    rows = {f"accuracy (avg@{k})": with_interval(evaluation)}
    rows |= {f"pass@{n}": _interval(*v) for n, v in evaluation["pass_at"].items() if n != "1"}
    if k > 1:
        rows[f"maj@{k}"] = _interval(*evaluation["majority"])
    too_long = f", {evaluation['left_out']} more were too long" * bool(evaluation["left_out"])
    rows["prompts"] = f"{evaluation['prompts']}{too_long}"
    rows["response length"] = f"{evaluation['response_length']:.1f} tokens"
    rows["truncated"] = f"{evaluation['truncated']:.3f}"
    if evaluation["verifier_errors"]:
        rows["verifier failed on"] = f"{evaluation['verifier_errors']} answers"
    for kind, label in (("levels", "level "), ("subjects", "")):
        for name, each in evaluation[kind].items():
            value = f"{each['accuracy']:.3f}"
            if k > 1:
                value = f"avg {value}, pass {each['pass_at_k']:.3f}, maj {each['majority']:.3f}"
            rows[f"{label}{name}"] = (
                f"{value}  ({each['prompts']} prompt{'s' * (each['prompts'] > 1)})"
            )
    return rows


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.3f}  (95 % interval {low:.3f} to {high:.3f})"
