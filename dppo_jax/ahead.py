"""Rollouts ahead of training: the next steps' are drawn while this one is trained on.

    train.train.async_depth = 1         # drawn with the parameters of the step before
    train.train.sampler_devices = 4     # of each host the first 4 sample (`elsewhere`)

Step t trains on a rollout of version max(t - async_depth, 0), drawn with step t's own key and
prompts: the numbers do not depend on what runs at the same time. A run that is resumed draws again
what was in flight, with the parameters that `rollout_policy.stale` keeps in the checkpoint.
"""

import collections
import dataclasses
import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dppo_jax.answers import answer_metrics, everyones
from dppo_jax.collect import Asking, Collected, answers_later, prompts_of
from dppo_jax.models.decoder import Params
from dppo_jax.multihost import row_share, to_global_rows
from dppo_jax.prompts.pipeline import PromptBatch, PromptIterator
from dppo_jax.records import Rollout
from dppo_jax.rollout_policy import RolloutPolicy, State, chooser
from dppo_jax.sampling.rollouts import RolloutSource
from dppo_jax.sharding import batch_sharding
from dppo_jax.timing import Stopwatch

# (rollout memory, parameters before a step, later step) -> what that step samples with, and its key
Foresee = Callable[[State, Params, int], tuple[Params, Array]]


def foresight(policy: RolloutPolicy, key: Array) -> Foresee:
    """What a policy that begins with `stale(depth)` will choose, at most `depth` steps later."""
    choose = chooser(policy, remembers=False)

    def foresee(memory: State, params: Params, step: int) -> tuple[Params, Array]:
        its_key = jax.random.fold_in(key, step)
        return choose(memory, params, step, its_key)[0], its_key

    return foresee


class _Drawn(NamedTuple):
    """A rollout with the seconds at which its drawing began and ended, and its source's numbers."""

    rollout: Rollout
    began: float
    ended: float
    numbers: dict[str, float]


class _Flight(NamedTuple):
    """A rollout that is being drawn for a step."""

    step: int
    begins: dict[str, Any]  # where its prompts begin
    batch: PromptBatch
    drawn: Future[_Drawn]


class AheadCollector:
    """What `collect.Collector` is, with the next `depth` steps' rollouts in flight.

    A source that works `elsewhere` is driven by threads, one flight after the other; what shares
    the trainer's devices is dispatched here, so that all of them get all programs in one order.
    """

    def __init__(
        self, source: RolloutSource, prompts: PromptIterator, asking: Asking, depth: int, steps: int
    ):
        self._source, self._prompts, self._asking = source, prompts, asking
        self._depth, self._last = depth, steps - 1
        self._flights: collections.deque[_Flight] = collections.deque()
        self._before: Future[_Drawn] | None = None  # the latest that was launched
        self._ended = 0.0

    def begins(self) -> dict[str, Any]:
        """Where the prompts in flight begin, which a resumed run asks again."""
        if jax.process_count() > 1:
            # Orbax has its hosts meet on all devices, those that sample too.
            for flight in self._flights:
                flight.drawn.exception()
        return self._flights[0].begins if self._flights else self._prompts.get_state()

    def carried(self) -> list[Any]:
        """What else a checkpoint must hold: nothing."""
        return []

    def carry(self, examples: list[Any]) -> None:
        """What is in flight is drawn again."""

    def __call__(
        self,
        params: Params,
        key: Array,
        clock: Stopwatch,
        *,
        version: int,
        later: Callable[[int], tuple[Params, Array]],
    ) -> Collected:
        """A batch for the step after `version` steps; those to come sample with `later(step)`.

        `params` are used where nothing is in flight: at the beginning, and after a resumption.
        """
        if not self._flights:
            self._launch(params, key, version)
        for step in range(self._flights[-1].step + 1, min(version + self._depth, self._last) + 1):
            self._launch(*later(step), step)
        flight = self._flights.popleft()
        waited = time.monotonic()
        rollout, began, ended, told = flight.drawn.result()
        idle = {
            "time/trainer_idle": time.monotonic() - waited,
            "time/sampler_idle": max(0.0, began - self._ended) if self._ended else 0.0,
        }
        self._ended = ended
        clock.lap("sampling")
        answers = answers_later(
            rollout,
            flight.batch.examples,
            mesh=self._asking.mesh,
            tokenizer=self._asking.tokenizer,
            verifier=self._asking.verifier,
        )()
        answers = self._asking.scored(answers, flight.batch.examples)
        share = row_share(self._asking.mesh)
        graded = everyones(answers, self._asking.sampling.samples_per_prompt, share)
        rewards = to_global_rows(graded.rewards[share.index], batch_sharding(self._asking.mesh))
        drawn_by = self._version(version)
        versions = jnp.full_like(rollout.response_tokens, drawn_by)
        rollout = dataclasses.replace(rollout, policy_version=versions)
        stale = float(version - drawn_by)
        numbers = answer_metrics(graded) | idle | told
        numbers |= {"staleness/mean": stale, "staleness/max": stale}
        numbers["prompts/consumed"] = self._asking.prompts_per_step
        clock.lap("rewards")
        return Collected(rollout, rewards, flight.batch.examples, answers, numbers)

    def _version(self, step: int) -> int:
        return max(step - self._depth, 0)

    def _launch(self, params: Params, key: Array, step: int) -> None:
        asking, version, before = self._asking, self._version(step), self._before
        begins = self._prompts.get_state()
        batch = self._prompts.take(asking.prompts_per_step)
        self._prompts.end_step()
        asked = prompts_of(batch, asking.mesh)
        drawn: Future[_Drawn] = Future()

        apart = getattr(self._source, "elsewhere", False)
        later = getattr(self._source, "begin", None) or functools.partial(_later, self._source)
        sample = later(params, asked, key, asking.sampling, version=version)

        def follow(began: float, rollout: Rollout | None) -> None:
            try:
                if before is not None and rollout is None:
                    before.exception()  # the engine does one thing at a time
                    began = time.monotonic()
                rollout = jax.block_until_ready(sample() if rollout is None else rollout)
                told: dict[str, float] = getattr(self._source, "numbers", dict)()
                drawn.set_result(_Drawn(rollout, began, time.monotonic(), told))
            except BaseException as error:  # told to whoever asks for the result
                drawn.set_exception(error)

        given = time.monotonic(), None if apart else sample()
        threading.Thread(target=follow, args=given, daemon=True).start()
        self._before = drawn
        self._flights.append(_Flight(step, begins, batch, drawn))


def _later(source: RolloutSource, *asked: Any, version: int) -> Callable[[], Rollout]:
    return lambda: source.rollout(*asked, version=version)


def check_ahead(
    depth: int, dynamic: Any, rollout_batches: int, partial: Any, policy: RolloutPolicy
) -> None:
    """Refuses a depth that is none, and what needs its step's parameters while it samples."""
    if depth < 0:
        raise ValueError(f"async_depth={depth}: 0 samples and trains in turn, 1 or more ahead")
    if depth and (dynamic is not None or partial is not None or rollout_batches > 1):
        raise ValueError(
            "async_depth goes with none of dynamic_sampling, rollout_batches, partial_rollouts: "
            "choose one"
        )
    if depth and jax.tree.leaves(policy.init({"w": jnp.zeros(())})):
        raise ValueError(
            "async_depth makes rollouts stale by itself: leave a rollout_policy that remembers "
            "parameters, as rollout_policy.stale does, out"
        )
