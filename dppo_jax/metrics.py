"""Unreduced metrics to numbers, and the only writer of them: one JSON object a step."""

import json
import math
from pathlib import Path

import jax

from dppo_jax.records import Max, Metrics


def reduce_metrics(metrics: Metrics) -> dict[str, float]:
    """Mean -> sum / count (NaN where nothing was counted), Max -> its value; one device fetch."""
    fetched = jax.device_get(metrics)
    return {
        name: float(m.value) if isinstance(m, Max) else float(m.sum) / (float(m.count) or math.nan)
        for name, m in fetched.items()
    }


class CompilationCounter:
    """Counts XLA compilations of this process; after the first step there should be none."""

    def __init__(self):
        self.total = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_):
        self.total += event == "/jax/core/compile/backend_compile_duration"


class JsonLines:
    """Appends JSON objects to a file, a line each, whole or not at all for any reader."""

    def __init__(self, path: Path, *, resume_at: int | None = None):
        """With `resume_at`, lines of that step and later are dropped: they come again."""
        self.path = path
        if resume_at is not None and path.exists():
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


def _whole_lines(path: Path) -> list[str]:
    """The file's lines without a last one that a crash cut off."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _not_finite(value) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
