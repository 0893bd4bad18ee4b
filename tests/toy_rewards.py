"""Rewards that an untrained policy earns in part, so that tiny runs have gradients."""

import time
from pathlib import Path

from dppo_jax.prompts.examples import Example
from dppo_jax.rewards.verdicts import Limits, Verdict, isolated


def even_digits(example: Example, response: str, finished: bool) -> Verdict:
    """The share of even digits among the characters."""
    share = sum(character in "02468" for character in response) / max(1, len(response))
    return Verdict(share, response, "even digits")


def begins_even(example: Example, response: str, finished: bool) -> Verdict:
    """1 or 0 by the first character: some groups have no spread."""
    return Verdict(float(response[:1] in tuple("02468")), response[:1], "first character")


@isolated(Limits(seconds=20.0, waiting_seconds=20.0))
def waits_for_the_next(example: Example, response: str, finished: bool) -> Verdict:
    """1 once the file that the example's answer names is there; empty: right away."""
    until = time.monotonic() + 15
    while example.answer and not Path(example.answer).exists():
        if time.monotonic() > until:
            return Verdict(0.0, None, f"{example.answer} never came")
        time.sleep(0.01)
    return Verdict(1.0, None, "came")
