"""Rollouts ahead of training: the next steps' are drawn while this one is trained on.

    train.train.async_depth = 1         # drawn with the parameters of the step before
    train.train.sampler_devices = 4     # the first 4 devices sample, the others train

Step t trains on a rollout of version max(t - async_depth, 0), drawn with step t's own key and
prompts: the numbers do not depend on what runs at the same time. A run that is resumed draws again
what was in flight, with the parameters that `rollout_policy.stale` keeps in the checkpoint.
"""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from dppo_jax.answers import answer_metrics, everyones
from dppo_jax.collect import Asking, Collected, answers_later, prompts_of
from dppo_jax.models.decoder import Params
from dppo_jax.multihost import row_share, to_global_rows
from dppo_jax.prompts.pipeline import PromptBatch, PromptIterator
from dppo_jax.records import Prompts, Rollout
from dppo_jax.rollout_policy import RolloutPolicy, State, chooser
from dppo_jax.sampling.generate import SamplingConfig
from dppo_jax.sampling.rollouts import RolloutContext, RolloutSource
from dppo_jax.sharding import MeshConfig, batch_sharding, check_divides
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
    """A rollout with the seconds at which its drawing began and ended."""

    rollout: Rollout
    began: float
    ended: float


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
        rollout, began, ended = flight.drawn.result()
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
        stale = float(version - self._version(version))
        numbers = answer_metrics(graded) | idle
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

        def sample() -> Rollout:
            rollout = self._source.rollout(params, asked, key, asking.sampling, version=version)
            versions = jnp.full_like(rollout.response_tokens, version)
            return dataclasses.replace(rollout, policy_version=versions)

        def follow(began: float, rollout: Rollout | None) -> None:
            try:
                if before is not None and rollout is None:
                    before.exception()  # the engine does one thing at a time
                    began = time.monotonic()
                rollout = jax.block_until_ready(sample() if rollout is None else rollout)
                drawn.set_result(_Drawn(rollout, began, time.monotonic()))
            except BaseException as error:  # told to whoever asks for the result
                drawn.set_exception(error)

        apart = getattr(self._source, "elsewhere", False)
        given = time.monotonic(), None if apart else sample()
        threading.Thread(target=follow, args=given, daemon=True).start()
        self._before = drawn
        self._flights.append(_Flight(step, begins, batch, drawn))


class Elsewhere:
    """A source whose work is done on devices of its own: weights go there, rollouts come back."""

    elsewhere = True

    def __init__(self, make: Any, context: RolloutContext, devices: list[Any]):
        self._home, self._mesh = context.mesh, MeshConfig(fsdp=len(devices)).build(devices)
        check_divides(self._mesh, "embed", {"width": context.model.config.width})
        self._source = make(context._replace(mesh=self._mesh))
        self._sent: tuple[list[Array], list[Array]] = ([], [])  # as they are at home, and there
        self._one_at_a_time = threading.Lock()  # evaluation asks while a flight is drawn

    def rollout(
        self,
        params: Params,
        prompts: Prompts,
        key: Array,
        settings: SamplingConfig,
        *,
        first: int = 0,
        version: int = 0,
    ) -> Rollout:
        """See `RolloutSource`; what is the same array as before is not sent again."""
        check_divides(self._mesh, "batch", {"prompts of a rollout": len(prompts.tokens)})
        with self._one_at_a_time, jax.set_mesh(self._mesh):
            there = jax.device_put(prompts, batch_sharding(self._mesh))
            key = jax.device_put(key, NamedSharding(self._mesh, PartitionSpec()))
            rollout = self._source.rollout(
                self._send(params), there, key, settings, first=first, version=version
            )
        return jax.device_put(rollout, batch_sharding(self._home))

    def _send(self, params: Params) -> Params:
        leaves, structure = jax.tree.flatten(params)
        known = {id(old): new for old, new in zip(*self._sent, strict=True)}
        sent = [
            known[id(leaf)]
            if id(leaf) in known
            else jax.device_put(leaf, NamedSharding(self._mesh, leaf.sharding.spec))
            for leaf in leaves
        ]
        self._sent = leaves, sent
        return jax.tree.unflatten(structure, sent)


def divide(devices: list[Any], sampler: int) -> tuple[list[Any], list[Any]]:
    """The devices that sample and those that train; ValueError where one side has none."""
    if sampler and jax.process_count() > 1:
        raise ValueError("sampler_devices splits the devices of one process: leave it at 0")
    if not 0 <= sampler < len(devices):
        raise ValueError(
            f"sampler_devices={sampler} of {len(devices)} devices: leave at least one to train"
        )
    return devices[:sampler], devices[sampler:]


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
