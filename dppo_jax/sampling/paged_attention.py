"""Attention of one new token a slot over its pages, in the forms that the engine's loop can take.

Axes: B slots, h key heads, r queries a key head, t keys, d head size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dppo_jax.models.attention import NEGATIVE, soft_capped
from dppo_jax.models.config import DecoderConfig
from dppo_jax.sampling.paged_cache import LayerPages, View


class Recent(NamedTuple):
    """Keys and values drawn since the loop began, a column a step; scales as in the pages."""

    k: Array  # [B, Hkv, C, d]
    v: Array
    k_scale: Float[Array, "B Hkv C"] | None
    v_scale: Float[Array, "B Hkv C"] | None


def no_recent(view: View, columns: int) -> Recent:
    """Room for `columns` steps beside this view."""

    def room(leaf):
        return jnp.zeros((*leaf.shape[:2], columns, *leaf.shape[3:]), leaf.dtype)

    return jax.tree.map(room, Recent(*view))


def with_column(recent: Recent, new: LayerPages, column: Int[Array, ""]) -> Recent:
    """`recent` with the tokens of one step; new leaves [B, 2*Hkv, ...]."""

    def put(room, leaf, first):
        update = leaf[:, first::2, None]
        return jax.lax.dynamic_update_slice_in_dim(room, update, column, axis=2)

    scales = (None, None)
    if new.scale is not None:
        scales = (put(recent.k_scale, new.scale, 0), put(recent.v_scale, new.scale, 1))
    return Recent(put(recent.k, new.kv, 0), put(recent.v, new.kv, 1), *scales)


def tokens_of(recent: Recent) -> LayerPages:
    """As `write_tokens` takes them: leaves [B, C, 2*Hkv, ...]."""

    def joined(k, v):  # [B, Hkv, C, ...] each
        both = jnp.moveaxis(jnp.stack([k, v], axis=2), 3, 1)
        return both.reshape(*both.shape[:2], -1, *both.shape[4:])

    scale = None if recent.k_scale is None else joined(recent.k_scale, recent.v_scale)
    return LayerPages(joined(recent.k, recent.v), scale)


def attend_view(
    config: DecoderConfig,
    q: Float[Array, "B H d"],
    view: View,
    start: Int[Array, " B"],
    recent: Recent,
    column: Int[Array, ""],
    window: int | None,
) -> Float[Array, "B Hd"]:
    """softmax(q·k·scale)·v over the `start` tokens of the view and the columns up to `column`.

    Scores and their softmax in float32; int8 keys and values are scaled after their products.
    """
    batch, heads, size = q.shape
    groups = view.k.shape[1]
    q = (q * config.attention_scale).reshape(batch, groups, heads // groups, size)

    def scores(k, k_scale):
        k = k.astype(q.dtype)
        z = jnp.einsum("bhrd,bhtd->bhrt", q, k, preferred_element_type=jnp.float32)
        z = z if k_scale is None else z * k_scale[:, :, None]
        return soft_capped(z, config.attention_soft_cap)

    tokens, columns = jnp.arange(view.k.shape[2]), jnp.arange(recent.k.shape[2])
    seen = tokens < start[:, None]
    seen_recent = columns <= column
    if window is not None:
        seen &= start[:, None] + column - tokens < window
        seen_recent &= column - columns < window
    on_view = jnp.where(seen[:, None, None], scores(view.k, view.k_scale), NEGATIVE)
    on_recent = jnp.where(seen_recent, scores(recent.k, recent.k_scale), NEGATIVE)
    weights = jax.nn.softmax(jnp.concatenate([on_view, on_recent], axis=-1), axis=-1)

    def values(w, v, v_scale):
        w = w if v_scale is None else w * v_scale[:, :, None]
        w, v = w.astype(q.dtype), v.astype(q.dtype)
        return jnp.einsum("bhrt,bhtd->bhrd", w, v, preferred_element_type=jnp.float32)

    split = view.k.shape[2]
    out = values(weights[..., :split], view.v, view.v_scale)
    out += values(weights[..., split:], recent.v, recent.v_scale)
    return out.astype(q.dtype).reshape(batch, -1)
