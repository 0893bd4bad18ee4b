"""Runs as one HTML page: what came of them, their curves, in what their recipes differ, samples.

Reads run directories alone. The page holds everything itself and runs no script.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from dppo_jax import ablate
from dppo_jax.config import bindings
from dppo_jax.console import duration
from dppo_jax.curves import Panel, draw
from dppo_jax.metrics import read_lines

FILE = "report.html"  # of a run, in its directory
SAMPLES = 12  # of each run, its newest
# What is drawn, where a run has it; everything else stands in the table of all metrics.
CURVES = {
    "Learning": ("reward/mean", "reward/groups_with_spread", "response/length", "entropy/mean"),
    "Trust region": (
        "mask/fraction",
        "divergence/mean",
        "divergence/max",
        "prob_diff/max",
        "ratio/max",
        "policy/kl_rollout",
    ),
    "Mismatch between sampler and trainer": (
        "mismatch/prob_abs_mean",
        "mismatch/logp_abs_max",
        "mismatch/multiplicative_error",
    ),
    "Update": ("loss/policy", "update/gradient_norm", "update/step_norm"),
    "Time": ("time/step", "time/sampling", "time/update", "time/tokens_per_second"),
}
STYLE = """
body { font-family: sans-serif; margin: 2em; max-width: 120em; color: #222 }
table { border-collapse: collapse; margin: 0.5em 0 }
th, td { border: 1px solid #ddd; padding: 0.25em 0.6em; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; max-width: 60em }
.panels { display: flex; flex-wrap: wrap } .panels svg { max-width: 100%; height: auto }
"""


class Run(NamedTuple):
    """What a run directory says; one that is not finished has no summary and no masked tokens."""

    name: str
    steps: list[dict[str, Any]]  # the lines of metrics.jsonl
    summary: Mapping[str, Any]
    bindings: Mapping[str, str]  # of config.gin
    masked: list[dict[str, Any]]
    samples: list[dict[str, Any]]


def read(directories: Sequence[Path]) -> list[Run]:
    """The runs, called by their directories' names, or by the whole paths where two are alike."""
    names = [directory.resolve().name for directory in directories]
    if len(set(names)) < len(names):
        names = [str(directory) for directory in directories]
    return [_read(name, directory) for name, directory in zip(names, directories, strict=True)]


def _read(name: str, directory: Path) -> Run:
    log = directory / "metrics.jsonl"
    if not log.is_file():
        raise FileNotFoundError(f"{directory} holds no run: it has no metrics.jsonl")

    def text(file: str, default: str) -> str:
        path = directory / file
        return path.read_text(encoding="utf-8") if path.is_file() else default

    samples = directory / "samples.jsonl"
    return Run(
        name,
        steps=read_lines(log),
        summary=json.loads(text("summary.json", "{}")),
        bindings=bindings(text("config.gin", ""), str(directory / "config.gin")),
        masked=json.loads(text("masked_tokens.json", "[]")),
        samples=read_lines(samples)[-SAMPLES:] if samples.is_file() else [],
    )


def page(runs: Sequence[Run]) -> str:
    """The whole HTML text."""
    title = ", ".join(run.name for run in runs)
    parts = [
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><title>{escape(title)}'
        f"</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        _outcomes(runs),
        *_curves(runs),
        *_configuration(runs),
        *_masked(runs),
        *_samples(runs),
        *_all_metrics(runs),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _outcomes(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        summary = run.summary
        rewards = [reward for reward in _curve(run, "reward/mean") if math.isfinite(reward)]
        collapse = ablate.collapse_step(rewards)
        rows.append(
            {"run": run.name, "steps": f"{len(run.steps)}" + ("" if summary else ", not finished")}
            | {
                f"{name}, {when}": _with_interval(each)
                for when in ("before", "after")
                for name, each in summary.get(when, {}).items()
            }
            | {
                f"reward, last {ablate.LAST} steps": _number(_mean_of_last(run, "reward/mean")),
                "best reward": _number(max(rewards, default=None)),
                "collapsed at": "" if collapse is None else str(collapse),
                "time": duration(summary["wall_seconds"]) if summary else "",
                "devices": summary.get("devices", ""),
            }
        )
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return _table(columns, [[row.get(column, "") for column in columns] for row in rows])


def _with_interval(evaluation: Mapping[str, Any]) -> str:
    ends = {"mean": "accuracy", "low": "accuracy_low", "high": "accuracy_high"}
    return ablate.shown({end: evaluation[name] for end, name in ends.items()}, ".3f")


def _curves(runs: Sequence[Run]) -> Iterable[str]:
    sets = dict.fromkeys(name for run in runs for name in _sets(run))
    for section, metrics in CURVES.items():
        panels = [Panel(metric, {r.name: [_curve(r, metric)] for r in runs}) for metric in metrics]
        if section == "Learning":
            accuracies = [
                Panel(f"accuracy, {name}", {run.name: [_accuracy(run, name)] for run in runs})
                for name in sets
            ]
            panels = accuracies + panels
        drawn = [draw([panel]) for panel in panels if _has_values(panel)]
        if drawn:
            yield f'<h2>{section}</h2>\n<div class="panels">{"".join(drawn)}</div>'


def _sets(run: Run) -> Iterable[str]:
    """The evaluation sets; before its end a run has their names in its metrics alone."""
    yield from run.summary.get("before", {})
    for step in run.steps:
        for metric in step:
            if metric.startswith("eval/") and metric.endswith("/accuracy"):
                yield metric.removeprefix("eval/").removesuffix("/accuracy")


def _curve(run: Run, metric: str) -> list[float]:
    """A value a step; NaN where the step has none."""
    values = (step.get(metric) for step in run.steps)
    return [math.nan if value is None else float(value) for value in values]


def _accuracy(run: Run, name: str) -> list[float]:
    """After 0, 1, ... steps; NaN where nothing was evaluated."""
    ends = [run.summary.get(when, {}).get(name, {}) for when in ("before", "after")]
    before, after = (end.get("accuracy", math.nan) for end in ends)
    curve = [before, *_curve(run, f"eval/{name}/accuracy")]
    if run.summary:
        curve[-1] = after
    return curve


def _has_values(panel: Panel) -> bool:
    return any(math.isfinite(x) for runs in panel.curves.values() for run in runs for x in run)


def _configuration(runs: Sequence[Run]) -> Iterable[str]:
    names = sorted({name for run in runs for name in run.bindings})
    values = {name: [run.bindings.get(name, "unset") for run in runs] for name in names}
    columns = ["binding", *(run.name for run in runs)]
    if len(runs) > 1:
        different = [[name, *of] for name, of in values.items() if len(set(of)) > 1]
        yield "<h2>In what the recipes differ</h2>"
        yield _table(columns, different) if different else "<p>In nothing.</p>"
    yield "<details><summary>All bindings of the recipes</summary>"
    yield _table(columns, [[name, *of] for name, of in values.items()]) + "</details>"


def _masked(runs: Sequence[Run]) -> Iterable[str]:
    for run in runs:
        if run.masked:
            yield f"<h2>Tokens most masked{_of(run, runs)}</h2>"
            columns = ["text", "masked_positive", "masked_negative", "occurrences", "share"]
            rows = [
                [repr(token["text"]), *(_number(token[name]) for name in columns[1:])]
                for token in run.masked
            ]
            headings = ["token", "masked, A > 0", "masked, A < 0", "occurrences", "share masked"]
            yield _table(headings, rows)


def _samples(runs: Sequence[Run]) -> Iterable[str]:
    for run in runs:
        if run.samples:
            yield f"<h2>Newest samples{_of(run, runs)}</h2>"
            rows = [
                [str(s["step"]), _number(s["score"]), s["prompt"], s["response"], s["reason"]]
                for s in run.samples
            ]
            yield _table(["step", "score", "prompt", "response", "verdict"], rows)


def _all_metrics(runs: Sequence[Run]) -> Iterable[str]:
    names = sorted({name for run in runs for step in run.steps for name in step} - {"step"})
    rows = [[name, *(_number(_mean_of_last(run, name)) for run in runs)] for name in names]
    yield f"<details><summary>All metrics, means of the last {ablate.LAST} steps</summary>"
    yield _table(["metric", *(run.name for run in runs)], rows) + "</details>"


def _mean_of_last(run: Run, metric: str) -> float | None:
    values = [x for x in _curve(run, metric)[-ablate.LAST :] if math.isfinite(x)]
    return sum(values) / len(values) if values else None


def _of(run: Run, runs: Sequence[Run]) -> str:
    return f": {escape(run.name)}" if len(runs) > 1 else ""


def _number(value: float | int | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def cell(text: str) -> str:
        kind = ' class="n"' if _is_number(text) else ""
        return f"<td{kind}><pre>{escape(text)}</pre></td>"

    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "\n".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}</table>"


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return False
    return True
