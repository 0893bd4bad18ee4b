"""Rollouts ahead of training: the next step's are drawn while this one is trained on.

    train.train.async_depth = 1         # drawn with the parameters of the step before
    train.train.sampler_devices = 4     # the first 4 devices sample, the others train

Step t trains on a rollout of version max(t - async_depth, 0), drawn with step t's own key and
prompts: the numbers do not depend on what runs at the same time. A run that is resumed draws again
what was in flight, with the parameters that `rollout_policy.stale` keeps in the checkpoint.
"""

import dataclasses
import threading
import time
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
from dppo_jax.sampling.generate import SamplingConfig
from dppo_jax.sampling.rollouts import RolloutContext, RolloutSource
from dppo_jax.sharding import MeshConfig, batch_sharding, check_divides
from dppo_jax.timing import Stopwatch


class _Flight(NamedTuple):
    """A rollout that is being drawn."""

    batch: PromptBatch
    rollout: Rollout
    version: int
    started: float
    ended: list[float]  # filled by the thread that waits for it
    waits: threading.Thread


class AheadCollector:
    """What `collect.Collector` is, with one rollout in flight while the step before is trained."""

    def __init__(self, source: RolloutSource, prompts: PromptIterator, asking: Asking, depth: int):
        self._source, self._prompts, self._asking, self._depth = source, prompts, asking, depth
        self._flight: _Flight | None = None
        self._position: dict[str, Any] = prompts.get_state()
        self._ended = 0.0

    def begins(self) -> dict[str, Any]:
        """Where the prompts in flight begin, which a resumed run asks again."""
        return self._position

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
        following: tuple[Params, Array] | None,
    ) -> Collected:
        """A batch for the step after `version` steps, while the step after it is `following`.

        `params` are used where nothing is in flight: at the beginning, and after a resumption.
        """
        flight = self._flight or self._launch(params, key, version)
        before = self._ended
        self._position = self._prompts.get_state()
        self._flight = self._launch(*following, version + 1) if following else None
        waited = time.monotonic()
        flight.waits.join()
        idle = {
            "time/trainer_idle": time.monotonic() - waited,
            "time/sampler_idle": max(0.0, flight.started - before) if before else 0.0,
        }
        self._ended = flight.ended[0]
        clock.lap("sampling")
        answers = answers_later(
            flight.rollout,
            flight.batch.examples,
            mesh=self._asking.mesh,
            tokenizer=self._asking.tokenizer,
            verifier=self._asking.verifier,
        )()
        answers = self._asking.scored(answers, flight.batch.examples)
        share = row_share(self._asking.mesh)
        graded = everyones(answers, self._asking.sampling.samples_per_prompt, share)
        rewards = to_global_rows(graded.rewards[share.index], batch_sharding(self._asking.mesh))
        stale = float(version - flight.version)
        numbers = answer_metrics(graded) | idle
        numbers |= {"staleness/mean": stale, "staleness/max": stale}
        clock.lap("rewards")
        return Collected(flight.rollout, rewards, flight.batch.examples, answers, numbers)

    def _launch(self, params: Params, key: Array, step: int) -> _Flight:
        version, asking = max(step - self._depth, 0), self._asking
        batch = self._prompts.take(asking.prompts_per_step)
        self._prompts.end_step()
        started = time.monotonic()
        rollout = self._source.rollout(
            params, prompts_of(batch, asking.mesh), key, asking.sampling, version=version
        )
        drawn = jnp.full_like(rollout.response_tokens, version)
        rollout = dataclasses.replace(rollout, policy_version=drawn)
        ended: list[float] = []

        def wait() -> None:
            jax.block_until_ready(rollout)
            ended.append(time.monotonic())

        waits = threading.Thread(target=wait, daemon=True)
        waits.start()
        return _Flight(batch, rollout, version, started, ended, waits)


class Elsewhere:
    """A source whose work is done on devices of its own: weights go there, rollouts come back."""

    def __init__(self, make: Any, context: RolloutContext, devices: list[Any]):
        if jax.process_count() > 1:
            raise ValueError("sampler_devices splits the devices of one process: leave it at 0")
        self._home, self._mesh = context.mesh, MeshConfig(fsdp=len(devices)).build(devices)
        check_divides(self._mesh, "embed", {"width": context.model.config.width})
        self._source = make(context._replace(mesh=self._mesh))
        self._sent: tuple[Any, Any] = (None, None)

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
        """See `RolloutSource`; the same parameters are sent once."""
        check_divides(self._mesh, "batch", {"prompts of a rollout": len(prompts.tokens)})
        if self._sent[0] is not params:
            there_too = jax.tree.map(lambda p: NamedSharding(self._mesh, p.sharding.spec), params)
            self._sent = (params, jax.device_put(params, there_too))
        there = jax.device_put(prompts, batch_sharding(self._mesh))
        key = jax.device_put(key, NamedSharding(self._mesh, PartitionSpec()))
        with jax.set_mesh(self._mesh):
            rollout = self._source.rollout(
                self._sent[1], there, key, settings, first=first, version=version
            )
        return jax.device_put(rollout, batch_sharding(self._home))


def divide(devices: list[Any], sampler: int) -> tuple[list[Any], list[Any]]:
    """The devices that sample and those that train; ValueError where one side has none."""
    if not 0 <= sampler < len(devices):
        raise ValueError(
            f"sampler_devices={sampler} of {len(devices)} devices: leave at least one to train"
        )
    return devices[:sampler], devices[sampler:]


def check_ahead(depth: int, dynamic: Any, rollout_batches: int, partial: Any) -> None:
    """Refuses a depth that is none, and what needs its step's parameters while it samples."""
    if depth < 0:
        raise ValueError(f"async_depth={depth}: 0 samples and trains in turn, 1 or more ahead")
    if depth and (dynamic is not None or partial is not None or rollout_batches > 1):
        raise ValueError(
            "async_depth goes with none of dynamic_sampling, rollout_batches, partial_rollouts: "
            "choose one"
        )
