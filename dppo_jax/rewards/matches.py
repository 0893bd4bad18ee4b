"""Answers that are compared as text: exactly, as a letter of a choice, as a required form."""

import functools
import re

from dppo_jax.prompts.examples import Example
from dppo_jax.rewards.extraction import find_answer
from dppo_jax.rewards.verdicts import Verdict

THINK_THEN_ANSWER = (
    r"\s*<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>\s*"
)
_UNFINISHED = "ran out of tokens before its end"


def exact_match(
    example: Example,
    response: str,
    finished: bool,
    *,
    ignore_case: bool = False,
    ignore_space: bool = True,
    after: str = "",
) -> Verdict:
    """1 if the response is the answer, character by character, else 0.

    `after` judges only what follows the last such text. Space at the ends never counts; runs of
    space inside count as one blank with `ignore_space`.
    """
    given = response
    if after:
        _, marker, given = response.rpartition(after)
        if not marker:
            return Verdict(0.0, None, f"no {after!r} in the response")
    texts = [given.strip(), example.answer.strip()]
    if ignore_space:
        texts = [" ".join(text.split()) for text in texts]
    if ignore_case:
        texts = [text.casefold() for text in texts]
    equal = texts[0] == texts[1]
    return Verdict(float(equal), texts[0], "correct" if equal else f"expected {example.answer}")


def multiple_choice(
    example: Example, response: str, finished: bool, *, letters: str = "ABCDEFGHIJ"
) -> Verdict:
    """1 if the response chooses the answer's letter, else 0.

    The choice is the letter in the last box; else the first after the last `answer`; else the one
    that begins a line, `B.` or `(B)`; else the last that stands alone. Capital letters only, but
    for a response that is one letter. The example's answer is read the same way, so `(D) Alina` is
    D. Raises ValueError if it holds no letter.
    """
    gold = chosen_letter(example.answer, letters)
    if gold is None:
        raise ValueError(
            f"example {example.id}: answer {example.answer!r} holds none of the letters {letters}"
        )
    choice = chosen_letter(response, letters)
    if choice is None:
        return Verdict(0.0, None, f"no letter of {letters} in the response")
    return Verdict(
        float(choice == gold), choice, "correct" if choice == gold else f"expected {gold}"
    )


def chosen_letter(text: str, letters: str) -> str | None:
    """The letter that a text settles on, or None; see `multiple_choice`."""
    if not letters.isalpha() or not letters.isupper():
        raise ValueError(f"letters={letters!r}: give capital letters, such as ABCD")
    alone, first, after_answer = _letter_patterns(letters)
    found = find_answer(text, ("boxed",))
    piece = (found.text if found else text).strip()
    # Bounded: two runs of the same signs side by side take quadratic time to fail.
    marks = r"[({\[*\s]{0,9}"
    if bare := re.fullmatch(marks + r"(?:\\text\{)?" + marks + r"([a-zA-Z])[)}\]*.\s]*", piece):
        return bare[1].upper() if bare[1].upper() in letters else None
    for pattern, last in ((after_answer, True), (first, False), (alone, True)):
        matches = [match[1] for match in pattern.finditer(piece)]
        if matches:
            return matches[-1 if last else 0]
    return None


@functools.lru_cache(maxsize=16)
def _letter_patterns(letters: str) -> tuple[re.Pattern[str], ...]:
    letter = rf"(?<![A-Za-z0-9'])([{letters}])(?![A-Za-z0-9'])"
    return (
        re.compile(letter),
        re.compile(rf"^[(\[*\s]{{0,4}}([{letters}])(?=[)\].:*,。、]|\s[A-Z]|$)", re.MULTILINE),
        # Not across another "answer", so that each finds its own letter in linear time.
        re.compile(rf"(?:(?i:answer)|答案)(?:(?!(?i:answer)).){{0,60}}?{letter}", re.DOTALL),
    )


def format_match(
    example: Example,
    response: str,
    finished: bool,
    *,
    pattern: str = THINK_THEN_ANSWER,
    require_finished: bool = True,
) -> Verdict:
    """1 if the whole response has the form of a regular expression, else 0.

    The default is the think and answer tags of DeepSeek-R1-Zero (arXiv:2501.12948), each once. A
    `.` matches line ends too. A pattern of your own that backtracks without end stops a run unless
    it is wrapped in `verdicts.in_worker`. Raises ValueError for a pattern that does not compile.
    """
    compiled = _compiled(pattern)
    if require_finished and not finished:
        return Verdict(0.0, None, _UNFINISHED)
    if compiled.fullmatch(response) is None:
        return Verdict(0.0, None, "the response does not have the required form")
    return Verdict(1.0, None, "has the required form")


@functools.lru_cache(maxsize=16)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"pattern={pattern!r}: not a regular expression ({error})") from error
