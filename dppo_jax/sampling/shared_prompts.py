"""Keys and values of prompts and of their samples, for decoding in lockstep."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dppo_jax.models.attention import NEGATIVE, soft_capped
from dppo_jax.models.config import DecoderConfig
from dppo_jax.sharding import constrain


class LayerCache(NamedTuple):
    """Keys and values of one layer: a prompt's are stored once and shared by its G samples."""

    prompt_k: Float[Array, "P Hkv L d"]
    prompt_v: Float[Array, "P Hkv L d"]
    response_k: Float[Array, "B Hkv T d"]
    response_v: Float[Array, "B Hkv T d"]


def attend_cache(
    config: DecoderConfig,
    q: Float[Array, "B H d"],
    cache: LayerCache,
    prompt_mask: Bool[Array, "P L"],
    column: Int[Array, ""],
    window: int | None,
) -> Float[Array, "B Hd"]:
    """Softmax attention of one new token a sequence over its prompt and its response so far."""
    batch, heads, size = q.shape
    prompts, groups = cache.prompt_k.shape[:2]
    samples, rep = batch // prompts, heads // groups
    q = (q * config.attention_scale).reshape(prompts, samples, groups, rep, size)
    shared = q.transpose(0, 2, 1, 3, 4).reshape(prompts, groups, samples * rep, size)
    to_prompt = jnp.einsum(
        "pkmd,pkld->pkml", shared, cache.prompt_k, preferred_element_type=jnp.float32
    )
    to_prompt = soft_capped(to_prompt, config.attention_soft_cap)
    seen = prompt_mask[:, None, None, :]
    if window is not None:
        length = prompt_mask.shape[1]
        seen &= length + column - jnp.arange(length) < window
    to_prompt = jnp.where(seen, to_prompt, NEGATIVE)
    to_prompt = to_prompt.reshape(prompts, groups, samples, rep, -1).transpose(0, 2, 1, 3, 4)
    to_prompt = to_prompt.reshape(batch, groups, rep, -1)
    own = q.reshape(batch, groups, rep, size)
    to_response = jnp.einsum(
        "bkrd,bktd->bkrt", own, cache.response_k, preferred_element_type=jnp.float32
    )
    to_response = soft_capped(to_response, config.attention_soft_cap)
    columns = jnp.arange(cache.response_k.shape[2])
    seen = columns <= column
    if window is not None:
        seen &= column - columns < window
    to_response = jnp.where(seen, to_response, NEGATIVE)
    length = to_prompt.shape[-1]
    weights = jax.nn.softmax(jnp.concatenate([to_prompt, to_response], axis=-1), axis=-1)
    weights = weights.astype(cache.prompt_v.dtype)
    on_prompt = weights[..., :length].reshape(prompts, samples, groups, rep, length)
    on_prompt = on_prompt.transpose(0, 2, 1, 3, 4).reshape(prompts, groups, -1, length)
    from_prompt = jnp.einsum("pkml,pkld->pkmd", on_prompt, cache.prompt_v)
    from_prompt = from_prompt.reshape(prompts, groups, samples, rep, size).transpose(0, 2, 1, 3, 4)
    from_response = jnp.einsum("bkrt,bktd->bkrd", weights[..., length:], cache.response_v)
    return (from_prompt.reshape(batch, groups, rep, size) + from_response).reshape(batch, -1)


def grown(cache: LayerCache, room: int) -> LayerCache:
    """The cache with space for `room` response tokens."""

    def grow(x):
        x = jnp.pad(x, ((0, 0), (0, 0), (0, room - x.shape[2]), (0, 0)))
        return constrain(x, "batch", "kv_heads", None, None)

    return cache._replace(response_k=grow(cache.response_k), response_v=grow(cache.response_v))
