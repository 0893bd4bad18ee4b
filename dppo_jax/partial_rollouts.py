"""Partial rollouts: a step ends once enough groups are complete, and the rest goes on in the next.

train.train.rollouts = @rollouts.continuous()
train.train.partial_rollouts = @partial_rollouts.PartialRollouts()
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from dppo_jax.answers import Answers, answer_metrics, answers_of, everyones, together
from dppo_jax.collect import Asking, Collected, prompts_of
from dppo_jax.dynamic_sampling import DynamicSampling
from dppo_jax.elsewhere import Elsewhere
from dppo_jax.models.decoder import Params
from dppo_jax.multihost import row_share, to_global_rows
from dppo_jax.prompts.examples import Example
from dppo_jax.prompts.pipeline import PromptIterator
from dppo_jax.sampling.engine import Engine, Unfinished
from dppo_jax.sampling.requests import Completion
from dppo_jax.sampling.rollouts import Continuous, RolloutSource, from_completions, request_of
from dppo_jax.sharding import batch_sharding
from dppo_jax.timing import Stopwatch


@dataclass(frozen=True)
class PartialRollouts:
    """Keeps `extra_prompts` more prompts in flight than a step trains on, and carries them over.

    A step ends with the first prompts_per_step groups that are complete, in the order in which
    their prompts were drawn. Samples that are unfinished then go on in the next step with its
    parameters; each of their tokens keeps the version, and the log-probability, of the parameters
    that drew it. So no chip waits for the longest response, and a long one is trained on late
    rather than cut (Kimi k1.5, arXiv 2501.12599, section 2.6.2). Differs from the paper: what ends
    a step is a number of groups, not a number of tokens.
    """

    extra_prompts: int

    def __post_init__(self):
        if self.extra_prompts < 1:
            raise ValueError(
                f"PartialRollouts.extra_prompts={self.extra_prompts}: with none in reserve a step "
                "waits for its longest response"
            )


@dataclass(eq=False)
class _Group:
    """A prompt in flight."""

    example: Example
    samples: list[Completion | Unfinished | None]
    answers: Callable[[], Answers] | None = None  # once it is complete

    @property
    def complete(self) -> bool:
        return self.answers is not None


def check_partial(
    source: RolloutSource, dynamic: DynamicSampling | None, rollout_batches: int
) -> Continuous:
    """The source, where it and the other settings go with partial rollouts."""
    if isinstance(source, Elsewhere):
        raise ValueError(
            "partial_rollouts keeps its engine where training is: set sampler_devices to 0"
        )
    if not isinstance(source, Continuous):
        raise ValueError(
            "partial_rollouts takes samples out of the engine and puts them back: bind "
            "train.train.rollouts = @rollouts.continuous()"
        )
    if jax.process_count() > 1:
        raise ValueError(
            "partial_rollouts works in one process: leave it out, or start one process alone"
        )
    if dynamic is not None or rollout_batches > 1:
        raise ValueError(
            "partial_rollouts goes with neither dynamic_sampling nor rollout_batches: choose one"
        )
    return source


@dataclass
class PartialCollector:
    """What `collect.Collector` is, for steps that carry samples over. One process only."""

    source: Continuous
    prompts: PromptIterator
    asking: Asking
    partial: PartialRollouts
    _flight: list[_Group] = field(default_factory=list, init=False)
    _again: list[Example] = field(default_factory=list, init=False)  # from before a resumption

    def begins(self) -> dict[str, Any]:
        """Where the prompts of the next step begin."""
        return self.prompts.get_state()

    def carried(self) -> list[Any]:
        """The prompts in flight, for a checkpoint: what was drawn for them is not kept.

        A run that is resumed asks them again, from their beginning and before any other.
        """
        return [list(e) for e in [*(group.example for group in self._flight), *self._again]]

    def carry(self, examples: list[Any]) -> None:
        """The prompts that were in flight when the run was left."""
        self._again = [Example(*fields) for fields in examples]

    def __call__(
        self, params: Params, key: jax.Array, clock: Stopwatch, *, version: int
    ) -> Collected:
        """A batch for the step after `version` steps; leaves the prompts at the step's end."""
        engine = self.source.engine(params, self.asking.sampling)
        new = self._new_groups()
        self._sample(engine, params, key, new, version)
        done = [group for group in self._flight if group.complete][: self.asking.prompts_per_step]
        self._flight = [group for group in self._flight if group not in done]
        clock.lap("sampling")
        answers = together([group.answers() for group in done if group.answers])
        examples = [group.example for group in done]
        answers = self.asking.scored(answers, examples)
        completions = [c for group in done for c in group.samples if isinstance(c, Completion)]
        prompts = prompts_of(self.prompts.collate(examples), self.asking.mesh)
        rollout = from_completions(prompts, completions, self.asking.sampling, self.asking.mesh)
        share = row_share(self.asking.mesh)
        graded = everyones(answers, self.asking.sampling.samples_per_prompt, share)
        self.prompts.end_step()
        numbers = answer_metrics(graded)
        numbers["prompts/consumed"] = len(new)
        numbers |= staleness(completions, version) | {
            "groups/carried": len(self._flight),
            "staleness/tokens_carried": sum(
                len(sample.so_far.tokens)
                for group in self._flight
                for sample in group.samples
                if isinstance(sample, Unfinished)
            ),
        }
        on_devices = to_global_rows(graded.rewards[0], batch_sharding(self.asking.mesh))
        clock.lap("rewards")
        return Collected(rollout, on_devices, examples, answers, numbers)

    def _new_groups(self) -> list[_Group]:
        """Fills the flight up, with prompts from before a resumption first."""
        room = self.asking.prompts_per_step + self.partial.extra_prompts - len(self._flight)
        again, self._again = self._again[:room], self._again[room:]
        fresh = self.prompts.take(room - len(again)).examples if room > len(again) else []
        nobody: list[Completion | Unfinished | None] = [
            None
        ] * self.asking.sampling.samples_per_prompt
        return [_Group(example, list(nobody)) for example in [*again, *fresh]]

    def _sample(
        self, engine: Engine, params: Params, key: jax.Array, new: list[_Group], version: int
    ) -> None:
        """Draws until enough groups are complete, and takes out what is not."""
        places: dict[tuple[int, int], tuple[_Group, int]] = {}
        for group in self._flight:
            for index, sample in enumerate(group.samples):
                if isinstance(sample, Unfinished):
                    places[engine.resume(sample), sample.sample] = group, index
        for place, group in enumerate(new):
            ids = self.asking.tokenizer.encode(group.example.prompt)
            request = engine.submit(ids, request_of(self.asking.sampling, key, place))
            places |= {(request, index): (group, index) for index in range(len(group.samples))}
        self._flight += new
        while sum(group.complete for group in self._flight) < self.asking.prompts_per_step:
            for event in engine.advance(params, policy_version=version):
                if event.completion is not None:
                    group, index = places[event.request, event.sample]
                    group.samples[index] = event.completion
                    self._grade_if_complete(group)
        for sample in engine.take_unfinished():
            group, index = places[sample.request, sample.sample]
            group.samples[index] = sample

    def _grade_if_complete(self, group: _Group) -> None:
        """The pool judges a group's answers while the engine goes on with the others."""
        done = [sample for sample in group.samples if isinstance(sample, Completion)]
        if len(done) == len(group.samples):
            tokens = [completion.tokens for completion in done]
            reasons = [completion.finish_reason for completion in done]
            group.answers = answers_of(
                tokens, reasons, [group.example], self.asking.tokenizer, self.asking.verifier
            )


def staleness(completions: list[Completion], version: int) -> dict[str, float]:
    """How many training steps ago the tokens were drawn: mean, maximum, and the share of older."""
    age = version - np.concatenate([c.policy_version for c in completions])
    return {
        "staleness/mean": float(age.mean()),
        "staleness/max": int(age.max()),
        "staleness/share": float((age > 0).mean()),
    }
