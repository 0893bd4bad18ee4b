"""The seam between the trainer and what samples for it: one protocol, and the sampler at home.

Anything that answers prompts with tokens and their log-probabilities can stand behind it. A recipe
chooses by a factory, called once with what a run knows:

    train.train.rollouts = @rollouts.Lockstep
    train.train.rollouts = @rollouts.continuous()
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from dppo_jax.models.decoder import Model, Params
from dppo_jax.multihost import everywhere, split_rows, to_global_rows, to_local_rows
from dppo_jax.prompts.tokenizers import Tokenizer
from dppo_jax.records import Prompts, Rollout
from dppo_jax.sampling.engine import Engine, EngineConfig
from dppo_jax.sampling.generate import SamplingConfig, generate
from dppo_jax.sampling.requests import Completion, SamplingParams
from dppo_jax.sampling.weights import for_decoding
from dppo_jax.sharding import batch_sharding


@runtime_checkable
class RolloutSource(Protocol):
    """What the trainer and evaluation ask for rollouts.

    A source that computes on none of the trainer's devices, such as a client of another process,
    may say so by an attribute `elsewhere = True`: with `async_depth` a thread then asks it while
    training goes on, one step after the other; an evaluation may ask at the same time. What its
    method `numbers()` gives, if it has one, is logged with each step.
    """

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
        """`settings.samples_per_prompt` responses to each prompt, as global arrays on the mesh.

        `params` are the same object as long as the weights are the same: a source that keeps a copy
        elsewhere sends new ones when it sees another. `key` is the step's; `first` is the place of
        prompt 0 among the step's prompts, so that a step asked in parts has no draw twice.
        `version` is what to record as `Rollout.policy_version`, where anything is.
        """


class RolloutContext(NamedTuple):
    """What a run knows when it makes its source."""

    model: Model
    mesh: Mesh
    tokenizer: Tokenizer
    max_prompt_tokens: int
    settings: SamplingConfig  # training's; an evaluation set may bring its own


MakeRollouts = Callable[[RolloutContext], RolloutSource]


class Lockstep:
    """The sampler of `sampling.generate`, in this program: a batch runs to its longest response."""

    def __init__(self, context: RolloutContext):
        self._model = context.model

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
        """See `RolloutSource`; the draws of a part depend on where it begins."""
        key = jax.random.fold_in(key, 2**31 + first) if first else key
        sequences = len(prompts.tokens) * settings.samples_per_prompt
        weights = for_decoding(params, self._model, sequences)
        return generate(self._model, params, prompts, key, settings=settings, weights=weights)


class Continuous:
    """The engine of `sampling.engine`: a slot whose response ends is given to the next.

    Each sample has a seed of its own, so that its tokens depend neither on the batch that it shares
    nor on how a step is divided. Of several processes each schedules all prompts alike, and keeps
    the responses to its own. Made by `continuous`.
    """

    def __init__(self, context: RolloutContext, config: EngineConfig):
        self._context = context
        self._config = sized(config, context.settings, context.max_prompt_tokens)
        self._engines: dict[tuple, Engine] = {}

    def engine(self, params: Params, settings: SamplingConfig) -> Engine:
        """The engine for these settings, compiled when it is first needed."""
        asked = (
            settings.top_k_capture, settings.replays, settings.record_experts, settings.dtype
        )  # fmt: skip
        if asked not in self._engines:
            model = self._context.model
            if settings.dtype is not None:
                model = model.in_dtype(settings.dtype)
            mesh = self._context.mesh if self._context.mesh.size > 1 else None
            config = with_settings(self._config, settings)
            self._engines[asked] = Engine(model, config, mesh, self._context.tokenizer.decode)
            self._engines[asked].warm_up(params)
        return self._engines[asked]

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
        """See `RolloutSource`."""
        mesh = self._context.mesh
        tokens, mask = everywhere(prompts.tokens), everywhere(prompts.mask)
        asked = [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]
        sampling = [request_of(settings, key, first + place) for place in range(len(asked))]
        engine = self.engine(params, settings)
        groups = engine.generate(params, asked, sampling, policy_version=version)
        rows = batch_sharding(mesh)
        own = to_local_rows(split_rows(np.arange(len(asked)), rows), rows)
        completions = [c for place in own for c in groups[place]]
        return from_completions(prompts, completions, settings, mesh)


def sized(config: EngineConfig, settings: SamplingConfig, max_prompt_tokens: int) -> EngineConfig:
    """The configuration with what the settings decide; ValueError where the two do not fit."""
    longest = max_prompt_tokens + settings.max_new_tokens
    if longest > config.max_context:
        raise ValueError(
            f"EngineConfig.max_context={config.max_context} is less than max_prompt_tokens + "
            f"max_new_tokens = {longest}: set it to that or more"
        )
    return dataclasses.replace(
        with_settings(config, settings),
        samples=settings.samples_per_prompt,
        shared_tokens=max_prompt_tokens,
    )


def with_settings(config: EngineConfig, settings: SamplingConfig) -> EngineConfig:
    """The configuration, recording what the settings say."""
    return dataclasses.replace(
        config,
        top_k_capture=settings.top_k_capture,
        replay=settings.replays,
        record_experts=settings.record_experts,
        prefix_cache=config.prefix_cache and not settings.record_experts,
    )


def continuous(
    engine: EngineConfig = EngineConfig(),  # noqa: B008  frozen
) -> MakeRollouts:
    """Rollouts by continuous batching; `engine.top_k_capture` is that of the sampling settings."""
    return partial(Continuous, config=engine)


def request_of(settings: SamplingConfig, key: Array, place: int) -> SamplingParams:
    """What the engine is asked for prompt `place` of a step with this key."""
    words = np.asarray(jax.random.key_data(key)).tolist()
    seed = np.random.SeedSequence([*words, place]).generate_state(1, np.uint64)[0]
    return SamplingParams(
        max_new_tokens=settings.max_new_tokens,
        n=settings.samples_per_prompt,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        stop_ids=settings.end_ids,
        seed=int(seed),
    )


def prompt_ids(prompts: Prompts, mesh: Mesh) -> list[list[int]]:
    """The tokens of this process's prompts, without padding, for a source outside of JAX."""
    tokens, mask = to_local_rows((prompts.tokens, prompts.mask), batch_sharding(mesh))
    return [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]


def from_completions(
    prompts: Prompts, completions: Sequence[Completion], settings: SamplingConfig, mesh: Mesh
) -> Rollout:
    """This process's completions, prompt by prompt, as part of the rollout of all processes.

    Raises ValueError where their number or a length does not fit, or a request was refused.
    """
    rows = batch_sharding(mesh)
    local_prompts = np.asarray(to_local_rows(prompts.mask, rows))
    batch, length = len(local_prompts) * settings.samples_per_prompt, settings.max_new_tokens
    if len(completions) != batch:
        raise ValueError(f"{len(completions)} completions came back for {batch} samples")
    if refused := next((c.error for c in completions if c.error), None):
        raise ValueError(f"the sampler refused a prompt of the batch: {refused}")
    k = settings.top_k_capture

    def room(kind: type, *shape: int) -> np.ndarray:
        return np.zeros((batch, length, *shape), kind)

    mask, tokens, version = room(np.bool_), room(np.int32), room(np.int32)
    kept = room(np.int32) if settings.replays else None
    logp, entropy = room(np.float32), room(np.float32)
    topk_ids, topk_logp = room(np.int32, k), room(np.float32, k)
    experts = prompt_experts = None
    if settings.record_experts:
        experts, prompt_experts = _room_for_experts(completions, local_prompts, length)
    for row, completion in enumerate(completions):
        count = len(completion.tokens)
        if not 1 <= count <= length or completion.topk_ids.shape != (count, k):
            raise ValueError(
                f"a completion of {count} tokens with top-K {completion.topk_ids.shape} came back; "
                f"asked were 1 to {length} tokens with K = {k}"
            )
        mask[row, :count] = True
        tokens[row, :count] = completion.tokens
        logp[row, :count] = completion.logp
        entropy[row, :count] = completion.entropy
        topk_ids[row, :count] = completion.topk_ids
        topk_logp[row, :count] = completion.topk_logp
        version[row, :count] = completion.policy_version
        if kept is not None:
            if completion.kept_count is None:
                raise ValueError(
                    "the sampler does not record the sets that top_k, top_p and min_p keep: leave "
                    "these off in training, or bind rollouts = @Lockstep"
                )
            kept[row, :count] = completion.kept_count
        if experts is not None and completion.experts is not None:
            experts[row, : count - 1] = completion.experts[: count - 1]  # the last is never fed
    reason = np.array([completion.finish_reason for completion in completions], np.int32)
    sampled = dict(
        response_tokens=tokens,
        response_mask=mask,
        logp_rollout=logp,
        topk_ids=topk_ids,
        topk_logp_rollout=topk_logp,
        entropy_rollout=entropy,
        finish_reason=reason,
        policy_version=version,
        kept_count=kept,
        experts=experts,
        prompt_experts=prompt_experts,
    )
    return Rollout(prompts.tokens, prompts.mask, **to_global_rows(sampled, rows))


def _room_for_experts(
    completions: Sequence[Completion], prompt_mask: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """[B, T, layers, k] with no expert yet, and the prompts' [P, L, layers, k] of first samples.

    ValueError where the sampler recorded none.
    """
    first = completions[:: len(completions) // len(prompt_mask)]
    of_prompts = [c.prompt_experts for c in first if c.prompt_experts is not None]
    if len(of_prompts) < len(first) or any(c.experts is None for c in completions):
        raise ValueError(
            "the sampler does not record experts: set routing to 'native' or 'replay_trainer', "
            "or bind rollouts = @Lockstep"
        )
    recorded: np.ndarray = np.concatenate(of_prompts)
    layers_and_k = recorded.shape[1:]
    prompts = np.full((*prompt_mask.shape, *layers_and_k), -1, recorded.dtype)
    prompts[prompt_mask] = recorded
    return np.full((len(completions), length, *layers_and_k), -1, recorded.dtype), prompts
