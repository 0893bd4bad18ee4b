"""A grid of runs, algorithm x seed: what came of each, and a table with intervals over the seeds.

Every cell is a run directory of its own, `WORKDIR/ALGORITHM-seedN`, run one after the other in this
process. A finished one is not run again, one that was stopped goes on, one that fails is told in
the table and stops no other. Knows neither recipes nor training: the caller says how to run a cell.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from dppo_jax.curves import Panel, draw
from dppo_jax.metrics import read_lines

LAST = 10  # steps that `reward_last` is the mean of
COLUMNS = {  # of the table: its heading, the cells' number, its format
    "final accuracy": ("accuracy", ".3f"),
    f"reward, last {LAST} steps": ("reward_last", ".3f"),
    "best reward": ("reward_best", ".3f"),
    "max mismatch": ("mismatch_max", ".2g"),
}
LEGEND = (
    "Mean over seeds [95 % interval of the mean, Student's t]. Max mismatch: the largest, over "
    "steps, of the step's mean |π - μ| before its first gradient step. Collapsed: seeds whose "
    "reward fell below half of its running best and never came back, and at which step."
)


class Cell(NamedTuple):
    """One run of the grid."""

    algorithm: str
    overlay: str  # the .gin file laid over the recipe
    seed: int
    workdir: Path


@dataclass(frozen=True)
class Outcome:
    """What a cell's files say; None where it did not come that far."""

    algorithm: str
    seed: int
    workdir: str
    error: str | None  # one line; None for a finished run
    steps: int  # written to its log
    accuracy: float | None
    reward_last: float | None
    reward_best: float | None
    mismatch_max: float | None
    collapse_step: int | None


def grid(overlays: Sequence[str], seeds: int, workdir: Path) -> list[Cell]:
    """The cells, algorithm by algorithm; an algorithm is called what its file is called."""
    if seeds < 1:
        raise ValueError(f"--seeds {seeds}: give at least 1")
    names = [Path(overlay).stem for overlay in overlays]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--over: two files are called {name}.gin: rename one")
    return [
        Cell(name, overlay, seed, workdir / f"{name}-seed{seed}")
        for name, overlay in zip(names, overlays, strict=True)
        for seed in range(seeds)
    ]


def run_grid(
    cells: Sequence[Cell], run: Callable[[Cell], Any], say: Callable[[str], None]
) -> list[Outcome]:
    """Runs every cell that is not finished; `run` raises where a cell fails."""
    outcomes = []
    for number, cell in enumerate(cells, start=1):
        label = f"cell {number} of {len(cells)}: {cell.algorithm}, seed {cell.seed}"
        error = None
        if (cell.workdir / "summary.json").exists():
            say(f"{label}: finished before")
        else:
            say(label)
            try:
                run(cell)
            except Exception as failure:
                error = " ".join(str(failure).split()) or type(failure).__name__
                say(f"{label} failed: {error}")
        outcomes.append(outcome(cell, error))
    return outcomes


def outcome(cell: Cell, error: str | None) -> Outcome:
    """A cell's numbers, read from its run directory."""
    summary = _read(cell.workdir / "summary.json") or {}
    log = cell.workdir / "metrics.jsonl"
    lines = read_lines(log) if log.exists() else []
    rewards = [line["reward/mean"] for line in lines]
    mismatches = [x for line in lines if (x := line["mismatch/prob_abs_mean"]) is not None]
    return Outcome(
        algorithm=cell.algorithm,
        seed=cell.seed,
        workdir=str(cell.workdir),
        error=error,
        steps=len(lines),
        accuracy=summary.get("accuracy_after"),
        reward_last=float(np.mean(rewards[-LAST:])) if rewards else None,
        reward_best=max(rewards, default=None),
        mismatch_max=max(mismatches, default=None),
        collapse_step=collapse_step(rewards),
    )


def collapse_step(rewards: Sequence[float]) -> int | None:
    """The first step from which on the reward stays below half of its running best.

    min { s : for all j >= s, reward_j < ½ max_{i<=j} reward_i }, steps counted from 0; None where
    the last step is not below, or the best is not positive.
    """
    best = np.maximum.accumulate(rewards) if len(rewards) else np.zeros(0)
    standing = np.flatnonzero((np.asarray(rewards) >= best / 2) | (best <= 0))
    after = int(standing[-1]) + 1 if len(standing) else 0
    return after if after < len(rewards) else None


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and 95 % interval of the mean (Student's t); no interval from fewer than two values."""
    if not values:
        return {"mean": None, "low": None, "high": None}
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    deviation = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(stdtrit(len(values) - 1, 0.975)) * deviation
    return {"mean": mean, "low": mean - half, "high": mean + half}


def table(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row an algorithm, in the order given."""
    rows = []
    for algorithm in dict.fromkeys(each.algorithm for each in outcomes):
        cells = [asdict(each) for each in outcomes if each.algorithm == algorithm]
        numbers = {
            field: interval([cell[field] for cell in cells if cell[field] is not None])
            for field, _ in COLUMNS.values()
        }
        rows.append({"algorithm": algorithm} | numbers | {"cells": cells})
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table as text, its legend and what failed."""
    lines = [
        "| " + " | ".join(("algorithm", "finished", *COLUMNS, "collapsed")) + " |",
        "|---" * (3 + len(COLUMNS)) + "|",
    ]
    failures = []
    for row in rows:
        cells = row["cells"]
        failed = [cell for cell in cells if cell["error"]]
        failures += [f"{row['algorithm']}, seed {c['seed']} failed: {c['error']}" for c in failed]
        fallen = [cell["collapse_step"] for cell in cells if cell["collapse_step"] is not None]
        collapsed = f"{len(fallen)}, at {', '.join(map(str, fallen))}" if fallen else "0"
        numbers = (shown(row[field], form) for field, form in COLUMNS.values())
        finished = f"{len(cells) - len(failed)} of {len(cells)}"
        lines.append("| " + " | ".join((row["algorithm"], finished, *numbers, collapsed)) + " |")
    return "\n".join([*lines, "", LEGEND, *failures]) + "\n"


def plot(outcomes: Sequence[Outcome]) -> str:
    """An SVG of reward and mismatch by step: a line an algorithm, its seeds' range behind it."""
    panels = []
    for title, metric in (("reward", "reward/mean"), ("mismatch", "mismatch/prob_abs_mean")):
        curves: dict[str, list[list[float]]] = {}
        for each in outcomes:
            log = Path(each.workdir) / "metrics.jsonl"
            if log.exists():
                lines = read_lines(log)
                curve = [math.nan if line[metric] is None else line[metric] for line in lines]
                curves.setdefault(each.algorithm, []).append(curve)
        panels.append(Panel(title, curves))
    return draw(panels)


def write(workdir: Path, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Writes table.json, table.md and curves.svg; returns the table."""
    rows = table(outcomes)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "table.json").write_text(json.dumps(rows, indent=2, allow_nan=False) + "\n")
    (workdir / "table.md").write_text(markdown(rows), encoding="utf-8")
    (workdir / "curves.svg").write_text(plot(outcomes), encoding="utf-8")
    return rows


def shown(value: dict[str, float | None], form: str) -> str:
    """An `interval` as text."""
    if value["mean"] is None:
        return "-"
    mean = format(value["mean"], form)
    if value["low"] is None or value["high"] is None:
        return mean
    return f"{mean} [{value['low']:{form}}, {value['high']:{form}}]"


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None
