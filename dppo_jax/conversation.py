"""One prompt's samples as text while they are drawn."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dppo_jax.prompts.streaming import TextStream
from dppo_jax.prompts.tokenizers import Tokenizer
from dppo_jax.sampling.engine import Engine, EngineConfig
from dppo_jax.sampling.requests import Completion, SamplingParams
from dppo_jax.stored_policy import StoredPolicy

CHUNK = 8  # tokens between two looks at what was drawn


class Piece(NamedTuple):
    """Text that one token completes, or several: a character can take more than one."""

    text: str
    logp: float  # of them all


@dataclass
class Sample:
    """One response, as far as it is there."""

    stream: TextStream
    pieces: list[Piece] = field(default_factory=list)
    completion: Completion | None = None
    _waiting: float = 0.0  # the log-probability of tokens that completed no character yet

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    def take(self, tokens: Sequence[int], logp: Sequence[float], last: bool) -> list[Piece]:
        """The pieces that these tokens complete."""
        new = []
        for token, each in zip(tokens, logp, strict=True):
            self._waiting += each
            if text := self.stream.push([token]):
                new.append(Piece(text, self._waiting))
                self._waiting = 0.0
        if last and (text := self.stream.finish()):
            new.append(Piece(text, self._waiting))
        self.pieces += new
        return new


class Conversation(NamedTuple):
    """All samples of a prompt, and what they took."""

    samples: list[Sample]
    seconds: float  # beside those of compiling
    compile_seconds: float

    @property
    def tokens(self) -> int:
        return sum(len(s.completion.tokens) for s in self.samples if s.completion is not None)

    def as_dict(self, prompt: str, logprobs: bool) -> dict[str, Any]:
        rows = []
        for sample in self.samples:
            assert sample.completion is not None
            row: dict[str, Any] = {
                "text": sample.text,
                "tokens": len(sample.completion.tokens),
                "finish_reason": sample.completion.finish_name,
            }
            if logprobs:
                row["token_ids"] = sample.completion.tokens.tolist()
                row["logprobs"] = sample.completion.logp.tolist()
            rows.append(row)
        return {
            "prompt": prompt,
            "samples": rows,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "compile_seconds": self.compile_seconds,
        }


def engine_for(policy: StoredPolicy, tokens: int, samples: int, mesh: Mesh) -> Engine:
    """An engine with room for so many samples of so many tokens, prompt included.

    It compiles as the answers grow: most end long before there are so many tokens.
    """
    config = EngineConfig(
        slots=min(samples, 16),
        max_context=tokens,
        chunk=CHUNK,
        prefix_cache=False,
        top_k_capture=1,
    )
    return Engine(policy.model, config, mesh if mesh.size > 1 else None, policy.tokenizer.decode)


def converse(
    policy: StoredPolicy,
    prompt: str,
    sampling: SamplingParams,
    mesh: Mesh,
    show: Callable[[int, list[Piece]], None] = lambda number, pieces: None,
) -> Conversation:
    """Draws the samples; `show` gets the pieces of one sample after the other, as they come.

    A sample's pieces are shown live once those before it are complete. Raises ValueError where the
    prompt cannot be asked.
    """
    ids = _ids(policy.tokenizer, prompt, policy.model.config.vocab_size)
    engine = engine_for(policy, len(ids) + sampling.max_new_tokens, sampling.n, mesh)
    samples = [Sample(TextStream(policy.tokenizer)) for _ in range(sampling.n)]
    began = time.monotonic()
    with jax.set_mesh(mesh):
        engine.submit(ids, sampling)
        for number, pieces in _in_order(engine, policy, samples):
            show(number, pieces)
    compiling = engine.stats.compile_seconds
    return Conversation(samples, time.monotonic() - began - compiling, compiling)


def _in_order(
    engine: Engine, policy: StoredPolicy, samples: list[Sample]
) -> Iterator[tuple[int, list[Piece]]]:
    at, shown = 0, 0  # the sample that is being shown, and how many pieces of it
    while engine.pending:
        for event in engine.advance(policy.params):
            sample, done = samples[event.sample], event.completion
            if done is not None and done.error:
                raise ValueError(done.error)
            sample.take(event.drawn.tokens.tolist(), event.drawn.logp.tolist(), done is not None)
            sample.completion = done
        while at < len(samples):
            new = samples[at].pieces[shown:]
            shown += len(new)
            if new:
                yield at, new
            if samples[at].completion is None:
                break
            at, shown = at + 1, 0


def _ids(tokenizer: Tokenizer, prompt: str, vocab_size: int) -> np.ndarray:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not valid UTF-8: {error.reason}") from None
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("the prompt has no tokens: give --prompt some text")
    if max(ids) >= vocab_size:
        raise ValueError(
            f"the tokenizer has the id {max(ids)}, the model {vocab_size} tokens: they do not fit"
        )
    return np.array(ids, np.int32)
