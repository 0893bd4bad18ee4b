"""Answers in mathematics: found in the response, compared as text, as numbers, as expressions."""

import logging
import re
from collections.abc import Sequence
from typing import Any

from dppo_jax.prompts.examples import Example
from dppo_jax.rewards.extraction import Found, Place, find_answer
from dppo_jax.rewards.matches import chosen_letter
from dppo_jax.rewards.numbers import last_number, number_text, parse_number
from dppo_jax.rewards.plain_latex import plain, same
from dppo_jax.rewards.verdicts import Limits, Verdict, isolated

_PLACES: tuple[Place, ...] = ("final", "boxed", "hashes", "answer", "anywhere")
_MARKED = ("final", "boxed", "hashes", "answer", "whole")  # places that only an answer stands at
_MARKUP = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\f?box|####|(?i:\banswer\b)")
_CJK = "\u3000-\u303f\u3400-\u9fff\uff00-\uffef"
_CJK_EDGE = re.compile(rf"(?<=[{_CJK}])(?=[-0-9$\\])|(?<=[0-9$])(?=[{_CJK}])")
_WORDS = re.compile(
    rf"(?<![\\a-zA-Z])(?:[a-zA-Z]{{3,}}|(?i:is|so|it|we|to|of)(?![a-zA-Z]))|[{_CJK}]"
)
_LETTER = re.compile(r"\\(?:mathrm|text|textrm)\{([ei])\}")
_LETTERS = "ABCDEFGHIJ"
_LETTER_GOLD = re.compile(
    rf"\(?[{_LETTERS}]\)?|(?:.*\n)?\([{_LETTERS}]\) ?[A-Za-z].*"
)  # C, (C) Cecile
_SHOWN = 200
_WARM = (
    (r"\frac{1}{2}", r"\frac{2}{4}"), ("(0,1]", "[0,1)"), ("x>5", "x<=3"), ("(1,2)", "(x,y)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}3\\4\end{pmatrix}"),
    (r"\{1,2\}", r"\{2,3\}"), (r"\sqrt[3]{2}\pi", r"\sin(x)+\log_2 3"), ("3+4i", "10!"),
    (r"x^2-3x+\frac{a}{b}", "y=2x-1"), (r"A\cup B", r"(-\infty,3)\cup(3,\infty)"),
)  # fmt: skip


def _warm_up() -> None:
    """Imports the algebra and builds the tables of its grammar, for each kind of answer.

    Workers inherit them. One that had to build its own would spend half a second, after each hang.
    """
    for gold, answer in _WARM:
        for text in (f"so $x = 0.5$, which is \\boxed{{{answer}}}", f"Thus it is ${answer}$ then"):
            math_answer(Example("warm-up", "", gold, ""), text, True)


# Measured in workers on a crowded core: of 5,000 answers that only algebra finds equal none took
# over 0.22 s, and 99.9 % of wrong ones less than 0.18 s. Nearly all that takes longer is unfinished
# prose read as formulas, which scores 0 either way.
@isolated(Limits(seconds=0.3, waiting_seconds=5.0), _warm_up)
def math_answer(
    example: Example,
    response: str,
    finished: bool,
    *,
    places: Sequence[str] = _PLACES,
    forms: Sequence[str] = ("latex", "expr"),
    symbolic: bool = True,
    precision: int = 6,
    allow_set_relation: bool = False,
    max_characters: int = 1000,
    require_finished: bool = False,
) -> Verdict:
    """1 if the response's answer equals the example's, else 0.

    The answer is looked for in `places`, in order; `find_answer` says what each is. Two answers are
    equal if their plain forms are (`plain`), or if math-verify (0.9, Hugging Face) holds the
    expressions equal: LaTeX and, where `forms` has "expr", plain numbers and sums; decimals after
    rounding to `precision` places; an interval for an inequality with `allow_set_relation`.
    `symbolic=False` stops at the plain forms, as MATH's own grader does. An answer of more than
    `max_characters` is compared as text only. Where the answer is one letter of a choice, `C` or
    `(C)`, it may stand in a sentence. The gold answer may stand in a text too. Raises
    ValueError if the example has no answer.

    Some texts keep a computer algebra system busy for ever. This function sets no limit of its own:
    it is declared isolated, so `grade` runs it in the worker pool, which does. On a machine so slow
    or crowded that right answers meet it, `verdicts.in_worker` around this one sets another.
    """
    for name, known in (("places", (*_PLACES, "whole")), ("forms", ("latex", "expr"))):
        given = {"places": places, "forms": forms}[name]
        if isinstance(given, str) or not given or not set(given) <= set(known):
            raise ValueError(f"{name}={given!r}: give a sequence of {', '.join(known)}")
    gold = _gold(example.answer)
    if gold is None:
        raise ValueError(f"example {example.id}: its answer is empty")
    found = find_answer(response, places)
    if found is None:
        return Verdict(0.0, None, f"no answer found ({', '.join(places)})")
    if require_finished and not finished:
        return Verdict(0.0, _shown(found.text), "ran out of tokens before its end")
    return _compare(gold, found, forms, symbolic, precision, allow_set_relation, max_characters)


def _compare(
    gold: Found,
    found: Found,
    forms: Sequence[str],
    symbolic: bool,
    precision: int,
    allow_set_relation: bool,
    max_characters: int,
) -> Verdict:
    expected = f"expected {_shown(gold.text)}"
    wanted = plain(gold.text)
    # Where numbers are listed a comma is none of thousands: "100,200" answers "100, 200".
    text = plain(found.text.replace(",", ", ") if ", " in wanted else found.text)
    if same(text, wanted):
        return Verdict(1.0, _shown(found.text), "correct: the same text")
    if _is_answer(found) and _is_answer(gold):
        ours, theirs = parse_number(text), parse_number(wanted)
        if ours is not None and theirs is not None and "." not in f"{ours}{theirs}":
            equal = ours == theirs  # whole numbers: nothing is left to compare
            return Verdict(float(equal), _shown(found.text), "correct" if equal else expected)
    if not found.exact and _LETTER_GOLD.fullmatch(gold.text.strip()):
        letter, right = (chosen_letter(t, _LETTERS) for t in (found.text, gold.text))
        return Verdict(float(letter == right), letter, "correct" if letter == right else expected)
    if not symbolic:
        return Verdict(0.0, _shown(found.text), expected)
    if len(found.text) > max_characters and found.exact:
        return Verdict(0.0, _shown(found.text), f"{expected}; too long to be compared as formula")
    target, shown = _parse(found, forms)
    shown = found.text if found.exact else shown
    if target is None:
        extracted = _shown(found.text) if found.place in _MARKED else None
        return Verdict(0.0, extracted, f"{expected}; no expression found")
    return _verify(
        _parse(gold, forms)[0], target, shown or found.text, expected, precision, allow_set_relation
    )


def _verify(
    gold: Any, target: Any, shown: str, expected: str, precision: int, allow_set_relation: bool
) -> Verdict:
    from math_verify import verify

    equal = gold is not None and verify(
        gold,
        target,
        float_rounding=precision,
        allow_set_relation_comp=allow_set_relation,
        timeout_seconds=None,
    )
    return Verdict(float(equal), _shown(shown), "correct" if equal else expected)


def _gold(answer: str) -> Found | None:
    """The data set's answer: itself, unless it is a text with the answer in it."""
    answer = answer.strip()
    if _MARKUP.search(answer):
        return find_answer(answer, _PLACES)
    return Found(answer, "whole", True) if answer else None


def _is_answer(found: Found) -> bool:
    """Whether the piece is an answer with nothing around it."""
    text = found.text
    if found.exact:
        return True
    inner = text.strip().strip("$")
    if "\n" in text or "$" in inner or "\\(" in text[2:] or "\\[" in text[2:]:
        return False
    return not _WORDS.search(inner) and (len(inner) < 100)


def _parse(found: Found, forms: Sequence[str]) -> tuple[Any, str | None]:
    """math-verify's readings of the piece, or None; and the text of the expression."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that no limit is set
    configs = {
        "latex": LatexExtractionConfig(boxed_match_priority=0),
        "expr": ExprExtractionConfig(),
    }
    targets = [configs[form] for form in forms]
    text = _LETTER.sub(r" \1 ", _CJK_EDGE.sub(" ", found.text))
    readings = []
    if "latex" in forms and _is_answer(found):
        readings = parse(f"\\boxed{{{text.strip().strip('$')}}}", targets, parsing_timeout=None)
    if not found.exact or not readings:
        readings += parse(text, targets, parsing_timeout=None)
    if not readings and "expr" in forms and found.place != "boxed":
        number = last_number(text) if _CJK_EDGE.search(found.text) else None
        if number is not None:
            readings = parse(number_text(number), targets, parsing_timeout=None)
    if not readings:
        return None, None
    return readings, next((r for r in readings if isinstance(r, str)), None)


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
