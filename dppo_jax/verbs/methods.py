"""The verb that prints the table of methods."""

import argparse
import json
from typing import Any

from dppo_jax.verbs.command import add_verb


def add(verbs: Any) -> None:
    """Adds it to the parser's verbs."""
    methods = add_verb(
        verbs,
        "methods",
        _methods,
        "Every training method: what it needs, where it comes from. NAME stands for "
        "configs/algorithms/NAME.gin.",
        "dppo methods --json",
    )
    methods.add_argument("--json", action="store_true", help="with defaults, as one JSON object")


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
