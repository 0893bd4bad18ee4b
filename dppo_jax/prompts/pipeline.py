"""Batches of tokenised prompts: shuffled and endless for training, in order for evaluation.

Counts of prompts are global. With C processes, process i gets rows i*P/C to (i+1)*P/C of each
batch of P prompts: the batch of a step does not depend on how many processes share it.
"""

import functools
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int32

from dppo_jax.prompts.examples import Example
from dppo_jax.prompts.mixture import Curriculum, Stage, stages
from dppo_jax.prompts.tokenizers import Tokenizer

logger = logging.getLogger(__name__)

TooLong = Literal["error", "drop"]


@dataclass(frozen=True)
class PromptBatch:
    """This process's rows of a batch; host arrays. `tokens` and `mask` make a records.Prompts."""

    tokens: Int32[np.ndarray, "P L"]  # left-padded: a prompt's last token is in the last column
    mask: Bool[np.ndarray, "P L"]  # True at prompt tokens
    valid: Bool[np.ndarray, " P"]  # False at rows that only fill up the last evaluation batch
    examples: list[Example]  # one for each row


class PromptIterator:
    """Training batches without end; each epoch is a different permutation of the prompts.

    A batch may begin in one epoch and end in the next. The order depends on `seed` and the number
    of prompts alone; with a Mixture, on its weights too. A `curriculum` says at which steps a
    prompt may be asked. Every prompt is tokenised once at the start, so that one longer than
    `max_prompt_tokens` is found before the first step and not in the thousandth: it raises
    ValueError, or with too_long="drop" is left out and counted in `dropped`.

    Grain's shuffle takes 10 us to place a prompt among thousands, but milliseconds among ten.
    """

    def __init__(
        self,
        source: Sequence[Example],
        tokenizer: Tokenizer,
        *,
        prompts_per_step: int,
        max_prompt_tokens: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        too_long: TooLong = "error",
        curriculum: Curriculum | None = None,
    ):
        _rows_per_process(prompts_per_step, process_index, process_count)  # which checks them
        kept, self._digest = _scan(source, tokenizer, max_prompt_tokens, too_long)
        self.dropped = len(source) - len(kept)
        self.step = 0  # training steps that have had their prompts
        self._ahead = 0  # prompts taken in the present stage beyond prompts_per_step a step
        self._source = source
        self._stages = stages(source, kept, curriculum, seed)
        shape = [(stage.first_step, stage.pools) for stage in self._stages]
        if len(shape) > 1 or len(shape[0][1]) > 1:
            self._digest = hashlib.sha256(repr((self._digest, shape)).encode()).hexdigest()[:16]
        self._prompts_per_step = prompts_per_step
        self._process = process_index, process_count
        self._seed = seed
        # examples -> a batch of them
        self.collate = functools.partial(_batch, tokenizer=tokenizer, columns=max_prompt_tokens)

    @property
    def epoch(self) -> int:
        """Passes over all prompts, of the curriculum's present stage, that are complete."""
        return min(self.epochs.values())

    @property
    def epochs(self) -> dict[str, int]:
        """The same for each set of a mixture; its key is "" where there is but one."""
        return self._stage().passes(self._taken)

    @property
    def _taken(self) -> int:
        """Prompts taken in the present stage."""
        return (self.step - self._stage().first_step) * self._prompts_per_step + self._ahead

    def _stage(self) -> Stage:
        return [stage for stage in self._stages if stage.first_step <= self.step][-1]

    def __iter__(self) -> "PromptIterator":
        return self

    def __next__(self) -> PromptBatch:
        """The prompts of a step that takes `prompts_per_step`, no more and no fewer."""
        batch = self.take(self._prompts_per_step)
        self.end_step()
        return batch

    def take(self, prompts: int) -> PromptBatch:
        """The next `prompts` of this step, counted over all processes, and a process's part."""
        rows = _rows_per_process(prompts, *self._process)
        start = self._taken + self._process[0] * rows
        stream = self._stage().stream
        self._ahead += prompts
        return self.collate([self._source[stream[n]] for n in range(start, start + rows)])

    def end_step(self) -> None:
        """The step has all the prompts that it asks for; a curriculum goes on."""
        stage = self._stage()
        self.step += 1
        same = self._stage() is stage
        self._ahead = self._ahead - self._prompts_per_step if same else 0

    def get_state(self) -> dict[str, int | str]:
        """The position between two steps, for JSON; it is the same in every process."""
        return {
            "step": self.step,
            "ahead": self._ahead,
            "seed": self._seed,
            "prompts_per_step": self._prompts_per_step,
            "digest": self._digest,
        }

    def set_state(self, state: dict[str, int | str]) -> None:
        """Goes to a saved position; the next batch is the one that would have come next.

        The number of processes may have changed. If the prompts, the seed or `prompts_per_step`
        have, the position means nothing here: ValueError.
        """
        own = self.get_state()
        if own.keys() != state.keys():
            raise ValueError(f"not a prompt position: it has {sorted(state)}, not {sorted(own)}")
        for key in ("seed", "prompts_per_step", "digest"):
            if state[key] != own[key]:
                what = "the prompts have changed" if key == "digest" else f"{key} has changed"
                raise ValueError(
                    f"cannot resume the prompts: {what} ({state[key]} when saved, {own[key]} now);"
                    " restore it, or start a new run"
                )
        self.step, self._ahead = int(state["step"]), int(state["ahead"])


def evaluation_batches(
    source: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    prompts_per_step: int,
    max_prompt_tokens: int,
    process_index: int = 0,
    process_count: int = 1,
    too_long: TooLong = "error",
) -> Iterator[PromptBatch]:
    """Every prompt once, in order, in batches of one shape.

    The last batch is filled up by repeating the first prompt, with `valid` False at those rows.
    Every process gets the same number of batches, for its part of each.
    """
    rows = _rows_per_process(prompts_per_step, process_index, process_count)
    kept, _ = _scan(source, tokenizer, max_prompt_tokens, too_long)

    def part(start: int) -> PromptBatch:
        places = range(start + process_index * rows, start + (process_index + 1) * rows)
        examples = [source[kept[place] if place < len(kept) else kept[0]] for place in places]
        valid = np.array([place < len(kept) for place in places])
        return _batch(examples, tokenizer, max_prompt_tokens, valid)

    return (part(start) for start in range(0, len(kept), prompts_per_step))


def _rows_per_process(prompts_per_step: int, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not below {process_count} processes")
    if prompts_per_step < 1 or prompts_per_step % process_count:
        raise ValueError(
            f"prompts_per_step is {prompts_per_step}; it must be a positive multiple of the"
            f" {process_count} processes"
        )
    return prompts_per_step // process_count


def _scan(
    source: Sequence[Example], tokenizer: Tokenizer, max_prompt_tokens: int, too_long: TooLong
) -> tuple[list[int], str]:
    """Rows whose prompts fit, and a digest of them that tells whether a data set has changed."""
    if too_long not in ("error", "drop"):
        raise ValueError(f"too_long is {too_long!r}; it must be 'error' or 'drop'")
    kept = []
    digest = hashlib.sha256()
    for index in range(len(source)):
        example = source[index]
        length = len(tokenizer.encode(example.prompt))
        if length == 0:
            raise ValueError(f"prompt {example.id} has no tokens")
        if length > max_prompt_tokens:
            if too_long == "drop":
                continue
            raise ValueError(
                f"prompt {example.id} has {length} tokens, more than max_prompt_tokens ="
                f" {max_prompt_tokens}: set max_prompt_tokens to {length} or more, or"
                " too_long = 'drop' to leave such prompts out"
            )
        kept.append(index)
        digest.update(repr((example.id, example.prompt)).encode())
    if not kept:
        raise ValueError(
            f"none of the {len(source)} prompts is left"
            + (f" within max_prompt_tokens = {max_prompt_tokens}" if len(source) else "")
        )
    if len(kept) < len(source):
        logger.warning(
            "left out %d of %d prompts longer than %d tokens",
            len(source) - len(kept),
            len(source),
            max_prompt_tokens,
        )
    return kept, digest.hexdigest()[:16]


def _batch(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    columns: int,
    valid: Bool[np.ndarray, " P"] | None = None,
) -> PromptBatch:
    tokens = np.full((len(examples), columns), tokenizer.pad_id, np.int32)
    mask = np.zeros((len(examples), columns), bool)
    for row, example in enumerate(examples):
        ids = tokenizer.encode(example.prompt)
        tokens[row, columns - len(ids) :] = ids
        mask[row, columns - len(ids) :] = True
    if valid is None:
        valid = np.ones(len(examples), bool)
    return PromptBatch(tokens, mask, valid, list(examples))
