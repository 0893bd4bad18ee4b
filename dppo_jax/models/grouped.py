"""Rows sorted by expert, each expert's times its own matrix, by what is fast on the platform.

No row is dropped and no expert has a capacity. XLA multiplies every row for every expert, under a
mask, where it has no kernel: on a TPU (libtpu 0.0.42.1) for the gradient of the matrices, which is
megablox' `tgmm` (of JAX) here, on a CPU for all products, which are loops over blocks of rows here.
On GPUs (jaxlib 0.10.2) it has one behind a flag, and none for that gradient: there all are plain
products of XLA's over padded blocks, as many whatever the sizes, since a loop whose length is data
makes a GPU ask its host at each turn. JAX's Mosaic kernels (`ragged_dot_mgpu`) are for Hopper only,
and nobody has run them here.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
from jaxtyping import Array, Float, Int

ROW_TILES, LARGEST_TILE = (512, 256, 128), 1024  # of `tgmm`: rows, and columns of either factor
LEAST_BLOCK, LARGEST_BLOCK = 8, 128  # rows of a CPU's product
# Of a GPU's: about the mean of an expert, so that padding at most doubles the rows and an expert's
# matrix is copied about twice, but no less than a tile of its matrix units; 16 blocks of 128 x 768
# are about as many tiles as an H100 has units.
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
    """`grouped_product`, AT_ONCE padded blocks of rows at a time; by W^T where `turned`.

    Each with a copy of its expert's matrix, so that no more than AT_ONCE are copied at once.
    """
    blocks = _PaddedBlocks(len(x), sizes)
    over = ((2,), (2 if turned else 1,)), ((0,), (0,))

    def batch(_, at):
        experts, rows = at
        return None, lax.dot_general(x[rows], weight[experts], over)

    batches = blocks.experts.reshape(-1, AT_ONCE), blocks.rows.reshape(-1, AT_ONCE, blocks.size)
    _, out = lax.scan(batch, None, batches)
    return out.reshape(-1, out.shape[-1])[blocks.place]


def gradient_in_turn(
    x: Float[Array, "M I"], d_out: Float[Array, "M O"], sizes: Int[Array, " E"]
) -> Float[Array, "E I O"]:
    """X_e^T·dY_e of each expert's rows: its padded blocks are added in turn, in float32."""
    blocks = _PaddedBlocks(len(x), sizes)
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def block(total, at):
        expert, *rows = at
        some, d_some = (jnp.where(rows[1][:, None], each[rows[0]], 0) for each in (x, d_out))
        more = jnp.dot(some.T, d_some, preferred_element_type=wide)
        more += lax.dynamic_index_in_dim(total, expert, keepdims=False)
        return lax.dynamic_update_index_in_dim(total, more, expert, 0), None

    empty = jnp.zeros((len(sizes), x.shape[1], d_out.shape[1]), wide)
    total, _ = lax.scan(block, empty, (blocks.experts, blocks.rows, blocks.used))
    return total.astype(x.dtype)


class _PaddedBlocks:
    """Blocks of `size` rows that begin anew with each expert, as many as it takes at the most."""

    def __init__(self, rows: int, sizes: Int[Array, " E"]):
        number = len(sizes)
        mean = max(rows // number, 1)
        self.size = min(max(1 << mean.bit_length() - 1, LEAST_PADDED), LARGEST_PADDED)
        most = (rows + number * (self.size - 1)) // self.size
        most = -(-most // AT_ONCE) * AT_ONCE
        ends, each = jnp.cumsum(sizes), -(-sizes // self.size)
        starts, before = ends - sizes, jnp.cumsum(each) - each
        names = jnp.arange(number)
        self.experts = jnp.repeat(names, each, total_repeat_length=most)
        turn = jnp.arange(most) - before[self.experts]
        first = starts[self.experts] + turn * self.size
        found = first[:, None] + jnp.arange(self.size)
        self.used = found < ends[self.experts][:, None]
        self.rows = jnp.minimum(found, rows - 1)
        owner = jnp.repeat(names, sizes, total_repeat_length=rows)
        # Where each row stands among the blocks'; a row of no expert anywhere.
        place = before[owner] * self.size + jnp.arange(rows) - starts[owner]
        self.place = jnp.minimum(place, most * self.size - 1)
