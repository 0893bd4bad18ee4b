"""Problems that are asked in training and in evaluation: they make an evaluation worthless."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from dppo_jax.prompts.examples import Example

OnOverlap = Literal["warn", "refuse"]

_LAYOUT = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|text|textbf|mathrm|mathbf|quad|qquad|,|;|!|:| )"
    r"(?![a-zA-Z])"
)
_WORDS = re.compile(r"[^\W_]+|[-+*/^=<>_]")


class Overlap(NamedTuple):
    """Pairs of ids, (evaluation, training)."""

    exact: list[tuple[str, str]]
    normalised: list[tuple[str, str]]  # those whose texts differ in layout alone


def normalised(text: str) -> str:
    r"""The text's words, numbers and operators in lower case, parted by single blanks.

    Punctuation, dollar signs, braces and LaTeX's layout commands leave no trace; \dfrac is \frac.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = _LAYOUT.sub(" ", text).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return " ".join(_WORDS.findall(text))


def find_overlap(train: Iterable[Example], held_out: Iterable[Example]) -> Overlap:
    """The problems of `held_out` that `train` holds too, as they stand or but for layout."""
    exact: dict[str, str] = {}
    loose: dict[str, str] = {}
    for example in train:
        exact.setdefault(example.prompt, example.id)
        loose.setdefault(normalised(example.prompt), example.id)
    found = Overlap([], [])
    for example in held_out:
        if example.prompt in exact:
            found.exact.append((example.id, exact[example.prompt]))
        elif (text := normalised(example.prompt)) and text in loose:
            found.normalised.append((example.id, loose[text]))
    return found


def check_overlap(
    train: Sequence[Example], held_out: Mapping[str, Sequence[Example]], policy: OnOverlap
) -> list[str]:
    """One line for each evaluation set that shares problems with training; ValueError to refuse."""
    lines = []
    for name, examples in held_out.items():
        found = find_overlap(train, examples)
        if not (found.exact or found.normalised):
            continue
        pairs = ", ".join(f"{ours} = {theirs}" for ours, theirs in sum(found, [])[:3])
        lines.append(
            f"{len(found.exact) + len(found.normalised)} of the {len(examples)} problems of {name}"
            f" are in the training set too ({len(found.exact)} word for word): {pairs}"
        )
    if lines and policy == "refuse":
        raise ValueError(f"{'; '.join(lines)}; remove them from one, or set overlap = 'warn'")
    return lines
