"""One step's rollouts with their rewards: prompts -> sampling -> rewards.

A step's prompts are sampled in one batch or in several, and a batch is graded in worker processes
while the next is sampled.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dppo_jax.answers import (
    Answers,
    Graded,
    answer_metrics,
    answers_of,
    everyones,
    together,
    together_graded,
)
from dppo_jax.dynamic_sampling import DynamicSampling, joined, places, replaced, with_spread
from dppo_jax.models.decoder import Params
from dppo_jax.multihost import everywhere, row_share, split_rows, to_global_rows, to_local_rows
from dppo_jax.prompts.examples import Example
from dppo_jax.prompts.pipeline import PromptBatch, PromptIterator
from dppo_jax.prompts.tokenizers import Tokenizer
from dppo_jax.records import Prompts, Rollout
from dppo_jax.reward_model import Scorer
from dppo_jax.rewards.verdicts import Verifier
from dppo_jax.sampling.generate import SamplingConfig
from dppo_jax.sampling.rollouts import RolloutSource
from dppo_jax.sharding import batch_sharding
from dppo_jax.timing import Stopwatch


def prompts_of(batch: PromptBatch, mesh: Mesh) -> Prompts:
    """The prompts of all processes, on the devices."""
    return Prompts(*to_global_rows((batch.tokens, batch.mask), batch_sharding(mesh)))


def answers_later(
    rollout: Rollout,
    examples: Sequence[Example],
    *,
    mesh: Mesh,
    tokenizer: Tokenizer,
    verifier: Verifier,
) -> Callable[[], Answers]:
    """The rollout's texts, and what the verifier says of them once the result is called.

    Until then an isolated verifier works in its own processes, while the devices go on here.
    """
    tokens, mask, reason = to_local_rows(
        (rollout.response_tokens, rollout.response_mask, rollout.finish_reason),
        batch_sharding(mesh),
    )
    drawn = [row[kept] for row, kept in zip(tokens, mask, strict=True)]
    return answers_of(drawn, reason.tolist(), examples, tokenizer, verifier)


class Asking(NamedTuple):
    """What every step has in common."""

    mesh: Mesh
    tokenizer: Tokenizer
    verifier: Verifier
    sampling: SamplingConfig
    prompts_per_step: int
    scorer: Scorer | None = None

    def scored(self, answers: Answers, examples: Sequence[Example]) -> Answers:
        """The answers with the reward model's word on them, where there is one."""
        return answers if self.scorer is None else self.scorer(answers, examples)


class Collected(NamedTuple):
    """What a step trains on, and what it sampled for that."""

    rollout: Rollout  # of prompts_per_step prompts
    rewards: jax.Array  # [P, G], theirs
    examples: list[Example]  # of this process, everything that was sampled
    answers: Answers  # theirs
    numbers: dict[str, float]  # for the log, over all processes


class _Part(NamedTuple):
    """Prompts that were sampled together."""

    examples: list[Example]  # this process's
    rollout: Rollout
    answers: Answers  # this process's
    graded: Graded  # of all processes
    rewards: np.ndarray  # [N, G] of all processes, in the rollout's order


class Collector:
    """Samples and grades the prompts of one step after the other.

    `batches` divides a step's prompts; which answers a prompt gets then depends on the division
    where the source's draws do (`Lockstep`), and not where each request has a seed (`Continuous`).
    """

    def __init__(
        self,
        source: RolloutSource,
        prompts: PromptIterator,
        asking: Asking,
        batches: int = 1,
        dynamic: DynamicSampling | None = None,
    ):
        self._source, self._prompts, self._asking = source, prompts, asking
        self._batches, self._dynamic = batches, dynamic
        self._size = asking.prompts_per_step // batches
        self._share = row_share(asking.mesh)
        self._compiled = False

    def __call__(
        self, params: Params, key: jax.Array, clock: Stopwatch, *, version: int
    ) -> Collected:
        """A batch for the step after `version` steps; leaves the prompts at the step's end."""
        ask = functools.partial(self._ask, params, key, clock, version)
        parts = ask(range(self._batches))
        rollout = parts[0].rollout if len(parts) == 1 else joined([part.rollout for part in parts])
        rewards = np.concatenate([part.rewards for part in parts])
        numbers: dict[str, float] = {}
        if self._dynamic is not None:
            idle = ~with_spread(rewards)
            before, limit = int(idle.sum()), self._batches * self._dynamic.max_batches
            if not self._compiled:  # in the first step, whether or not it replaces anything
                nothing = jnp.asarray(np.full(len(idle), -1, np.int32))
                for _ in range(2):  # what comes in and what comes out may lie differently
                    rollout = replaced(rollout, parts[0].rollout, nothing)
                self._compiled = True
            while idle.any() and len(parts) < limit:
                count = min(-(-int(idle.sum()) // self._size), limit - len(parts))
                for part in ask(range(len(parts), len(parts) + count)):
                    taken = places(idle, with_spread(part.rewards))
                    rollout = replaced(rollout, part.rollout, jnp.asarray(taken))
                    new = taken >= 0
                    rewards[new] = part.rewards[taken[new]]
                    idle &= ~new
                    parts.append(part)
            useful = sum(int(with_spread(part.rewards).sum()) for part in parts)
            numbers = {
                "rollout/batches": len(parts) / self._batches,
                "groups/replaced": before - int(idle.sum()),
                "groups/without_spread": int(idle.sum()),
                "groups/unused": useful - int((~idle).sum()),
                "reward/trained_mean": float(rewards.mean()),
            }
        self._prompts.end_step()
        answers = together([part.answers for part in parts])
        numbers |= answer_metrics(together_graded([part.graded for part in parts]))
        numbers |= getattr(self._source, "numbers", dict)()
        numbers["prompts/consumed"] = len(parts) * self._size
        on_devices = split_rows(rewards, batch_sharding(self._asking.mesh))
        examples = [example for part in parts for example in part.examples]
        clock.lap("rewards")
        return Collected(rollout, on_devices, examples, answers, numbers)

    def begins(self) -> dict[str, Any]:
        """Where the prompts of the next step begin."""
        return self._prompts.get_state()

    def carried(self) -> list[Any]:
        """What a checkpoint must hold beside the prompts' position: nothing."""
        return []

    def carry(self, examples: list[Any]) -> None:
        """Nothing is in flight between two steps."""

    def _ask(
        self,
        params: Params,
        key: jax.Array,
        clock: Stopwatch,
        version: int,
        numbers: Iterable[int],
    ) -> list[_Part]:
        """Parts of the step's prompts, sampled and graded; each graded while the next is sampled.

        The seconds for which the verdicts were waited for are `time/rewards`.
        """
        sampled: list[tuple[PromptBatch, Rollout]] = []
        verdicts: list[Callable[[], Answers]] = []
        for number in numbers:
            batch = self._prompts.take(self._size)
            rollout = self._source.rollout(
                params,
                prompts_of(batch, self._asking.mesh),
                key,
                self._asking.sampling,
                first=number * self._size,
                version=version,
            )
            sampled.append((batch, rollout))
            # What runs on the devices is read once they have the next part to do; what a source
            # waited for itself, at once.
            done = all(leaf.is_ready() for leaf in jax.tree.leaves(rollout))
            for waiting in sampled[len(verdicts) : None if done else -1]:
                verdicts.append(self._grade(*waiting))
        jax.block_until_ready([rollout for _, rollout in sampled])
        clock.lap("sampling")
        verdicts += [self._grade(*waiting) for waiting in sampled[len(verdicts) :]]
        parts = []
        for (batch, rollout), wait in zip(sampled, verdicts, strict=True):
            answers = self._asking.scored(wait(), batch.examples)
            graded = everyones(answers, self._asking.sampling.samples_per_prompt, self._share)
            own = graded.rewards[self._share.index]
            rewards = everywhere(to_global_rows(own, batch_sharding(self._asking.mesh)))
            parts.append(_Part(batch.examples, rollout, answers, graded, rewards))
        clock.lap("rewards")
        return parts

    def _grade(self, batch: PromptBatch, rollout: Rollout) -> Callable[[], Answers]:
        mesh, tokenizer, verifier, *_ = self._asking
        return answers_later(
            rollout, batch.examples, mesh=mesh, tokenizer=tokenizer, verifier=verifier
        )
