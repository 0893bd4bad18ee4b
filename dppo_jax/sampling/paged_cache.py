"""Keys and values in pages: their arrays, how they are rounded, written, copied and viewed.

Two layouts, one for each of the `decode_forms`: what the loop reads decides how tokens lie.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dppo_jax.models.config import DecoderConfig
from dppo_jax.sharding import constrain, viewed

INT8_LARGEST = 127
# Logical axes that split the arrays of each layout.
SPLIT, RAGGED = ("queries", "kv_heads"), ("queries", None, "kv_heads")


class Stored(NamedTuple):
    """Keys and values of tokens, rounded as pages keep them."""

    k: Float[Array, "*N Hkv d"] | Int[Array, "*N Hkv d"]
    v: Float[Array, "*N Hkv d"] | Int[Array, "*N Hkv d"]
    k_scale: Float[Array, "*N Hkv"] | None  # of int8: value = k * scale
    v_scale: Float[Array, "*N Hkv"] | None


class SplitPages(NamedTuple):
    """One layer's pages, of all sequences; a head's tokens lie side by side."""

    k: Float[Array, "pages Hkv page_size d"] | Int[Array, "pages Hkv page_size d"]
    v: Float[Array, "pages Hkv page_size d"] | Int[Array, "pages Hkv page_size d"]
    k_scale: Float[Array, "pages Hkv page_size"] | None
    v_scale: Float[Array, "pages Hkv page_size"] | None

    @staticmethod
    def of(tokens: Stored) -> "SplitPages":
        """Pages of tokens [..., page_size, Hkv, d]."""
        axis = tokens.k.ndim - 3
        return SplitPages(*jax.tree.map(lambda leaf: leaf.swapaxes(axis, axis + 1), tokens))

    @property
    def tokens(self) -> Stored:
        """The contrary of `of`."""
        axis = self.k.ndim - 3
        return Stored(*jax.tree.map(lambda leaf: leaf.swapaxes(axis, axis + 1), self))

    @property
    def page_size(self) -> int:
        return self.v.shape[2]

    @property
    def axes(self) -> tuple:
        return SPLIT

    def with_tokens(self, new: Stored, to: Int[Array, "*N"], at: Int[Array, "*N"]) -> "SplitPages":
        """These pages with tokens written to place `at` of page `to`."""

        def put(old, leaf):
            return old.at[to, :, at].set(leaf, mode="drop")

        return jax.tree.map(put, self, SplitPages(*new))


class RaggedPages(NamedTuple):
    """The same as JAX's ragged paged attention reads it: heads of keys and values in turn."""

    kv: Float[Array, "pages page_size 2*Hkv d"]

    @staticmethod
    def of(tokens: Stored) -> "RaggedPages":
        """See `SplitPages`."""
        k, v = tokens.k, tokens.v
        return RaggedPages(jnp.stack([k, v], -2).reshape(*k.shape[:-2], -1, k.shape[-1]))

    @property
    def tokens(self) -> Stored:
        """See `SplitPages`."""
        return Stored(self.kv[..., 0::2, :], self.kv[..., 1::2, :], None, None)

    @property
    def page_size(self) -> int:
        return self.kv.shape[1]

    @property
    def axes(self) -> tuple:
        return RAGGED

    def with_tokens(self, new: Stored, to: Int[Array, "*N"], at: Int[Array, "*N"]) -> "RaggedPages":
        """See `SplitPages`."""
        return RaggedPages(self.kv.at[to, at].set(self.of(new).kv, mode="drop"))


LayerPages = SplitPages | RaggedPages


class View(NamedTuple):
    """Keys and values of each slot's tokens in order, for a loop to read; scales as in pages."""

    k: Array  # [B, Hkv, S, d]
    v: Array  # [B, Hkv, S, d]
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
    config: DecoderConfig, cache_dtype: str, pages: int, page_size: int, *, ragged: bool = False
) -> list[LayerPages]:
    """Room for `pages` pages in every layer."""
    dtype = storage_dtype(config, cache_dtype)

    def layer() -> LayerPages:
        tokens = jnp.zeros((pages, page_size, config.kv_heads, config.head_size), dtype)
        scale = jnp.zeros(tokens.shape[:-1]) if dtype == jnp.int8 else None
        with viewed("decode"):
            nothing = Stored(tokens, tokens, scale, scale)
            made = RaggedPages.of(nothing) if ragged else SplitPages.of(nothing)
            return jax.tree.map(lambda leaf: constrain(leaf, *made.axes), made)

    return [layer() for _ in range(config.layers)]


def rounded(k: Float[Array, "*N Hkv d"], v: Float[Array, "*N Hkv d"], dtype: jnp.dtype) -> Stored:
    """Keys and values as they are stored.

    int8: round(x / s) with s = max|x| / 127 of the token's head, in float32.
    """
    if dtype != jnp.int8:
        return Stored(k.astype(dtype), v.astype(dtype), None, None)

    def steps(x):
        wide = x.astype(jnp.float32)
        scale = jnp.max(jnp.abs(wide), axis=-1) / INT8_LARGEST
        each = wide / jnp.where(scale == 0, 1.0, scale)[..., None]
        return jnp.round(each).astype(jnp.int8), scale

    (k, k_scale), (v, v_scale) = steps(k), steps(v)
    return Stored(k, v, k_scale, v_scale)


def restored(stored: Stored, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Keys and values [*N, Hkv, d] that `stored` stands for."""

    def value(x, scale):
        return x.astype(dtype) if scale is None else (x * scale[..., None]).astype(dtype)

    return value(stored.k, stored.k_scale), value(stored.v, stored.v_scale)


def write_pages(pages: LayerPages, new: Stored, to: Int[Array, "N E"]) -> LayerPages:
    """The pages with whole ones written; new leaves [N, E * page_size, ...].

    Numbers beyond the last page are written nowhere.
    """
    shape = *to.shape, pages.page_size
    of_pages = jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[2:]), new)
    return jax.tree.map(
        lambda old, leaf: old.at[to].set(leaf, mode="drop"), pages, pages.of(of_pages)
    )


def copy_pages(pages: LayerPages, source: Int[Array, " N"], to: Int[Array, " N"]) -> LayerPages:
    """The pages with some copied."""
    return jax.tree.map(lambda old: old.at[to].set(old[source], mode="drop"), pages)


def tokens_of(pages: LayerPages, table: Int[Array, "N E"]) -> Stored:
    """The tokens of the pages that `table` lists: leaves [N, E * page_size, ...]."""
    listed = jax.tree.map(lambda leaf: leaf[table], pages)
    return jax.tree.map(lambda leaf: leaf.reshape(len(table), -1, *leaf.shape[3:]), listed.tokens)


def view_of(pages: SplitPages, table: Int[Array, "B E"]) -> View:
    """The pages that each row of `table` lists as dense arrays."""

    def joined(leaf):
        found = leaf[table].swapaxes(1, 2)  # [B, Hkv, pages, page_size, ...]
        return found.reshape(*found.shape[:2], -1, *found.shape[4:])

    return View(*jax.tree.map(joined, pages))


def empty_view(pages: SplitPages, slots: int, room: int) -> View:
    """Room for `room` tokens of each slot, stored as these pages store them."""

    def nothing(leaf):
        return jnp.zeros((slots, leaf.shape[1], room, *leaf.shape[3:]), leaf.dtype)

    return View(*jax.tree.map(nothing, pages))


def table_of(rows: list[list[int]], width: int, filler: int) -> np.ndarray:
    """Lists of page numbers as a rectangle, for the device."""
    table = np.full((len(rows), width), filler, np.int32)
    for row, pages in zip(table, rows, strict=True):
        row[: len(pages)] = pages
    return table
