"""Unreduced metrics to numbers, and the only writer of them: one JSON object a step."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dppo_jax.records import Max, Metric, Metrics


def reduce_metrics(*gradient_steps: Metrics) -> dict[str, float]:
    """One number a metric over all gradient steps; one device fetch.

    Mean: sum of sums / sum of counts, NaN where nothing was counted. Max: the largest value.
    """

    def reduce(each: Sequence[Metric]) -> float:
        values = np.array([tuple(m) for m in each], np.float64)  # [gradient steps, 1 or 2]
        if isinstance(each[0], Max):
            return float(np.max(values))
        total, count = values.sum(axis=0).tolist()
        return total / (count or math.nan)

    fetched = jax.device_get(gradient_steps)
    return {name: reduce([metrics[name] for metrics in fetched]) for name in fetched[0]}


class CompilationCounter:
    """Counts XLA compilations of this process; after the first step there should be none."""

    def __init__(self):
        self.total = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.total += event == "/jax/core/compile/backend_compile_duration"


class JsonLines:
    """Appends JSON objects to a file, a line each, whole or not at all for any reader."""

    def __init__(self, path: Path, *, resume_at: int | None = None, quiet: bool = False):
        """With `resume_at`, lines of that step and later are dropped: they come again.

        Quiet where another process of the run does the writing.
        """
        self.path = path = Path(os.devnull) if quiet else path
        if resume_at is not None and path.is_file():
            kept = [line for line in _whole_lines(path) if json.loads(line)["step"] < resume_at]
            path.write_text("".join(kept))
        self._file = path.open("a")

    def write(self, **fields):
        """One line. NaN and infinities, which JSON lacks, become null."""
        finite = {k: None if _not_finite(v) else v for k, v in fields.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()

    def close(self):
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of such a file, which its run may still be writing."""
    return [json.loads(line) for line in _whole_lines(path)]


def _whole_lines(path: Path) -> list[str]:
    """The file's lines without a last one that a crash cut off."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _not_finite(value) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
