"""The verb that shows runs as one HTML page."""

import argparse
from pathlib import Path
from typing import Any

from dppo_jax.verbs.command import add_verb


def add(verbs: Any) -> None:
    """Adds it to the parser's verbs."""
    report = add_verb(
        verbs,
        "report",
        _report,
        "One run, or several side by side, as an HTML page: what came of them, curves, in what "
        "their recipes differ, the tokens most masked, samples. Finished or not; `dppo train` "
        "writes its own as report.html.",
        "dppo report runs/grid/grpo-seed0 runs/grid/dppo_binary_tv-seed0 -o out.html",
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="a run directory")
    report.add_argument(
        "-o", "--out", metavar="FILE", help="the page (default: report.html in the one run)"
    )


def _report(options: argparse.Namespace) -> None:
    from dppo_jax import report

    if not options.out and len(options.runs) > 1:
        raise ValueError("which file is the page of several runs? Give it with -o FILE.html")
    runs = report.read([Path(run) for run in options.runs])
    out = Path(options.out or Path(options.runs[0]) / report.FILE)
    out.write_text(report.page(runs), encoding="utf-8")
    print(out)
