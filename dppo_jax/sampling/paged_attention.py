"""Attention of one new token a slot over a view of its pages.

Axes: B slots, h key heads, r queries a key head, t keys, d head size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dppo_jax.models.attention import NEGATIVE, soft_capped
from dppo_jax.models.config import DecoderConfig
from dppo_jax.sampling.paged_cache import Stored, View
from dppo_jax.sampling.shared_prompts import Shared


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
    before: Int[Array, "#B 1"],
    room: int,
    step: Int[Array, ""],
    window: int | None,
) -> Float[Array, "B S"]:
    """0 where a column is to be seen, else NEGATIVE: of a view of the tokens from `before` on,
    whose last `room` columns are for those after `length`, up to `step` written."""
    column, first = jnp.arange(columns), columns - room
    length = length[:, None]
    place = jnp.where(column >= first, length + column - first, before + column)
    seen = jnp.where(column >= first, column <= first + step, place < length)
    return _bias(seen, place, length + step, window)


def prompt_bias(
    columns: int,
    length: Int[Array, " B"],
    before: Int[Array, "B 1"],
    step: Int[Array, ""],
    window: int | None,
) -> Float[Array, "B S"]:
    """The same of the view of its prompt: the tokens before `before`."""
    place = jnp.arange(columns)
    return _bias(place < before, place, length[:, None] + step, window)


def _bias(seen, place, now, window: int | None):
    if window is not None:
        seen &= now - place < window
    return jnp.where(seen, 0.0, NEGATIVE)


class Prompts(NamedTuple):
    """What slots share, read once for all of them."""

    view: View  # [R, Hkv, S, d]
    shared: Shared
    bias: Float[Array, "B S"]

    def asked(self, x: Array) -> Array:
        """[B, h, r, n] of slots to [R, h, G r, n] of the rows that they share."""
        rows, sharers = self.shared.slots.shape
        x = x[self.shared.slots]  # [R, G, h, r, n]
        return x.swapaxes(1, 2).reshape(rows, x.shape[2], sharers * x.shape[3], x.shape[4])

    def answered(self, x: Array) -> Array:
        """The contrary of `asked`; of a slot that shares nothing some other's."""
        rows, sharers = self.shared.slots.shape
        x = x.reshape(rows, x.shape[1], sharers, -1, x.shape[3]).swapaxes(1, 2)
        return x.reshape(rows * sharers, *x.shape[2:])[self.shared.place]


def _scores(q: Array, view: View, soft_cap: float | None) -> Array:
    k = view.k.astype(q.dtype)
    z = jnp.einsum("bhrd,bhtd->bhrt", q, k, preferred_element_type=jnp.float32)
    z = z if view.k_scale is None else z * view.k_scale[:, :, None]
    return soft_capped(z, soft_cap)


def _summed(weights: Array, view: View, dtype: jnp.dtype) -> Array:
    weights = weights if view.v_scale is None else weights * view.v_scale[:, :, None]
    weights, v = weights.astype(dtype), view.v.astype(dtype)
    return jnp.einsum("bhrt,bhtd->bhrd", weights, v, preferred_element_type=jnp.float32)


def attend_view(
    config: DecoderConfig,
    q: Float[Array, "B H d"],
    view: View,
    bias: Float[Array, "B S"],
    prompts: Prompts | None,
) -> Float[Array, "B Hd"]:
    """softmax(q·k·scale + bias)·v over the view, and over what slots share where there is such.

    Scores and their softmax in float32; int8 keys and values are scaled after their products.
    """
    batch, heads, size = q.shape
    groups = view.k.shape[1]
    q = (q * config.attention_scale).reshape(batch, groups, heads // groups, size)
    z = _scores(q, view, config.attention_soft_cap) + bias[:, None, None]
    if prompts is not None:
        asked = _scores(prompts.asked(q), prompts.view, config.attention_soft_cap)
        z = jnp.concatenate([prompts.answered(asked) + prompts.bias[:, None, None], z], axis=-1)
    weights = jnp.exp(z - jnp.max(z, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = _summed(weights[..., -view.v.shape[2] :], view, q.dtype)
    if prompts is not None:
        columns = prompts.view.v.shape[2]
        of_rows = _summed(prompts.asked(weights[..., :columns]), prompts.view, q.dtype)
        shares = prompts.shared.length[:, None, None, None] > 0
        out += jnp.where(shares, prompts.answered(of_rows), 0.0)
    return (out / total).astype(q.dtype).reshape(batch, -1)
