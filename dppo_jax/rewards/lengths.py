"""Rewards for the length of a response, in tokens."""

from dppo_jax.prompts.examples import Example
from dppo_jax.rewards.verdicts import Verdict


def overlong(
    example: Example,
    response: str,
    finished: bool,
    *,
    tokens: int | None,
    max_tokens: int,
    buffer: int = 4096,
    factor: float = 1.0,
) -> Verdict:
    """DAPO's soft overlong punishment, to be added to another reward by `combined.weighted`.

    score = min(0, -factor · (tokens - (max_tokens - buffer)) / buffer): 0 up to max_tokens -
    buffer, then down in a straight line to -factor at `max_tokens`. Source: arXiv:2503.14476 eq.
    13, as in verl@1dda039b. Differs from the paper: nothing is longer than `max_tokens` here, so
    its third case, a flat -1 beyond it, does not occur.
    """
    if not 0 < buffer <= max_tokens:
        raise ValueError(f"buffer={buffer} must be positive and at most max_tokens={max_tokens}")
    beyond = _count(tokens) - (max_tokens - buffer)
    score = min(0.0, -factor * beyond / buffer)
    reason = f"{beyond} tokens into the buffer of {buffer}" if beyond > 0 else "short enough"
    return Verdict(score, f"{tokens} tokens", reason)


def length(
    example: Example,
    response: str,
    finished: bool,
    *,
    tokens: int | None,
    shortest: int = 0,
    longest: int,
) -> Verdict:
    """1 if the response has from `shortest` to `longest` tokens, both included, else 0."""
    if not 0 <= shortest <= longest:
        raise ValueError(f"shortest={shortest} and longest={longest} leave no length between them")
    inside = shortest <= _count(tokens) <= longest
    reason = "within" if inside else "not within"
    return Verdict(float(inside), f"{tokens} tokens", f"{reason} {shortest} to {longest}")


def _count(tokens: int | None) -> int:
    if tokens is None:
        raise ValueError("the response's tokens were not counted: this reward needs their number")
    return tokens
