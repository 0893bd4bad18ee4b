"""Keys and values in pages: their arrays, how they are rounded, written, copied and viewed.

Key and value heads alternate on one axis, the form that JAX's ragged paged attention reads.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dppo_jax.models.config import DecoderConfig
from dppo_jax.sharding import constrain, viewed

INT8_LARGEST = 127


class LayerPages(NamedTuple):
    """One layer's pages, of all sequences."""

    kv: Float[Array, "pages page_size 2*Hkv d"] | Int[Array, "pages page_size 2*Hkv d"]
    scale: Float[Array, "pages page_size 2*Hkv"] | None  # of int8: value = kv * scale


class View(NamedTuple):
    """Keys and values of each slot's tokens in order, for a loop to read; scales as in pages."""

    k: Array  # [B, Hkv, S, d]
    v: Array
    k_scale: Float[Array, "B Hkv S"] | None
    v_scale: Float[Array, "B Hkv S"] | None


def storage_dtype(config: DecoderConfig, cache_dtype: str) -> jnp.dtype:
    return jnp.dtype(config.dtype if cache_dtype == "model" else cache_dtype)


def page_bytes(config: DecoderConfig, cache_dtype: str, page_size: int) -> int:
    """Bytes of one page in all layers, scales included."""
    dtype = storage_dtype(config, cache_dtype)
    scale = 4 if dtype == jnp.int8 else 0
    each = config.head_size * dtype.itemsize + scale
    return config.layers * page_size * 2 * config.kv_heads * each


def empty_pages(
    config: DecoderConfig, cache_dtype: str, pages: int, page_size: int
) -> list[LayerPages]:
    """Room for `pages` pages in every layer."""
    dtype = storage_dtype(config, cache_dtype)
    heads = 2 * config.kv_heads

    def zeros(*shape, dtype=dtype):
        with viewed("decode"):
            return constrain(jnp.zeros(shape, dtype), "queries", None, "kv_heads")

    def layer() -> LayerPages:
        kv = zeros(pages, page_size, heads, config.head_size)
        int8 = dtype == jnp.int8
        return LayerPages(kv, zeros(pages, page_size, heads, dtype=jnp.float32) if int8 else None)

    return [layer() for _ in range(config.layers)]


def rounded(
    k: Float[Array, "*N Hkv d"], v: Float[Array, "*N Hkv d"], dtype: jnp.dtype
) -> LayerPages:
    """Keys and values as they are stored: leaves [*N, 2*Hkv, d] and [*N, 2*Hkv].

    int8: round(x / s) with s = max|x| / 127 of the token's head, in float32.
    """
    kv = jnp.stack([k, v], axis=-2).reshape(*k.shape[:-2], 2 * k.shape[-2], k.shape[-1])
    if dtype != jnp.int8:
        return LayerPages(kv.astype(dtype), None)
    wide = kv.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / INT8_LARGEST
    steps = wide / jnp.where(scale == 0, 1.0, scale)[..., None]
    return LayerPages(jnp.round(steps).astype(jnp.int8), scale)


def restored(stored: LayerPages, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Keys and values [*N, Hkv, d] that `stored` stands for."""
    kv = stored.kv.astype(dtype)
    if stored.scale is not None:
        kv = (stored.kv * stored.scale[..., None]).astype(dtype)
    return kv[..., 0::2, :], kv[..., 1::2, :]


def write_pages(pages: LayerPages, new: LayerPages, to: Int[Array, "N E"]) -> LayerPages:
    """The pages with whole ones written; new leaves [N, E * page_size, ...].

    Numbers beyond the last page are written nowhere.
    """

    def write(old, leaf):
        leaf = leaf.reshape(*to.shape, *old.shape[1:])
        return old.at[to].set(leaf, mode="drop")

    return jax.tree.map(write, pages, new)


def write_tokens(
    pages: LayerPages, new: LayerPages, to: Int[Array, "*N"], at: Int[Array, "*N"]
) -> LayerPages:
    """The pages with tokens written: leaf [*N, ...] to place `at` of page `to`."""
    return jax.tree.map(lambda old, leaf: old.at[to, at].set(leaf, mode="drop"), pages, new)


def copy_pages(pages: LayerPages, source: Int[Array, " N"], to: Int[Array, " N"]) -> LayerPages:
    """The pages with some copied."""
    return jax.tree.map(lambda old: old.at[to].set(old[source], mode="drop"), pages)


def pages_of(pages: LayerPages, table: Int[Array, "N E"]) -> LayerPages:
    """The tokens of the pages that `table` lists: leaves [N, E * page_size, ...]."""
    return jax.tree.map(lambda leaf: leaf[table].reshape(len(table), -1, *leaf.shape[2:]), pages)


def view_of(pages: LayerPages, table: Int[Array, "B E"]) -> View:
    """The pages that `table` lists, slot after slot, as dense arrays."""

    def part(leaf, first):  # [B, E, page_size, Hkv, ...] -> [B, Hkv, E * page_size, ...]
        leaf = leaf[table][:, :, :, first::2]
        batch, count, size, heads = leaf.shape[:4]
        return jnp.moveaxis(leaf, 3, 1).reshape(batch, heads, count * size, *leaf.shape[4:])

    scales = (None, None)
    if pages.scale is not None:
        scales = (part(pages.scale, 0), part(pages.scale, 1))
    return View(part(pages.kv, 0), part(pages.kv, 1), *scales)


def table_of(rows: list[list[int]], width: int, filler: int) -> np.ndarray:
    """Lists of page numbers as a rectangle, for the device."""
    table = np.full((len(rows), width), filler, np.int32)
    for row, pages in zip(table, rows, strict=True):
        row[: len(pages)] = pages
    return table
