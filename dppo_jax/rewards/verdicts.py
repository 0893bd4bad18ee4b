"""What a verifier says about a response, and the function that asks it about a batch."""

import functools
import inspect
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from dppo_jax.prompts.examples import Example

logger = logging.getLogger(__name__)

_FAILED = "verifier failed: "

Failure = Literal["", "error", "timeout", "crash"]


class Verdict(NamedTuple):
    """A response's reward with the evidence for it."""

    score: float
    extracted: str | None  # the part of the response that was judged; None where there was none
    reason: str  # one line for a person who asks why
    failure: Failure = ""  # how the verifier failed; the response was then not judged
    parts: Mapping[str, float] = {}  # the scores that this one is made of, by name

    @property
    def error(self) -> bool:
        """Whether the verifier failed."""
        return bool(self.failure)


Verifier = Callable[..., Verdict]
"""(example, response text without end token, finished) -> Verdict.

`finished` says that the policy ended the response itself rather than running out of tokens. A
verifier with a parameter named `tokens` is also given the number of the response's tokens, as
tokens=...; None where nobody counted. It is a plain function of its arguments: it may run in any
process, in any order.
"""


@dataclass(frozen=True)
class Limits:
    """What one call of a verifier may use before its process is killed."""

    seconds: float = 1.0  # of processor time
    waiting_seconds: float = 10.0  # of wall time: a verifier that sleeps uses no processor
    memory_mb: int = 2048  # of address space beyond what the worker holds at its start
    processes: bool = False  # whether it may start processes of its own

    def __post_init__(self) -> None:
        for name in ("seconds", "waiting_seconds", "memory_mb"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Limits.{name}={getattr(self, name)} must be positive")


def isolated(limits: Limits, warm_up: Callable[[], None] | None = None) -> Callable:
    """Declares that a verifier must run in a worker process, under these limits.

    For what may hang, crash or eat memory on some text: symbolic algebra, code. A comparison of
    strings needs none and is faster without. A decorator; the verifier's `isolate` holds the
    limits. `warm_up` is called once before workers are made, for imports that take long.
    """

    def declare(verifier: Any) -> Any:
        verifier.isolate, verifier.warm_up = limits, warm_up
        return verifier

    return declare


@dataclass(frozen=True)
class in_worker:  # noqa: N801  a recipe reads it as a verb
    """The verifier, run in a worker process whatever it declares; the limits are of `Limits`."""

    verifier: Verifier
    seconds: float = 1.0
    waiting_seconds: float = 10.0
    memory_mb: int = 2048
    processes: bool = False
    isolate: Limits = field(init=False)

    def __post_init__(self) -> None:
        limits = Limits(self.seconds, self.waiting_seconds, self.memory_mb, self.processes)
        object.__setattr__(self, "isolate", limits)

    @property
    def warm_up(self) -> Callable[[], None] | None:
        """That of the verifier inside."""
        return declared(self.verifier, "warm_up")

    def __call__(
        self, example: Example, response: str, finished: bool, *, tokens: int | None = None
    ) -> Verdict:
        """The verifier's own verdict."""
        return call(self.verifier, example, response, finished, tokens)


def declared(verifier: Callable, name: Literal["isolate", "warm_up"]) -> Any:
    """What a verifier, or the one inside of a partial, declares; None where nothing."""
    while isinstance(verifier, functools.partial) and not hasattr(verifier, name):
        verifier = verifier.func
    return getattr(verifier, name, None)


def grade(
    verifier: Verifier,
    examples: Sequence[Example],
    responses: Sequence[str],
    finished: Sequence[bool],
    tokens: Sequence[int] | None = None,
) -> list[Verdict]:
    """The verifier's verdict on every response, in order; the sequences are parallel.

    A verifier that is declared `isolated` runs in the shared worker pool, any other right here. One
    that raises, hangs or dies, or returns anything but a Verdict with a finite score, must not end
    a run of days: its verdict is score 0 with the reason and `failure` set, so that
    `sum(verdict.error for verdict in verdicts)` counts them. The first of a batch is logged.
    """
    verdicts = _verdicts(verifier, examples, responses, finished, tokens)
    for example, verdict in zip(examples, verdicts, strict=True):
        if verdict.failure:
            logger.warning("verifier failed on example %s: %s", example.id, verdict.reason)
            break
    return verdicts


def _verdicts(
    verifier: Verifier,
    examples: Sequence[Example],
    responses: Sequence[str],
    finished: Sequence[bool],
    tokens: Sequence[int] | None,
) -> list[Verdict]:
    if declared(verifier, "isolate") is not None:
        from dppo_jax.rewards.pool import shared

        return shared.grade(verifier, examples, responses, finished, tokens)
    counts: Sequence[int | None] = tokens if tokens is not None else [None] * len(responses)
    rows = zip(examples, responses, finished, counts, strict=True)
    return [judge(verifier, *row) for row in rows]


def grade_later(
    verifier: Verifier,
    examples: Sequence[Example],
    responses: Sequence[str],
    finished: Sequence[bool],
    tokens: Sequence[int] | None = None,
) -> "Future[list[Verdict]]":
    """`grade`, while the caller goes on; right away for a verifier that runs in this process.

    The verdicts are the same. A thread waits for the pool; it does not hold up the run's end.
    """
    future: Future[list[Verdict]] = Future()

    def work() -> None:
        try:
            future.set_result(grade(verifier, examples, responses, finished, tokens))
        except BaseException as error:
            future.set_exception(error)

    if declared(verifier, "isolate") is None:
        work()
    else:
        threading.Thread(target=work, daemon=True).start()
    return future


def unfit_examples(verifier: Verifier, examples: Sequence[Example]) -> dict[str, str]:
    """The ids of examples whose answers the verifier cannot use, and why.

    Each example's solution, or its answer where it has none, is judged as a response; unfit is one
    at which the verifier raises.
    """
    responses = [example.solution or example.answer for example in examples]
    count = len(examples)
    verdicts = _verdicts(verifier, examples, responses, [True] * count, [0] * count)
    unfit = {}
    for example, verdict in zip(examples, verdicts, strict=True):
        if verdict.failure == "error":
            reason = verdict.reason.removeprefix(_FAILED).removeprefix("ValueError: ")
            unfit[example.id] = reason.removeprefix(f"example {example.id}: ")
    return unfit


def check_examples(
    verifier: Verifier,
    examples: Sequence[Example],
    name: str,
    *,
    max_share: float = 0.05,
    most: int = 1000,
) -> list[str]:
    """Refuses a data set whose answers the verifier cannot use, before anything is trained.

    Of `most` examples, evenly spaced, those that are unfit are counted. Raises ValueError for more
    than `max_share`; fewer are failures that the run counts, and are told in the line that comes
    back.
    """
    count = min(most, len(examples))
    chosen = [examples[place * len(examples) // count] for place in range(count)]
    unfit = unfit_examples(verifier, chosen)
    if not unfit:
        return []
    listed = "; ".join(f"{id_} ({reason})" for id_, reason in list(unfit.items())[:3])
    found = (
        f"the verifier cannot judge {len(unfit)} of {count} examples of {name}, such as {listed}"
    )
    if len(unfit) > max_share * count:
        raise ValueError(f"{found}: choose a verifier for these answers, or drop the examples")
    return [f"{found}: what is answered to them scores 0"]


def judge(
    verifier: Verifier, example: Example, response: str, finished: bool, tokens: int | None
) -> Verdict:
    """The verdict on one response; a failure where the verifier fails."""
    try:
        return _checked(call(verifier, example, response, bool(finished), tokens))
    except MemoryError:
        return failed("crash", "ran out of memory")
    except (Exception, SystemExit) as error:  # a user's code: anything can come out of it
        return failed("error", f"{type(error).__name__}: {error}")


def call(
    verifier: Verifier, example: Example, response: str, finished: bool, tokens: int | None
) -> Any:
    """What the verifier returns, given `tokens` if it takes them."""
    if _takes_tokens(verifier):
        return verifier(example, response, finished, tokens=tokens)
    return verifier(example, response, finished)


def failed(failure: Failure, why: str) -> Verdict:
    """The verdict on a response that could not be judged."""
    return Verdict(0.0, None, _FAILED + " ".join(why.split())[:500], failure)


def _takes_tokens(verifier: Verifier) -> bool:
    try:
        return _has_parameter_tokens(verifier)
    except TypeError:  # a partial with a dictionary or list in it has no hash
        return _has_parameter_tokens.__wrapped__(verifier)


@functools.lru_cache(maxsize=64)
def _has_parameter_tokens(verifier: Verifier) -> bool:
    return "tokens" in inspect.signature(verifier).parameters


def _checked(verdict: object) -> Verdict:
    if not isinstance(verdict, Verdict):
        raise TypeError(f"the verifier returned {verdict!r}, not a Verdict")
    if not math.isfinite(verdict.score):
        raise ValueError(f"the verifier's score is {verdict.score}, not a finite number")
    return verdict
