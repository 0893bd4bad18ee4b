"""Unreduced metrics to numbers, and their only writers: one JSON object a step, and its mirrors."""

import importlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from dppo_jax.config import bindings
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
            _drop_lines_from(path, resume_at)
        self._file = path.open("a")

    def write(self, **fields):
        """One line. NaN and infinities, which JSON lacks, become null."""
        finite = {k: None if _not_finite(v) else v for k, v in fields.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()

    def close(self):
        self._file.close()


class Mirror(Protocol):
    """Shows a run's numbers in another place too."""

    def write(self, step: int, numbers: Mapping[str, float | int]) -> None: ...

    def close(self) -> None: ...


MakeMirror = Callable[[Path, int], Mirror]  # (run directory, step that it goes on at)


class RunLog:
    """A run's `metrics.jsonl` and what mirrors it."""

    def __init__(
        self, directory: Path, resume_at: int, mirrors: Sequence[MakeMirror] = (), *, quiet: bool
    ):
        self._lines = JsonLines(directory / "metrics.jsonl", resume_at=resume_at, quiet=quiet)
        self._mirrors = [] if quiet else [make(directory, resume_at) for make in mirrors]

    def write(self, step: int, **numbers: float | int) -> None:
        """One step's numbers; mirrors are not told of those that are not finite."""
        self._lines.write(step=step, **numbers)
        finite = {name: value for name, value in numbers.items() if not _not_finite(value)}
        for mirror in self._mirrors:
            mirror.write(step, finite)

    def close(self) -> None:
        self._lines.close()
        for mirror in self._mirrors:
            mirror.close()


def tensorboard() -> MakeMirror:
    """TensorBoard's event files in the run directory's `tensorboard`, for `train(mirrors=...)`."""
    tensorboardx = _installed("tensorboardX", "tensorboard")

    class Events:
        def __init__(self, directory: Path, resume_at: int):
            self._writer = tensorboardx.SummaryWriter(
                str(directory / "tensorboard"), purge_step=resume_at or None
            )

        def write(self, step: int, numbers: Mapping[str, float | int]) -> None:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

        def close(self) -> None:
            self._writer.close()

    return Events


def weights_and_biases(
    project: str = "dppo_jax", entity: str | None = None, group: str | None = None
) -> MakeMirror:
    """A run of Weights & Biases, called as the run directory, for `train(mirrors=...)`.

    Its id is kept in the directory's `wandb_id`, so that a resumed run goes on there. Log in by
    `wandb login` or WANDB_API_KEY; WANDB_MODE=offline keeps all in the directory.
    """
    wandb = _installed("wandb", "wandb")

    class Run:
        def __init__(self, directory: Path, resume_at: int):
            kept = directory / "wandb_id"
            if not kept.exists():
                kept.write_text(secrets.token_hex(8))
            asked = directory / "config.gin"
            text = asked.read_text(encoding="utf-8") if asked.exists() else ""
            self._run = wandb.init(
                project=project,
                entity=entity,
                group=group,
                name=directory.name,
                id=kept.read_text(),
                resume="allow",
                dir=str(directory),
                config=bindings(text, str(asked)),
            )

        def write(self, step: int, numbers: Mapping[str, float | int]) -> None:
            self._run.log(dict(numbers), step=step)

        def close(self) -> None:
            self._run.finish()

    return Run


def _installed(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(
            f"{module} is not installed: pip install 'dppo-jax[{extra}]' or leave the mirror out"
        ) from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of such a file, which its run may still be writing."""
    return [entry for _, entry in _whole_lines(path)]


def _drop_lines_from(path: Path, step: int) -> None:
    """Leaves the lines of earlier steps; the file is replaced as a whole."""
    kept = [line for line, entry in _whole_lines(path) if entry["step"] < step]
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.write_bytes(b"".join(kept))
    unfinished.replace(path)


def _whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line and its object, without a last one that a crash cut off."""
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            continue
        try:
            entry = json.loads(line)
            _ = entry["step"] < 0
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: no line of a run; mend or remove it"
            ) from error
        yield line, entry


def _not_finite(value) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
