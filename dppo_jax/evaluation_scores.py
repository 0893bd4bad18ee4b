"""From graded answers to the numbers of an evaluation: avg@k, pass@k, maj@k, with intervals."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

RIGHT = 0.5  # an answer whose score is higher is right, for pass@k


@dataclass(frozen=True)
class Evaluation:
    """What k answers to each of some problems say; intervals are 95 % bootstrap over problems."""

    accuracy: float  # avg@k: the mean score of all answers
    accuracy_low: float
    accuracy_high: float
    pass_at: dict[str, list[float]]  # "1", "2", "4", ..., "k" -> value, low, high
    majority: list[float]  # maj@k -> value, low, high
    k: int
    prompts: int
    response_length: float  # tokens
    finished: float  # share of answers that ended themselves
    truncated: float  # share that ran out of tokens
    verifier_errors: int  # answers that the verifier failed on
    levels: dict[str, dict[str, int | float]]  # level -> prompts, accuracy, pass_at_k, majority
    subjects: dict[str, dict[str, int | float]]
    left_out: int = 0  # problems of the set whose prompts were too long; in no number above

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def as_metrics(self, name: str) -> dict[str, float]:
        """The numbers of a training curve, as `eval/NAME/...`."""
        return {
            f"eval/{name}/accuracy": self.accuracy,
            f"eval/{name}/pass_at_k": self.pass_at[str(self.k)][0],
            f"eval/{name}/majority": self.majority[0],
            f"eval/{name}/response_length": self.response_length,
            f"eval/{name}/truncated": self.truncated,
        }


def summarise(
    *,
    scores: Float[np.ndarray, "P k"],
    majority: Float[np.ndarray, " P"],
    lengths: Int[np.ndarray, "P k"],
    finished: Bool[np.ndarray, "P k"],
    errors: Int[np.ndarray, " P"],
    levels: Sequence[str],
    subjects: Sequence[str],
) -> Evaluation:
    """One row a problem; `majority` is `majority_score` of it, "" a level that is not known."""
    prompts, k = scores.shape
    right = (scores > RIGHT).sum(axis=1)
    passes = {count: pass_at_k(right, k, count) for count in _counts(k)}
    low, high = bootstrap_interval(scores.mean(axis=1))

    def by_label(labels: Sequence[str]) -> dict[str, dict[str, int | float]]:
        table: dict[str, dict[str, int | float]] = {}
        for label in sorted(set(labels) - {""}):
            rows = np.array([each == label for each in labels])
            table[label] = {
                "prompts": int(rows.sum()),
                "accuracy": float(scores[rows].mean()),
                "pass_at_k": float(passes[k][rows].mean()),
                "majority": float(majority[rows].mean()),
            }
        return table

    return Evaluation(
        accuracy=float(scores.mean()),
        accuracy_low=low,
        accuracy_high=high,
        pass_at={str(count): _with_interval(values) for count, values in passes.items()},
        majority=_with_interval(majority),
        k=k,
        prompts=prompts,
        response_length=float(lengths.mean()),
        finished=float(finished.mean()),
        truncated=1.0 - float(finished.mean()),
        verifier_errors=int(errors.sum()),
        levels=by_label(levels),
        subjects=by_label(subjects),
    )


def pass_at_k(right: Int[np.ndarray, " P"], n: int, k: int) -> Float[np.ndarray, " P"]:
    """1 - C(n - c, k) / C(n, k): the chance that k of n answers, c of them right, hold a right one.

    The unbiased estimate from n samples a problem, arXiv 2107.03374 eq. 1, in exact integers.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} answers a problem; there are {n}")
    every = math.comb(n, k)
    return np.array([1.0 - math.comb(n - int(c), k) / every for c in right])


def majority_score(
    extracted: Sequence[str | None], scores: Sequence[float], finished: Sequence[bool]
) -> float:
    """maj@k of one problem: the score of the answer that most of its samples give.

    Answers are one where their texts are, blanks apart: 1/2 and 0.5 vote separately, right or not,
    so nothing leans towards the gold answer. A sample without an answer does not vote, nor does
    one that ran out of tokens unless the verifier gave it a score. Answers that tie share the
    problem; nobody voting is 0. arXiv 2203.11171.
    """
    votes: Counter[str] = Counter()
    worth: dict[str, list[float]] = {}
    for answer, score, ended in zip(extracted, scores, finished, strict=True):
        if answer is not None and (ended or score > 0):
            text = "".join(answer.split())
            votes[text] += 1
            worth.setdefault(text, []).append(score)
    if not votes:
        return 0.0
    most = max(votes.values())
    return float(np.mean([np.mean(worth[text]) for text in votes if votes[text] == most]))


def bootstrap_interval(
    values: Float[np.ndarray, " P"], *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values`, one a problem, resampling problems."""
    rng = np.random.default_rng(seed)
    means = rng.choice(values, (resamples, len(values))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _counts(n: int) -> list[int]:
    """1, 2, 4, ... and n itself."""
    return sorted({2**power for power in range(n.bit_length()) if 2**power <= n} | {n})


def _with_interval(values: Float[np.ndarray, " P"]) -> list[float]:
    return [float(np.mean(values)), *bootstrap_interval(values)]
