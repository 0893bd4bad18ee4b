"""Sampled responses as text with the verifier's verdicts, in memory and in `answers.jsonl`."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from dppo_jax.evaluation_scores import Evaluation, majority_score, summarise
from dppo_jax.hosts import exchange
from dppo_jax.metrics import JsonLines
from dppo_jax.multihost import RowShare, gather_parts, gather_rows
from dppo_jax.prompts.examples import Example
from dppo_jax.prompts.rows import Row, read_rows
from dppo_jax.prompts.tokenizers import Tokenizer
from dppo_jax.records import FINISH_STOP
from dppo_jax.rewards.verdicts import Failure, Verdict, Verifier, grade, grade_later

FAILURES = get_args(Failure)


class Answers(NamedTuple):
    """This process's graded responses, on the host; row p*G + g answers prompt p."""

    texts: list[str]
    finished: list[bool]
    lengths: np.ndarray  # [B] response tokens
    verdicts: list[Verdict]


class Graded(NamedTuple):
    """A step's verdicts of all parts of the batch, in numbers, the same in every process."""

    rewards: np.ndarray  # [parts, prompts of a part, G] float32
    lengths: np.ndarray  # [B] response tokens
    finished: np.ndarray  # [B] bool
    failures: np.ndarray  # [B] a place in FAILURES
    parts: dict[str, np.ndarray]  # [B] scores of a weighted reward's parts; NaN where one has none


def everyones(answers: Answers, samples_per_prompt: int, share: RowShare) -> Graded:
    """All processes' answers graded, where each has its own part of the rows."""
    own = sorted({name for verdict in answers.verdicts for name in verdict.parts})
    names = sorted(
        {name for text in exchange("parts", json.dumps(own)) for name in json.loads(text)}
    )
    table = np.array(
        [
            (
                verdict.score,
                length,
                finished,
                FAILURES.index(verdict.failure),
                *(verdict.parts.get(name, np.nan) for name in names),
            )
            for verdict, length, finished in zip(
                answers.verdicts, answers.lengths, answers.finished, strict=True
            )
        ],
        np.float32,  # exact for lengths below 2^24
    )
    every = gather_parts(table, share)
    scores, lengths, finished, failures, *parts = every.reshape(-1, every.shape[-1]).T
    return Graded(
        rewards=scores.reshape(share.count, -1, samples_per_prompt),
        lengths=lengths.astype(int),
        finished=finished.astype(bool),
        failures=failures.astype(int),
        parts=dict(zip(names, parts, strict=True)),
    )


def answers_of(
    drawn: Sequence[np.ndarray],
    finish_reasons: Sequence[int],
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    verifier: Verifier,
) -> Callable[[], Answers]:
    """Responses as text, and what the verifier says of them once the result is called.

    Until then an isolated verifier works in its own processes, while the caller goes on. The
    responses of a prompt follow one another.
    """
    texts = [tokenizer.decode(tokens.tolist()) for tokens in drawn]
    finished = [reason == FINISH_STOP for reason in finish_reasons]
    each = [example for example in examples for _ in range(len(drawn) // len(examples))]
    lengths = np.array([len(tokens) for tokens in drawn])
    verdicts = grade_later(verifier, each, texts, finished, lengths.tolist())
    return lambda: Answers(texts, finished, lengths, verdicts.result())


def together(parts: Sequence[Answers]) -> Answers:
    """All answers of several batches, in order."""
    return Answers(
        [text for part in parts for text in part.texts],
        [ended for part in parts for ended in part.finished],
        np.concatenate([part.lengths for part in parts]),
        [verdict for part in parts for verdict in part.verdicts],
    )


def together_graded(batches: Sequence[Graded]) -> Graded:
    """The verdicts of several batches as those of one."""
    names = sorted({name for batch in batches for name in batch.parts})

    def scores(batch: Graded, name: str) -> np.ndarray:
        return batch.parts.get(name, np.full(len(batch.lengths), np.nan, np.float32))

    return Graded(
        rewards=np.concatenate([batch.rewards for batch in batches], axis=1),
        lengths=np.concatenate([batch.lengths for batch in batches]),
        finished=np.concatenate([batch.finished for batch in batches]),
        failures=np.concatenate([batch.failures for batch in batches]),
        parts={name: np.concatenate([scores(b, name) for b in batches]) for name in names},
    )


def answer_metrics(graded: Graded) -> dict[str, float]:
    """What a step logs of its answers; parts of a weighted reward too."""
    rewards = graded.rewards.reshape(-1, graded.rewards.shape[-1])  # [P, G]
    failures = [FAILURES[code] for code in graded.failures]
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/groups_with_spread": float(np.ptp(rewards, axis=1).astype(bool).mean()),
        "reward/verifier_errors": len(failures) - failures.count(""),
        "reward/verifier_timeouts": failures.count("timeout"),
        "reward/verifier_crashes": failures.count("crash"),
        **{f"reward/{name}": float(np.nanmean(each)) for name, each in graded.parts.items()},
        "response/length": float(graded.lengths.mean()),
        "response/finished": float(np.mean(graded.finished)),
        "response/tokens": int(graded.lengths.sum()),
    }


def log_samples(
    log: JsonLines, step: int, examples: Sequence[Example], answers: Answers, count: int
) -> None:
    """The first `count` answers of a training step, for people to read."""
    samples = len(answers.texts) // len(examples)
    for row in range(min(count, len(answers.texts))):
        log.write(
            step=step,
            prompt=examples[row // samples].prompt,
            response=answers.texts[row],
            finished=answers.finished[row],
            score=answers.verdicts[row].score,
            reason=answers.verdicts[row].reason,
        )


class Answered(NamedTuple):
    """One problem with all of its k answers: a line of `answers.jsonl`."""

    set: str
    example: Example
    responses: list[str]
    finished: list[bool]
    lengths: list[int]
    verdicts: list[Verdict]

    def as_dict(self) -> dict[str, Any]:
        answers = [
            {"response": response, "finished": ended, "tokens": length, **verdict._asdict()}
            for response, ended, length, verdict in zip(
                self.responses, self.finished, self.lengths, self.verdicts, strict=True
            )
        ]
        return {"set": self.set, "example": self.example._asdict(), "answers": answers}


def by_problem(
    name: str, examples: Sequence[Example], valid: Sequence[bool] | np.ndarray, answers: Answers
) -> list[Answered]:
    """A batch's answers, a row for each problem that is no filler."""
    samples = len(answers.texts) // len(examples)
    rows = []
    for place, (example, real) in enumerate(zip(examples, valid, strict=True)):
        own = slice(place * samples, (place + 1) * samples)
        if real:
            rows.append(
                Answered(
                    name,
                    example,
                    answers.texts[own],
                    answers.finished[own],
                    [int(length) for length in answers.lengths[own]],
                    answers.verdicts[own],
                )
            )
    return rows


def evaluation_of(
    answered: Sequence[Answered],
    k: int,
    everything: Iterable[Example],
    places: Sequence[int] | None = None,
) -> Evaluation:
    """The numbers of all processes' answers; `everything` is the whole set, for its labels.

    `places` are the problems' in the set, so that their order is that of one process.
    """
    labels = sorted({label for e in everything for label in (e.level, e.subject)})
    place = {label: number for number, label in enumerate(labels)}
    rows = [
        (
            [verdict.score for verdict in row.verdicts],
            majority_score(
                [v.extracted for v in row.verdicts], [v.score for v in row.verdicts], row.finished
            ),
            row.lengths,
            row.finished,
            sum(verdict.error for verdict in row.verdicts),
            place[row.example.level],
            place[row.example.subject],
            at,
        )
        for row, at in zip(answered, places or range(len(answered)), strict=True)
    ]
    shapes: list[tuple[type, tuple[int, ...]]] = [
        (np.float64, (k,)), (np.float64, ()), (np.int64, (k,)), (np.bool_, (k,)), (np.int64, ()),
        (np.int64, ()), (np.int64, ()), (np.int64, ()),
    ]  # fmt: skip
    *columns, where = (
        gather_rows(np.array([row[i] for row in rows], kind).reshape(-1, *shape))
        for i, (kind, shape) in enumerate(shapes)
    )
    scores, majority, lengths, finished, errors, levels, subjects = (
        column[np.argsort(where)] for column in columns
    )
    return summarise(
        scores=scores,
        majority=majority,
        lengths=lengths.astype(int),
        finished=finished,
        errors=errors,
        levels=[labels[i] for i in levels],
        subjects=[labels[i] for i in subjects],
    )


def write_answers(path: Path, rows: Sequence[tuple[int, Answered]]) -> None:
    """The file as a whole or not at all; `rows` go with their steps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.new")
    with unfinished.open("w") as file:
        for step, row in rows:
            file.write(json.dumps({"step": step, **row.as_dict()}) + "\n")
    unfinished.replace(path)


def read_answers(paths: Sequence[Path]) -> Iterator[tuple[int, Answered]]:
    """Every problem of answers files, with the step that it was asked at."""
    for path in paths:
        for row in read_rows(path):
            yield _parse(row)


def regrade(rows: Sequence[Answered], verifier: Verifier) -> list[Answered]:
    """The same answers with the verdicts of `verifier`, all graded as one batch."""
    verdicts = iter(
        grade(
            verifier,
            [row.example for row in rows for _ in row.responses],
            [response for row in rows for response in row.responses],
            [finished for row in rows for finished in row.finished],
            [length for row in rows for length in row.lengths],
        )
    )
    return [row._replace(verdicts=[next(verdicts) for _ in row.responses]) for row in rows]


def _parse(row: Row) -> tuple[int, Answered]:
    try:
        fields = row.fields
        example = Example(**fields["example"])
        if any(not isinstance(value, str) for value in example):
            raise TypeError("the example's fields must be strings")
        answers = fields["answers"]
        verdicts = [Verdict(float(a["score"]), *(a[f] for f in Verdict._fields[1:]))
                    for a in answers]  # fmt: skip
        responses, finished = (
            [a["response"] for a in answers],
            [bool(a["finished"]) for a in answers],
        )
        if not answers or any(not isinstance(text, str) for text in responses):
            raise TypeError("answers must be a list of objects with a response each")
        lengths = [int(a["tokens"]) for a in answers]
        answered = Answered(str(fields["set"]), example, responses, finished, lengths, verdicts)
        return int(fields["step"]), answered
    except (KeyError, TypeError, ValueError) as error:
        raise row.error(
            f"not a line of an answers file ({type(error).__name__}: {error}); a run writes them as"
            " answers.jsonl"
        ) from error
