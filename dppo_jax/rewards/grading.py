"""Anyone's answers under any verifier: what `dppo grade` does."""

import functools
import importlib
import inspect
import json
import os
import sys
from ast import literal_eval
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from dppo_jax.prompts.examples import Example
from dppo_jax.prompts.rows import Row, read_rows
from dppo_jax.rewards.verdicts import Verdict, Verifier, grade

VERIFIERS = {
    "math_answer": "mathematics",
    "multiple_choice": "matches",
    "exact_match": "matches",
    "format_match": "matches",
    "numeric_answer": "verifiers",
    "arithmetic_answer": "verifiers",
    "story_word": "verifiers",
    "code_tests": "code",
}
"""The verifiers that have a name of their own here, and the module of each."""

_OF_THE_CALL = ("example", "response", "finished", "tokens")


class Graded(NamedTuple):
    """A file's verdicts, row by row, and what they come to."""

    lines: list[int]  # where each row stands in the file, counted from 1
    verdicts: list[Verdict]
    totals: dict[str, Any]


def verifier_named(name: str) -> Verifier:
    """A verifier of `VERIFIERS`, or `module.function` of anyone's."""
    module, _, function = name.rpartition(".")
    if not module:
        if name not in VERIFIERS:
            near = get_close_matches(name, VERIFIERS, 1)
            raise ValueError(
                f"no verifier {name!r}"
                + (f"; did you mean {near[0]}?" if near else "")
                + f"; there are {', '.join(VERIFIERS)}, and module.function of your own"
            )
        module, function = f"dppo_jax.rewards.{VERIFIERS[name]}", name
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the installed command does not look where it is called
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"no verifier {name!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"{name} is not a function")
    return found


def settings_of(verifier: Verifier, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments from "NAME.parameter=value" (or "parameter=value"), checked by name."""
    settings = {}
    for override in overrides:
        left, equals, value = override.partition("=")
        parameter = left.removeprefix(name.rpartition(".")[2] + ".")
        if not equals or "." in parameter:
            raise ValueError(f"--gin.{override}: write --gin.{name}.PARAMETER=VALUE")
        try:
            settings[parameter] = literal_eval(value)
        except (ValueError, SyntaxError):
            settings[parameter] = value  # shells eat quotes
    _check_settings(verifier, settings)
    return settings


def grade_file(
    path: Path,
    verifier: Verifier,
    *,
    gold_field: str,
    pred_field: str,
    expect_field: str | None = None,
    settings: Mapping[str, Any] | None = None,
    settings_from: Mapping[str, str] | None = None,
    max_failed: float = 0.1,
) -> Graded:
    """Grades every row of a file. Raises ValueError for a row that lacks a field.

    `settings` are keyword arguments of the verifier; `settings_from` maps others to fields that
    hold a row's own value; a row without the field, or with null, is graded without. `expect_field`
    holds what somebody else said (true or false, or a score): how often the verdict, score > 0.5,
    agrees is counted. A share of more than `max_failed` of rows at which the verifier raises, as it
    does at gold answers that are unfit, is an error.
    """
    if not 0 <= max_failed <= 1:
        raise ValueError(f"--max-failed {max_failed:g}: a share of rows, from 0 to 1")
    _check_settings(verifier, settings_from or {})
    rows = list(read_rows(path))
    examples = [Example(f"{row.place}", "", _text(row, gold_field), "") for row in rows]
    responses = [_text(row, pred_field) for row in rows]
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        own = dict(settings or {}) | {
            parameter: row.value(field)
            for parameter, field in (settings_from or {}).items()
            if row.has(field) and row.value(field) is not None
        }
        groups.setdefault(json.dumps(own, sort_keys=True), []).append(index)
    verdicts: list[Any] = [None] * len(rows)
    for own_text, indices in groups.items():
        own = json.loads(own_text)
        _check_settings(verifier, own)
        judged = grade(
            functools.partial(verifier, **own) if own else verifier,
            [examples[i] for i in indices],
            [responses[i] for i in indices],
            [True] * len(indices),
        )
        for index, verdict in zip(indices, judged, strict=True):
            verdicts[index] = verdict
    lines = [row.number for row in rows]
    failed = [line for line, v in zip(lines, verdicts, strict=True) if v.failure == "error"]
    if len(failed) > max_failed * len(rows):
        first = verdicts[lines.index(failed[0])].reason
        raise ValueError(
            f"{path}: {len(failed)} of {len(rows)} rows cannot be judged, more than "
            f"--max-failed {max_failed:g}: {_places(failed)}; the first: {first}"
        )
    totals = _totals(lines, verdicts)
    if expect_field is not None:
        totals |= _agreement(rows, expect_field, verdicts)
    return Graded(lines, verdicts, totals)


def as_json(graded: Graded) -> dict[str, Any]:
    """The rows and totals as one object."""
    rows = [
        {
            "line": line,
            "score": verdict.score,
            "extracted": verdict.extracted,
            "reason": verdict.reason,
        }
        | ({"failure": verdict.failure} if verdict.failure else {})
        | ({"parts": dict(verdict.parts)} if verdict.parts else {})
        for line, verdict in zip(graded.lines, graded.verdicts, strict=True)
    ]
    return {"rows": rows, "totals": graded.totals}


def show(graded: Graded, say: Callable[[str], None] = print) -> None:
    """A line for each row, then the totals."""
    for line, verdict in zip(graded.lines, graded.verdicts, strict=True):
        extracted = "-" if verdict.extracted is None else _one_line(verdict.extracted)
        if len(extracted) > 40:
            extracted = extracted[:37] + "..."
        reason = _one_line(verdict.reason)
        say(f"{line:>6}  {verdict.score:<5g} {extracted:<40}  {reason}")
    totals = graded.totals
    say(f"{totals['correct']} of {totals['rows']} correct, mean score {totals['mean_score']:.4f}")
    for name, what in (("unparsed", "no answer found"), ("failed", "not judged")):
        if totals[name]:
            say(f"{what} in {totals[name]}: {_places(totals[f'{name}_lines'])}")
    if "agreement" in totals:
        say(f"agreement {totals['agreement']:.4f}; false positives {totals['false_positives']}, "
            f"false negatives {totals['false_negatives']}")  # fmt: skip


def _one_line(text: str) -> str:
    """The text for a terminal, which control characters of an answer must not reach."""
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))


def _totals(lines: Sequence[int], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    pairs = list(zip(lines, verdicts, strict=True))
    unparsed = [line for line, v in pairs if v.extracted is None and not v.failure]
    failed = [line for line, v in pairs if v.failure]
    return {
        "rows": len(verdicts),
        "correct": sum(verdict.score > 0.5 for verdict in verdicts),
        "mean_score": sum(verdict.score for verdict in verdicts) / len(verdicts),
        "unparsed": len(unparsed),
        "unparsed_lines": unparsed,
        "failed": len(failed),
        "failed_lines": failed,
        "timeouts": sum(verdict.failure == "timeout" for verdict in verdicts),
        "crashes": sum(verdict.failure == "crash" for verdict in verdicts),
    }


def _agreement(rows: Sequence[Row], field: str, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    positives: list[int] = []
    negatives: list[int] = []
    for row, verdict in zip(rows, verdicts, strict=True):
        expected = row.value(field)
        if not isinstance(expected, bool | int | float):
            raise row.error(f"field {field!r} is {expected!r}, neither true, false nor a score")
        if (verdict.score > 0.5) != (expected > 0.5):
            (negatives if expected > 0.5 else positives).append(row.number)
    agreement = 1 - (len(positives) + len(negatives)) / len(rows)
    return {
        "agreement": agreement,
        "false_positives": positives,
        "false_negatives": negatives,
    }


def _text(row: Row, field: str) -> str:
    """The field as it stands; a number as text; null is an empty answer."""
    value = row.value(field)
    return value if isinstance(value, str) else row.plain(field)


def _check_settings(verifier: Verifier, settings: Mapping[str, Any]) -> None:
    known = [n for n in inspect.signature(verifier).parameters if n not in _OF_THE_CALL]
    for name in settings:
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise ValueError(
                f"the verifier has no parameter {name!r}"
                + (f"; did you mean {near[0]}?" if near else "")
                + f"; it has {', '.join(known) or 'none'}"
            )


def _places(lines: Sequence[int], shown: int = 10) -> str:
    more = f" and {len(lines) - shown} more" if len(lines) > shown else ""
    return f"line{'s' if len(lines) > 1 else ''} {', '.join(map(str, lines[:shown]))}{more}"
