"""The host's record of each sample while the engine draws it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dppo_jax.records import FINISH_LENGTH, FINISH_STOP
from dppo_jax.sampling.requests import Completion, SamplingParams, Timings

Detokenize = Callable[[Sequence[int]], str]


class Tokens(NamedTuple):
    """What was drawn and recorded, T tokens of one sample; fields as in `Completion`."""

    tokens: Int[np.ndarray, " T"]
    logp: Float[np.ndarray, " T"]
    topk_ids: Int[np.ndarray, "T K"]
    topk_logp: Float[np.ndarray, "T K"]
    entropy: Float[np.ndarray, " T"]
    policy_version: Int[np.ndarray, " T"]
    kept_count: Int[np.ndarray, " T"]
    experts: Int[np.ndarray, "T layers k"]

    def first(self, count: int) -> "Tokens":
        return Tokens(*(leaf[:count] for leaf in self))


def no_tokens(top_k: int, routed: tuple[int, int] = (0, 0)) -> Tokens:
    """No tokens as they are recorded: with `top_k` ids, and `routed` layers and experts a token."""
    ids, floats = np.zeros(0, np.int32), np.zeros(0, np.float32)
    stored = np.zeros((0, top_k))
    topk = stored.astype(np.int32), stored.astype(np.float32)
    return Tokens(ids, floats, *topk, floats, ids, ids, np.zeros((0, *routed), np.int8))


@dataclass(frozen=True)
class Event:
    """News of one sample after `Engine.advance`: what it drew, and its completion if it ended.

    The `drawn` of all its events, one after the other, are the completion's tokens: none is taken
    back. A stop string that goes over several events ends with the token that completes it.
    """

    request: int
    sample: int
    drawn: Tokens
    completion: Completion | None = None


@dataclass(frozen=True)
class Unfinished:
    """A sample taken out of the engine before its end; `Engine.resume` goes on with it."""

    request: int
    sample: int
    prompt: Int[np.ndarray, " L"]
    sampling: SamplingParams
    so_far: Tokens
    timings: Timings
    prompt_experts: Int[np.ndarray, "L layers k"] | None


def token_ids(prompt: Sequence[int] | np.ndarray) -> np.ndarray:
    """The prompt as an array; ValueError in one line where it is no sequence of whole numbers."""
    try:
        ids = np.asarray(prompt)
    except ValueError:  # of sequences of several lengths
        raise ValueError("a prompt is one sequence of token ids, not several") from None
    if ids.ndim != 1 or (len(ids) and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(
            f"a prompt is one sequence of token ids, not {ids.dtype} numbers of shape {ids.shape}"
        )
    # An id beyond int32 is beyond any vocabulary too, and stays so.
    return np.clip(ids.astype(np.int64), -1, np.iinfo(np.int32).max).astype(np.int32)


@dataclass(eq=False)
class Request:
    """A prompt and its n samples."""

    id: int
    prompt: np.ndarray
    sampling: SamplingParams


@dataclass(eq=False)
class Sample:
    """One sample: waiting in the queue, or in a slot and holding pages."""

    request: Request
    index: int
    drawn: list[Tokens]
    waiting_since: float
    prompt_experts: np.ndarray | None = None  # of its first computation, where they are recorded
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    shard: int = -1
    slot: int = -1  # of all shards'
    pages: list[int] = field(default_factory=list)
    length: int = 0  # tokens whose keys and values are in the pages
    admitted: int = 0  # the order in which slots were given; a larger one is preempted first

    @property
    def count(self) -> int:
        return sum(len(part.tokens) for part in self.drawn)

    @property
    def remaining(self) -> int:
        return self.request.sampling.max_new_tokens - self.count

    @property
    def context(self) -> np.ndarray:
        """Prompt and response so far."""
        return np.concatenate([self.request.prompt, *(part.tokens for part in self.drawn)])

    @property
    def timings(self) -> Timings:
        return Timings(self.queue_seconds, self.prefill_seconds, self.decode_seconds)

    def so_far(self) -> Tokens:
        if len(self.drawn) > 1:
            self.drawn = [Tokens(*(np.concatenate(leaf) for leaf in zip(*self.drawn, strict=True)))]
        return self.drawn[0]

    def take(self, new: Tokens, stopped: bool, detokenize: Detokenize | None) -> Event:
        """Adds what a chunk drew; the event that tells it, with a completion where it ended."""
        before = self.count
        self.drawn.append(new)
        cut = self._stop_string(before, detokenize)
        if cut is not None:
            self.drawn = [self.so_far().first(cut)]
            new, stopped = new.first(cut - before), True
        completion = None
        if stopped or self.remaining == 0:
            reason = FINISH_STOP if stopped else FINISH_LENGTH
            completion = Completion(
                **self.so_far()._asdict(),
                prompt_experts=self.prompt_experts,
                finish_reason=reason,
                timings=self.timings,
            )
        return Event(self.request.id, self.index, new, completion)

    def _stop_string(self, before: int, detokenize: Detokenize | None) -> int | None:
        """How many tokens there are once a stop string is complete; None where none is."""
        strings = self.request.sampling.stop_strings
        if not strings or detokenize is None:
            return None

        def found(count: int) -> bool:
            text = detokenize(tokens[:count])
            return any(string in text for string in strings)

        tokens = self.so_far().tokens.tolist()
        if not found(len(tokens)):
            return None
        return next(count for count in range(before + 1, len(tokens) + 1) if found(count))


def refusal(request: int, sample: int, nothing: Tokens, reason: str) -> Event:
    """The event of a sample that cannot be drawn."""
    completion = Completion(
        **nothing._asdict(),
        finish_reason=FINISH_LENGTH,
        timings=Timings(0.0, 0.0, 0.0),
        error=reason,
    )
    return Event(request, sample, nothing, completion)
