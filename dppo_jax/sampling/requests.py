"""What a request asks of the engine and what it gets back, on the host: no arrays of a device."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dppo_jax.records import FINISH_LENGTH, FINISH_STOP

FINISH_NAMES = {FINISH_LENGTH: "length", FINISH_STOP: "stop"}


@dataclass(frozen=True)
class SamplingParams:
    """How one request's `n` samples are drawn; by default from the policy's whole distribution.

    Order: logit_bias and repetition_penalty change the logits, temperature divides them, then
    top_k, top_p and min_p keep a part (`kernels.filters`). temperature 0 takes the most likely
    token. Raises ValueError with one line where a field is out of its range or two contradict.
    """

    max_new_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    # Logits of tokens that the prompt or the response holds: divided by it where positive,
    # multiplied where negative (CTRL, arXiv 1909.05858, section 4.1).
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    stop_ids: tuple[int, ...] = ()  # sampling one ends the response and belongs to it
    stop_strings: tuple[str, ...] = ()  # the response ends with the token that completes one
    seed: int = 0  # same seed, same tokens, whatever the batch is shared with

    def __post_init__(self):
        self._check_kinds()
        if self.max_new_tokens < 1 or self.n < 1:
            raise ValueError("max_new_tokens and n must be at least 1")
        if not self.temperature >= 0 or math.isinf(self.temperature):
            raise ValueError(f"temperature={self.temperature} must be a number, 0 or more")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p < 1:
            raise ValueError(
                f"top_k={self.top_k}, top_p={self.top_p}, min_p={self.min_p}: "
                "top_k is 0 (off) or more, top_p within (0, 1], min_p within [0, 1)"
            )
        # Beyond these a logit may be infinite in float32.
        if not 1e-30 < self.repetition_penalty < 1e30:
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty} must be positive, within 1e30"
            )
        if not all(abs(bias) < 1e38 for _, bias in self.logit_bias):
            raise ValueError(
                f"logit_bias={self.logit_bias}: every bias must be a finite number, within 1e38"
            )
        if "" in self.stop_strings:
            raise ValueError("stop_strings holds an empty string, which every text contains")
        for text in self.stop_strings:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"stop string {text!a} is not valid UTF-8: {error.reason}"
                ) from None

    def _check_kinds(self) -> None:
        for names, kind, what in (
            (("max_new_tokens", "n", "top_k", "seed"), Integral, "must be a whole number"),
            (("temperature", "top_p", "min_p", "repetition_penalty"), Real, "must be a number"),
        ):
            for name in names:
                if not isinstance(getattr(self, name), kind):
                    raise ValueError(f"{name}={getattr(self, name)!r} {what}")
        if not _sequence_of(Integral, self.stop_ids):
            raise ValueError(f"stop_ids={self.stop_ids!r}: give a sequence of token ids")
        if not _sequence_of(str, self.stop_strings):  # one string is a sequence of letters
            raise ValueError(f"stop_strings={self.stop_strings!r}: give a sequence of strings")
        if not _sequence_of(tuple | list, self.logit_bias):
            raise ValueError(
                f"logit_bias={self.logit_bias!r}: give pairs of a token id and what is added"
            )


def _sequence_of(kind: Any, given: object) -> bool:
    return isinstance(given, tuple | list) and all(isinstance(one, kind) for one in given)


@dataclass(frozen=True)
class Timings:
    """Seconds of one sample's life."""

    queue: float  # until its prompt was taken up
    prefill: float
    decode: float


@dataclass(frozen=True)
class Completion:
    """One sample of one request. Arrays are of its own T tokens, the stop token included."""

    tokens: Int[np.ndarray, " T"]
    logp: Float[np.ndarray, " T"]  # under the distribution it was drawn from, or the raw one
    topk_ids: Int[np.ndarray, "T K"]
    topk_logp: Float[np.ndarray, "T K"]
    entropy: Float[np.ndarray, " T"]  # nats
    policy_version: Int[np.ndarray, " T"]  # of the parameters that drew the token
    finish_reason: int  # FINISH_LENGTH or FINISH_STOP
    timings: Timings
    # Where the engine replays truncated sampling: of topk_ids, how many could be drawn; else 0.
    kept_count: Int[np.ndarray, " T"] | None = None
    # The experts of each token, and of the prompt's: of no layer, and None, where not recorded.
    experts: Int[np.ndarray, "T layers k"] | None = None
    prompt_experts: Int[np.ndarray, "L layers k"] | None = None
    error: str | None = None  # why the request was refused, in one line; then there are no tokens

    @property
    def finish_name(self) -> str:
        return "error" if self.error else FINISH_NAMES[self.finish_reason]
