"""Rows sorted by expert, each expert's times its own matrix, by what is fast on the platform.

No row is dropped and no expert has a capacity. XLA multiplies every row for every expert, under a
mask, where it has no kernel: on a TPU (libtpu 0.0.42.1) for the gradient of the matrices, which is
megablox' `tgmm` (of JAX) here, on a CPU for all products, which are loops over blocks of rows here.
On GPUs (jaxlib 0.10.2) it has one behind a flag, and none for that gradient: there all are plain
products of XLA's over padded blocks, as many whatever the sizes, since a loop whose length is data
makes a GPU ask its host at each turn. JAX's Mosaic kernels (`ragged_dot_mgpu`) are for Hopper only,
and nobody has run them here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
from jaxtyping import Array, Bool, Float, Int

ROW_TILES, LARGEST_TILE = (512, 256, 128), 1024  # of `tgmm`: rows, and columns of either factor
LEAST_BLOCK, LARGEST_BLOCK = 8, 128  # rows of a CPU's product
# Of a GPU's: about the mean of an expert, so that padding at most doubles the rows and no more
# matrices are copied than there are, but no less than a tile of its matrix units; 16 blocks of
# 128 x 768 are about as many tiles as an H100 has units.
LEAST_PADDED, LARGEST_PADDED, AT_ONCE = 64, 512, 16


@jax.custom_vjp
def grouped_product(
    x: Float[Array, "M I"], weight: Float[Array, "E I O"], sizes: Int[Array, " E"]
) -> Float[Array, "M O"]:
    """Each expert's rows of x by its matrix: the first sizes_0 are expert 0's, and so on.

    Backward dX_e = dY_e·W_e^T and dW_e = X_e^T·dY_e. What stands in rows of no expert is undefined.
    """
    # As it is lowered: a plan for GPUs, which has CPU devices, has what a GPU has.
    return lax.platform_dependent(
        x, weight, sizes, tpu=lax.ragged_dot, cpu=product_by_block, default=product_in_batches
    )


def _forward(x, weight, sizes):
    return grouped_product(x, weight, sizes), (x, weight, sizes)


def _backward(saved, d_out):
    def by_kernel(x, weight, sizes, d_out):
        d_x = lax.ragged_dot(d_out, weight.swapaxes(1, 2), sizes)
        return d_x, gradient_by_expert(x, d_out, sizes)

    def by_block(x, weight, sizes, d_out):
        d_x = product_by_block(d_out, weight, sizes, turned=True)
        return d_x, gradient_by_block(x, d_out, sizes)

    def in_batches(x, weight, sizes, d_out):
        d_x = product_in_batches(d_out, weight, sizes, turned=True)
        return d_x, gradient_in_turn(x, d_out, sizes)

    forms = dict(tpu=by_kernel, cpu=by_block, default=in_batches)
    return *lax.platform_dependent(*saved, d_out, **forms), None


grouped_product.defvjp(_forward, _backward)


def gradient_by_expert(
    x: Float[Array, "M I"],
    d_out: Float[Array, "M O"],
    sizes: Int[Array, " E"],
    interpret: bool = False,
) -> Float[Array, "E I O"]:
    """X_e^T·dY_e of each expert's rows by `tgmm`, which takes whole tiles of rows."""
    rows = next((tile for tile in ROW_TILES if len(x) % tile == 0), ROW_TILES[-1])
    room = ((0, -len(x) % rows), (0, 0))
    x, d_out = jnp.pad(x, room), jnp.pad(d_out, room)
    tiling = rows, min(x.shape[1], LARGEST_TILE), min(d_out.shape[1], LARGEST_TILE)
    return tgmm(x.swapaxes(0, 1), d_out, sizes, x.dtype, tiling, interpret=interpret)


def product_by_block(
    x: Float[Array, "M I"],
    weight: Float[Array, "E ..."],
    sizes: Int[Array, " E"],
    turned: bool = False,
) -> Float[Array, "M O"]:
    """`grouped_product`, an expert after the other in blocks of rows; by W^T where `turned`.

    The last block of an expert runs into the rows of the next, which writes them again.
    """
    blocks = _Blocks(len(x), sizes)
    padded = blocks.padded(x)
    over = ((1,), (1 if turned else 0,)), ((), ())

    def expert(e, out):
        matrix = lax.dynamic_index_in_dim(weight, e, keepdims=False)

        def block(at, out):
            some = lax.dynamic_slice_in_dim(padded, at, blocks.rows)
            return lax.dynamic_update_slice_in_dim(out, lax.dot_general(some, matrix, over), at, 0)

        return blocks.over(e, block, out)

    columns = weight.shape[1 if turned else 2]
    empty = jnp.zeros((len(padded), columns), x.dtype)
    return lax.fori_loop(0, len(sizes), expert, empty)[: len(x)]


def gradient_by_block(
    x: Float[Array, "M I"], d_out: Float[Array, "M O"], sizes: Int[Array, " E"]
) -> Float[Array, "E I O"]:
    """X_e^T·dY_e of each expert's rows, summed over its blocks in float32."""
    blocks = _Blocks(len(x), sizes)
    both = blocks.padded(x), blocks.padded(d_out)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    empty = jnp.zeros((x.shape[1], d_out.shape[1]), wide)

    def expert(_, e):
        def block(at, total):
            used = (at + jnp.arange(blocks.rows) < blocks.ends[e])[:, None]
            rows, d_rows = (
                jnp.where(used, lax.dynamic_slice_in_dim(each, at, blocks.rows), 0) for each in both
            )
            return total + jnp.dot(rows.T, d_rows, preferred_element_type=wide)

        return None, blocks.over(e, block, empty).astype(x.dtype)

    return lax.scan(expert, None, jnp.arange(len(sizes)))[1]


class _Blocks:
    """The blocks that the rows of each expert are cut into, the first at its first row."""

    def __init__(self, rows: int, sizes: Int[Array, " E"]):
        mean = -(-rows // len(sizes))
        self.rows = min(max(1 << (mean - 1).bit_length(), LEAST_BLOCK), LARGEST_BLOCK)
        self.ends = jnp.cumsum(sizes)
        self._starts, self._number = self.ends - sizes, -(-sizes // self.rows)

    def padded(self, x: Float[Array, "M I"]) -> Float[Array, "R I"]:
        """With room for the last block of the last expert."""
        return jnp.pad(x, ((0, self.rows), (0, 0)))

    def over(self, expert, block, carried):
        """`block`(its first row, carried) over an expert's."""
        start = self._starts[expert]

        def step(i, carried):
            return block(start + i * self.rows, carried)

        return lax.fori_loop(0, self._number[expert], step, carried)


def product_in_batches(
    x: Float[Array, "M I"],
    weight: Float[Array, "E ..."],
    sizes: Int[Array, " E"],
    turned: bool = False,
) -> Float[Array, "M O"]:
    """`grouped_product` of padded blocks of rows; by W^T where `turned`.

    The first block of every expert at once, by the matrices as they lie; then the others, AT_ONCE
    at a time with as many copies of matrices.
    """
    blocks = _PaddedBlocks(len(x), sizes)
    over = ((2,), (2 if turned else 1,)), ((0,), (0,))

    def batch(_, at):
        experts, rows = at
        return None, lax.dot_general(x[rows], weight[experts], over)

    out = lax.dot_general(x[blocks.first.rows], weight, over)
    batches = jax.tree.map(lambda leaf: leaf.reshape(-1, AT_ONCE, *leaf.shape[1:]), blocks.later)
    _, later = lax.scan(batch, None, (batches.experts, batches.rows))
    every = jnp.concatenate([each.reshape(-1, out.shape[-1]) for each in (out, later)])
    return every[blocks.place]


def gradient_in_turn(
    x: Float[Array, "M I"], d_out: Float[Array, "M O"], sizes: Int[Array, " E"]
) -> Float[Array, "E I O"]:
    """X_e^T·dY_e of each expert's rows, in float32: of all first blocks, then the others' in turn
    are added."""
    blocks = _PaddedBlocks(len(x), sizes)
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def product(rows, used):
        some, d_some = (jnp.where(used[..., None], each[rows], 0) for each in (x, d_out))
        return jnp.einsum("...bi,...bo->...io", some, d_some, preferred_element_type=wide)

    def block(total, at: _Blocked):
        more = lax.dynamic_index_in_dim(total, at.experts, keepdims=False)
        more += product(at.rows, at.used)
        return lax.dynamic_update_index_in_dim(total, more, at.experts, 0), None

    total, _ = lax.scan(block, product(blocks.first.rows, blocks.first.used), blocks.later)
    return total.astype(x.dtype)


class _Blocked(NamedTuple):
    """Blocks of rows, each with its expert."""

    experts: Int[Array, " b"]
    rows: Int[Array, "b size"]
    used: Bool[Array, "b size"]  # False where a row is none of the expert's


class _PaddedBlocks:
    """The first block of each expert, and the others: as many as there can be, some of no rows."""

    def __init__(self, rows: int, sizes: Int[Array, " E"]):
        number = len(sizes)
        mean = max(rows // number, 1)
        size = min(max(1 << mean.bit_length() - 1, LEAST_PADDED), LARGEST_PADDED)
        # One after the first has the `size` rows of the block before it behind it.
        most = -(-rows // (size * AT_ONCE)) * AT_ONCE
        ends, names = jnp.cumsum(sizes), jnp.arange(number)
        starts, others = ends - sizes, jnp.maximum(-(-sizes // size) - 1, 0)
        before = jnp.cumsum(others) - others

        def blocked(experts, turn) -> _Blocked:
            found = (starts[experts] + turn * size)[:, None] + jnp.arange(size)
            used = found < ends[experts][:, None]
            return _Blocked(experts, jnp.minimum(found, rows - 1), used)

        later = jnp.repeat(names, others, total_repeat_length=most)
        self.first = blocked(names, jnp.zeros_like(names))
        self.later = blocked(later, 1 + jnp.arange(most) - before[later])
        # Where each row stands among the blocks'; a row of no expert anywhere.
        owner = jnp.repeat(names, sizes, total_repeat_length=rows)
        place = jnp.arange(rows) - starts[owner]
        block = jnp.where(place < size, owner, number + before[owner] + place // size - 1)
        self.place = jnp.minimum(block * size + place % size, (number + most) * size - 1)
