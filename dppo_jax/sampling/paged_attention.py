"""Attention of one new token a slot over a view of its pages.

Axes: B slots, h key heads, r queries a key head, t keys, d head size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dppo_jax.models.attention import NEGATIVE, soft_capped
from dppo_jax.models.config import DecoderConfig
from dppo_jax.sampling.paged_cache import Stored, View


def with_column(view: View, new: Stored, column: Int[Array, ""]) -> View:
    """The view with one token of each slot; new leaves [B, Hkv, ...]."""

    def put(room, leaf):
        return jax.lax.dynamic_update_slice_in_dim(room, leaf[:, :, None], column, axis=2)

    return jax.tree.map(put, view, View(*new))


def tokens_from(view: View, first: int) -> Stored:
    """The tokens of the columns from `first` on: leaves [B, C, Hkv, ...]."""
    return Stored(*jax.tree.map(lambda leaf: leaf[:, :, first:].swapaxes(1, 2), view))


def bias_of(
    columns: int,
    length: Int[Array, " B"],
    room: int,
    step: Int[Array, ""],
    window: int | None,
) -> Float[Array, "B S"]:
    """0 where a column is to be seen, else NEGATIVE: of a view whose last `room` columns are for
    the tokens after `length`, those up to `step` written."""
    column, first = jnp.arange(columns), columns - room
    ahead = column >= first
    length = length[:, None]
    seen = jnp.where(ahead, column <= first + step, column < length)
    if window is not None:
        place = jnp.where(ahead, length + column - first, column)
        seen &= length + step - place < window
    return jnp.where(seen, 0.0, NEGATIVE)


def attend_view(
    config: DecoderConfig,
    q: Float[Array, "B H d"],
    view: View,
    bias: Float[Array, "B S"],
) -> Float[Array, "B Hd"]:
    """softmax(q·k·scale + bias)·v over the view.

    Scores and their softmax in float32; int8 keys and values are scaled after their products.
    """
    batch, heads, size = q.shape
    groups = view.k.shape[1]
    q = (q * config.attention_scale).reshape(batch, groups, heads // groups, size)
    k, v = (x.astype(q.dtype) for x in view[:2])
    z = jnp.einsum("bhrd,bhtd->bhrt", q, k, preferred_element_type=jnp.float32)
    z = z if view.k_scale is None else z * view.k_scale[:, :, None]
    z = soft_capped(z, config.attention_soft_cap) + bias[:, None, None]
    weights = jnp.exp(z - jnp.max(z, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights if view.v_scale is None else weights * view.v_scale[:, :, None]
    weights = weights.astype(q.dtype)
    out = jnp.einsum("bhrt,bhtd->bhrd", weights, v, preferred_element_type=jnp.float32)
    return (out / total).astype(q.dtype).reshape(batch, -1)
