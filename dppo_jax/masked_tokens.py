"""Which tokens a run masked most: the table of the DPPO paper's figure, as text."""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dppo_jax.prompts.tokenizers import Tokenizer

LISTED = 50


class MaskedToken(NamedTuple):
    """A token of the vocabulary over a run's gradient steps."""

    id: int
    text: str
    masked: int  # times
    masked_positive: int  # of them with A > 0: the update would have raised it
    masked_negative: int
    occurrences: int
    share: float  # masked / occurrences


def most_masked(counts: np.ndarray, tokenizer: Tokenizer) -> list[MaskedToken]:
    """The `LISTED` tokens masked most often, most often first; `counts` is TrainState's."""
    positive, negative, occurrences = counts
    masked = positive + negative
    order = np.argsort(-masked, kind="stable")[:LISTED]
    return [
        MaskedToken(
            id=int(i),
            text=tokenizer.decode([int(i)]) if i < tokenizer.vocab_size else "",
            masked=int(masked[i]),
            masked_positive=int(positive[i]),
            masked_negative=int(negative[i]),
            occurrences=int(occurrences[i]),
            share=float(masked[i] / occurrences[i]),
        )
        for i in order
        if masked[i]
    ]


def as_files(tokens: Sequence[MaskedToken]) -> dict[str, str]:
    """The table by file name: for programs and for eyes."""
    rows = ",\n".join(json.dumps(token._asdict(), ensure_ascii=False) for token in tokens)
    return {"masked_tokens.json": f"[\n{rows}\n]\n", "masked_tokens.txt": as_text(tokens)}


def as_text(tokens: Sequence[MaskedToken]) -> str:
    """A line a token, quoted, so that blanks and line ends are seen."""
    lines = [f"{'masked':>8} {'A > 0':>8} {'A < 0':>8} {'of all':>8}  token"]
    lines += [
        f"{token.masked:8d} {token.masked_positive:8d} {token.masked_negative:8d} "
        f"{token.share:8.2%}  {token.text!r}"
        for token in tokens
    ]
    return "\n".join(lines) + "\n"
