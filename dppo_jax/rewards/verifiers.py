"""The verifiers that come with the project; each is `(example, response, finished) -> Verdict`.

Options are keyword-only, so that a configuration can bind them. A response that ran out of tokens
is wrong: what it would have said next is unknown (the `18` it stops at may be the start of `180`).
"""

import re

from dppo_jax.prompts.examples import Example
from dppo_jax.rewards.numbers import first_number, last_number, number_text, parse_number
from dppo_jax.rewards.verdicts import Verdict

_UNFINISHED = "ran out of tokens before its end"


def arithmetic_answer(example: Example, response: str, finished: bool) -> Verdict:
    """1 if the text after the last `=` is exactly the answer, else 0.

    The working before it is not judged, so a policy may find another way to write it.
    """
    before, equals, answer = response.rpartition("=")
    if not equals:
        return Verdict(0.0, None, "no '=' in the response")
    if not finished:
        return Verdict(0.0, answer, _UNFINISHED)
    if answer != example.answer:
        return Verdict(0.0, answer, f"expected {example.answer}")
    return Verdict(1.0, answer, "correct")


def numeric_answer(
    example: Example, response: str, finished: bool, *, require_finished: bool = True
) -> Verdict:
    """1 if the response's number equals the answer as a decimal, else 0.

    The number is the first after the last `####` where there is one, as in GSM8K, else the last in
    the response. `require_finished=False` judges responses that ran out of tokens too. Raises
    ValueError if the example's own answer is not a number.
    """
    gold = parse_number(example.answer)
    if gold is None:
        raise ValueError(f"example {example.id}: answer {example.answer!r} is not a number")
    _, marker, after = response.rpartition("####")
    number = first_number(after) if marker else last_number(response)
    if number is None:
        where = "after '####'" if marker else "in the response"
        return Verdict(0.0, None, f"no number {where}")
    extracted = number_text(number)
    if require_finished and not finished:
        return Verdict(0.0, extracted, _UNFINISHED)
    if number != gold:
        return Verdict(0.0, extracted, f"expected {example.answer}")
    return Verdict(1.0, extracted, "correct")


def story_word(example: Example, response: str, finished: bool, *, min_count: int = 2) -> Verdict:
    """1 if the response holds the answer as a whole word at least `min_count` times, else 0.

    Case does not matter; `balls` is not `ball`, `ball's` is. The response must have ended itself.
    """
    if not example.answer:
        raise ValueError(f"example {example.id} asks for no word: its answer is empty")
    word = re.escape(example.answer)
    count = len(re.findall(rf"(?<!\w){word}(?!\w)", response, re.IGNORECASE))
    extracted = f"{count} x {example.answer}"
    if not finished:
        return Verdict(0.0, extracted, _UNFINISHED)
    if count < min_count:
        return Verdict(0.0, extracted, f"needs {example.answer!r} {min_count} times")
    return Verdict(1.0, extracted, "correct")
