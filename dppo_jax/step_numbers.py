"""One step's metrics as numbers, and the numbers that end a run."""

from collections.abc import Sequence

import numpy as np

from dppo_jax.bounds import with_improvement
from dppo_jax.metrics import reduce_metrics
from dppo_jax.records import Metrics


def step_numbers(metrics: Sequence[Metrics]) -> dict[str, float]:
    """One number a metric, over all of the step's gradient steps; `mismatch/*` of the first alone.

    Before the first gradient step the policy is the sampler's, so what differs is numerical, or a
    mismatch that `rollout_policy` makes on purpose.
    """
    first = {name: m for name, m in metrics[0].items() if name.startswith("mismatch/")}
    return with_improvement(reduce_metrics(*metrics) | reduce_metrics(first))


def fraction(value: float | None) -> str:
    """Four decimals; a dash where no token had an advantage, or nothing is ever masked."""
    return "-" if value is None or np.isnan(value) else f"{value:.4f}"


def refuse_not_finite(numbers: dict[str, float], step: int) -> None:
    """Ends a run whose loss or gradient is no number, before it is checkpointed."""
    for name in {"loss/total", "update/gradient_norm", "critic/gradient_norm"} & set(numbers):
        if not np.isfinite(numbers[name]):
            raise FloatingPointError(
                f"{name} is {numbers[name]} at step {step}: lower the learning rate or delta; "
                "the last checkpoint is untouched"
            )
