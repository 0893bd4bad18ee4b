"""What a verifier says about a response, and the loop that asks it about a batch."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dppo_jax.prompts.examples import Example

logger = logging.getLogger(__name__)


class Verdict(NamedTuple):
    """A response's reward with the evidence for it."""

    score: float
    extracted: str | None  # the part of the response that was judged; None where there was none
    reason: str  # one line for a person who asks why
    error: bool = False  # the verifier failed; the response was not judged


Verifier = Callable[[Example, str, bool], Verdict]
"""(example, response text without end token, finished) -> Verdict.

`finished` says that the policy ended the response itself rather than running out of tokens.
A verifier is a plain function of its arguments: it may run in any process, in any order.
"""


def grade(
    verifier: Verifier,
    examples: Sequence[Example],
    responses: Sequence[str],
    finished: Sequence[bool],
) -> list[Verdict]:
    """The verifier's verdict on every response, in order; the three sequences are parallel.

    A verifier that raises, or returns anything but a Verdict with a finite score, must not end a
    run of days: its verdict is score 0 with the reason and `error` set, so that
    `sum(verdict.error for verdict in verdicts)` counts them. The first of a batch is logged with
    its traceback.
    """
    verdicts: list[Verdict] = []
    logged = False
    for example, response, ended in zip(examples, responses, finished, strict=True):
        try:
            verdicts.append(_checked(verifier(example, response, bool(ended))))
        except Exception as error:  # a user's code: anything can come out of it
            if not logged:
                logger.warning("verifier failed on example %s", example.id, exc_info=True)
                logged = True
            reason = f"verifier failed: {type(error).__name__}: {error}"
            verdicts.append(Verdict(0.0, None, reason, error=True))
    return verdicts


def _checked(verdict: object) -> Verdict:
    if not isinstance(verdict, Verdict):
        raise TypeError(f"the verifier returned {verdict!r}, not a Verdict")
    if not math.isfinite(verdict.score):
        raise ValueError(f"the verifier's score is {verdict.score}, not a finite number")
    return verdict
