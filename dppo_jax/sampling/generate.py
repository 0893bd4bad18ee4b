"""The jitted sampler: prefill each prompt once, then decode its G samples in lockstep.

Everything that DPPO needs of the rollout policy is recorded while the logits are alive: the
sampled token's log-probability under the distribution it was drawn from, the top-K ids and
log-probabilities, the entropy, an explicit mask, and why each sequence ended.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int

from dppo_jax.kernels.drawing import Drawn, numbers
from dppo_jax.kernels.filters import Filters
from dppo_jax.kernels.sampler import sample
from dppo_jax.models.block import Block
from dppo_jax.models.decoder import (
    Decoder,
    Experts,
    Model,
    Params,
    positions_of,
    rope_tables,
    routed_forward,
)
from dppo_jax.models.rope import Rope
from dppo_jax.records import FINISH_LENGTH, FINISH_STOP, Prompts, Rollout
from dppo_jax.sampling.shared_prompts import LayerCache, attend_cache, grown
from dppo_jax.sampling.weights import Weights, bound, unembedding_of
from dppo_jax.sharding import (
    batch_shards,
    constrain,
    on_each_copy,
    rows_here,
    sampler_layout,
    viewed,
)

SMALLEST_STAGE = 32  # response tokens


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn. temperature 0 takes the most likely token; its log-probabilities
    are then those of temperature 1. top_k, top_p and min_p as in `kernels.filters`.

    Where training sets one of these, `truncated_sampling` says how: "replay" keeps at most
    top_k_capture tokens at each position and records which, and all scoring is of the policy
    renormalised over them, so that on-policy ratios are 1 (TRL issues 6789 and 7269 tell what
    happens otherwise); "refuse" refuses the recipe. Evaluation filters and caps nothing."""

    max_new_tokens: int
    samples_per_prompt: int
    temperature: float = 1.0
    top_k_capture: int = 20
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    record_experts: bool = False  # of a mixture of experts, for a replay of its routing
    # Sampling one of these ends the response and belongs to it; a run adds its tokenizer's.
    end_ids: tuple[int, ...] = ()
    truncated_sampling: Literal["replay", "refuse"] = "replay"
    dtype: Literal["float32", "bfloat16"] | None = None  # of activations; None: the model's

    def __post_init__(self):
        if self.max_new_tokens < 1 or self.samples_per_prompt < 1:
            raise ValueError("max_new_tokens and samples_per_prompt must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must not be negative")
        _ = self.filters  # which checks them

    @property
    def filters(self) -> Filters:
        return Filters(self.top_k, self.top_p, self.min_p)

    @property
    def replays(self) -> bool:
        """Whether the kept sets are recorded."""
        return self.filters.on and self.truncated_sampling == "replay"

    def check(self, vocab_size: int) -> None:
        """Raises ValueError where this configuration does not fit the vocabulary."""
        if not 1 <= self.top_k_capture <= vocab_size:
            raise ValueError(
                f"top_k_capture={self.top_k_capture} is not within 1..{vocab_size}, "
                "the model's vocabulary: set a smaller K"
            )
        for end_id in self.end_ids:
            if not 0 <= end_id < vocab_size:
                raise ValueError(f"end id {end_id} is outside the vocabulary of {vocab_size}")


def _prefill(decoder: Decoder, prompts: Prompts, samples: int):
    """The last prompt token's hidden state [P, D], every layer's cache, without room yet, and the
    prompts' experts [P, L, layers, k]."""
    hidden, (keys, values), experts = routed_forward(decoder, prompts.tokens, prompts.mask)

    def cache_of(k, v):  # [P, L, Hkv, d] each
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        nothing = jnp.zeros((len(k) * samples, k.shape[1], 0, k.shape[3]), k.dtype)
        return LayerCache(k, v, nothing, nothing)

    return hidden[:, -1], [cache_of(keys[i], values[i]) for i in range(len(keys))], experts


def stages(length: int) -> list[int]:
    """Cache sizes to grow through: attention reads the whole cache at every token, so one that
    grows in four steps is read 5/8 as much. Each size compiles the loop once more."""
    size = max(SMALLEST_STAGE, -(-length // 4))
    return [*range(size, length, size), length]


def _decode(
    decoder: Decoder,
    blocks: list[Block],
    caches: list[LayerCache],
    tokens: Int[Array, " B"],
    column: Int[Array, ""],
    prompt_mask: Bool[Array, "P L"],
    ropes: Sequence[Rope],
):
    """Runs the tokens of one response column through every layer: their hidden state [B, D], the
    caches, and each layer's experts [B, k]."""
    c = decoder.config
    x = constrain(decoder.embed(constrain(tokens, "tokens")), "tokens", "width")
    new_caches, experts = [], []
    for block, cache, window in zip(blocks, caches, c.windows, strict=True):
        q, k, v = block.queries_keys_values(x, ropes[0 if window is None else -1])
        update = jax.lax.dynamic_update_slice_in_dim
        cache = cache._replace(
            response_k=update(cache.response_k, k[:, :, None], column, axis=2),
            response_v=update(cache.response_v, v[:, :, None], column, axis=2),
        )
        attended = attend_cache(c, q, cache, prompt_mask, column, window)
        x, chosen, _ = block.finish_routed(x, attended)
        new_caches.append(cache)
        experts.append(chosen)
    return decoder.normed(x), new_caches, experts


class _Progress(NamedTuple):
    """The decoding loop's state before column `step` is drawn."""

    step: Int[Array, ""]
    caches: list[LayerCache]
    active: Bool[Array, " B"]  # sequences that have not ended
    record: Drawn  # [T, B, ...]
    mask: Bool[Array, "T B"]
    experts: Experts | None  # prompts' [P, L, layers, k], responses' [T, B, layers, k]


def _columns(
    model: Model,
    params: Params,
    prompts: Prompts,
    key: Array,
    settings: SamplingConfig,
    weights: Weights | None = None,
) -> tuple[Callable[[], _Progress], Callable[[_Progress], _Progress]]:
    """How the first column is drawn, by the prompts, and each of the others, after the last."""
    if settings.dtype is not None:
        model = model.in_dtype(settings.dtype)
    decoder, blocks = bound(model, params, weights)
    unembedding = unembedding_of(decoder, weights)
    samples, length = settings.samples_per_prompt, settings.max_new_tokens
    prompt_lengths = jnp.repeat(positions_of(prompts.mask)[:, -1] + 1, samples)
    tables = rope_tables(model.config, prompts.tokens.shape[1] + length)
    batch, end_ids = len(prompt_lengths), jnp.asarray(settings.end_ids, jnp.int32)

    def draw_column(hidden, progress: _Progress) -> _Progress:
        step, caches, active, record, mask, experts = progress
        drawn = sample(
            hidden,
            unembedding,
            rows_here(partial(numbers, jax.random.fold_in(key, step)), batch),
            temperature=settings.temperature,
            top_k_capture=settings.top_k_capture,
            filters=settings.filters,
            replay=settings.replays,
            soft_cap=model.config.final_soft_cap,
            layout=sampler_layout(batch),
        )
        drawn = jax.tree.map(
            lambda leaf: jnp.where(active.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0), drawn
        )
        record = jax.tree.map(lambda room, leaf: room.at[step].set(leaf), record, drawn)
        mask = mask.at[step].set(active)
        active &= ~jnp.isin(drawn.token, end_ids)
        return _Progress(step + 1, caches, active, record, mask, experts)

    def advance(progress: _Progress) -> _Progress:
        column = progress.step - 1
        positions = prompt_lengths + column
        with viewed("decode"):
            hidden, caches, chosen = _decode(
                decoder,
                blocks,
                progress.caches,
                progress.record.token[column],
                column,
                prompts.mask,
                [(cos[positions], sin[positions]) for cos, sin in tables],
            )
        experts = progress.experts
        if experts is not None:
            response = experts.response.at[column].set(jnp.stack(chosen, axis=1))
            experts = experts._replace(response=response)
        return draw_column(hidden, progress._replace(caches=caches, experts=experts))

    def room(shape, dtype):
        return constrain(jnp.zeros((length, batch, *shape), dtype), None, "batch")

    stored = (settings.top_k_capture,)
    record = Drawn(
        token=room((), jnp.int32),
        logp=room((), jnp.float32),
        topk_ids=room(stored, jnp.int32),
        topk_logp=room(stored, jnp.float32),
        entropy=room((), jnp.float32),
        kept_count=room((), jnp.int32) if settings.replays else None,
    )

    def first() -> _Progress:
        hidden, caches, asked = _prefill(decoder, prompts, samples)
        experts = None
        if settings.record_experts:
            experts = Experts(asked, room(asked.shape[2:], asked.dtype))
        everyone = jnp.ones((batch,), bool)
        return draw_column(
            jnp.repeat(hidden, samples, axis=0),
            _Progress(jnp.int32(0), caches, everyone, record, room((), bool), experts),
        )

    return first, advance


def _stage(
    advance: Callable[[_Progress], _Progress], progress: _Progress, end: int, length: int
) -> _Progress:
    """Draws columns until the cache has `end` of them or every sequence has ended."""
    with viewed("decode"):
        progress = progress._replace(caches=[grown(cache, end) for cache in progress.caches])
    # Drawing column t reads a cache of t columns: columns up to `end` fit this stage.
    last = min(end + 1, length)

    def unfinished(p: _Progress) -> Bool[Array, ""]:
        return (p.step < last) & jnp.any(p.active)

    return jax.lax.while_loop(unfinished, advance, progress)


@partial(jax.jit, static_argnames=("model", "settings"))
def prefill(
    model: Model, params: Params, prompts: Prompts, key: Array, *, settings: SamplingConfig
) -> _Progress:
    """The beginning of `generate`, a program of its own for `dppo plan`: the first column drawn."""
    first, _ = _columns(model, params, prompts, key, settings)
    return first()


@partial(jax.jit, static_argnames=("model", "settings"), donate_argnames="progress")
def last_stage(
    model: Model,
    params: Params,
    prompts: Prompts,
    key: Array,
    progress: _Progress,
    *,
    settings: SamplingConfig,
) -> _Progress:
    """The end of `generate`, likewise: the columns that are drawn with the cache at its largest.

    Nothing reads the cache after them.
    """
    _, advance = _columns(model, params, prompts, key, settings)
    drawn = _stage(advance, progress, settings.max_new_tokens, settings.max_new_tokens)
    return drawn._replace(caches=[])


@partial(jax.jit, static_argnames=("model", "settings"))
def generate(
    model: Model,
    params: Params,
    prompts: Prompts,
    key: Array,
    *,
    settings: SamplingConfig,
    weights: Weights | None = None,
) -> Rollout:
    """Samples `settings.samples_per_prompt` responses to each prompt.

    Stops when every sequence has sampled an end token or max_new_tokens is reached: on each device
    that has a copy of the parameters, when its own have (`on_each_copy`). Column t of the batch is
    drawn with fold_in(key, t). `weights`: the parameters' of `weights.for_decoding`.
    """
    drawn = partial(_drawn, model, settings)
    whole, split = PartitionSpec(), PartitionSpec("data")
    even = len(prompts.tokens) % batch_shards() == 0
    draw = on_each_copy(drawn, (whole, split, whole, whole), split) if even else drawn
    return draw(params, prompts, key, weights)


def _drawn(
    model: Model,
    settings: SamplingConfig,
    params: Params,
    prompts: Prompts,
    key: Array,
    weights: Weights | None,
) -> Rollout:
    first, advance = _columns(model, params, prompts, key, settings, weights)
    progress = first()
    for end in stages(settings.max_new_tokens):
        progress = _stage(advance, progress, end, settings.max_new_tokens)
    by_row = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), progress.record)
    experts = progress.experts
    if experts is not None:
        by_sequence = Experts(experts.prompt, jnp.swapaxes(experts.response, 0, 1))
        experts = by_sequence.only(prompts.mask, progress.mask.T)
    return Rollout(
        prompt_tokens=prompts.tokens,
        prompt_mask=prompts.mask,
        response_tokens=by_row.token,
        response_mask=progress.mask.T,
        logp_rollout=by_row.logp,
        topk_ids=by_row.topk_ids,
        topk_logp_rollout=by_row.topk_logp,
        entropy_rollout=by_row.entropy,
        finish_reason=jnp.where(progress.active, FINISH_LENGTH, FINISH_STOP).astype(jnp.int32),
        kept_count=by_row.kept_count,
        prompt_experts=experts and experts.prompt,
        experts=experts and experts.response,
    )
