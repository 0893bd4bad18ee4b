"""The head's forward as one Pallas Mosaic TPU kernel; the backward is that of `xla`.

A grid step multiplies [rows, D] of hidden, which stays in vector memory for a whole pass over the
vocabulary, by [columns, D] of W, and folds the logits into running numbers that are kept a *lane*,
not a row: m, s and t are [rows, 128] and column c updates lane c % 128, so that a step has no
reduction across lanes, the slow direction; one at the end of the pass joins the 128 parts. m, s, t
are those of `xla`: max z, sum e^(z-m), sum (z-m) e^(z-m).

The chosen logits cost the same for 1 id as for 126: id lives in the register of its lane id % 128,
so one shuffle of a register's lanes finds the candidates of 128 ids and a comparison of id // 128
keeps the right ones. (By comparison with every column, K = 20 would take 63 vector operations a
logit; the rest takes about 12. Rows of W gathered outside would read (K+1) N D values more.)

A step is a loop over products of fewer rows and half of the columns, which keeps the program
small. Each is computed while the logits of the product before it are folded; a step's last one
waits for the next step. Nothing orders the two, so the compiler's schedule lays the vector unit's
work beneath the matrix unit's.

There is no Mosaic GPU body: on a GPU the head is `xla`, since nothing was measured that beats it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from dppo_jax.kernels import tiles
from dppo_jax.kernels.tiles import LANES, Tile
from dppo_jax.kernels.xla import LEAST_LOG_P, Transform, logits_of, with_backward

# Tests put pltpu.InterpretParams here, and the kernel runs in the simulator.
INTERPRET: pltpu.InterpretParams | bool = False
# Rows whose statistics are held in registers at once: 8 registers each of m, s, t and ids.
STRIP = 64
# Ids a token: two registers of 128 lanes, less the two that carry lse and entropy out.
MOST_IDS = 2 * LANES - 2
LANE_BITS = LANES.bit_length() - 1
# In no group of columns, also not in those before the first that a pass begins with.
_NOWHERE = -(2**31)
_LOWEST = float(jnp.finfo(jnp.float32).min)
_ROWS_BY_ROWS = (((1,), (1,)), ((), ()))  # x W^T


def forward(
    hidden: Float[Array, "N D"],
    unembedding: Float[Array, "V D"],
    ids: Int[Array, "N J"],
    transform: Transform,
    count: Int[Array, ""] | int | None = None,
) -> tuple[Float[Array, " N"], Float[Array, "N J"], Float[Array, " N"]]:
    """(lse, logit_at, entropy), float32; ids outside [0, V) give NaN.

    Blocks of rows that begin at `count` or later are neither read nor computed; what they return
    means nothing. Products of float32 inputs have JAX's default precision, on a TPU one bfloat16
    pass. Raises ValueError where `why_not` has an answer.
    """
    reason = why_not(hidden, unembedding, ids)
    if reason is not None:
        shapes = f"hidden {hidden.shape}, unembedding {unembedding.shape}, ids {ids.shape}"
        raise ValueError(f'head body "pallas_tpu" {reason}: {shapes}; use body="xla"')
    (tokens, width), (vocabulary, _), (_, chosen) = hidden.shape, unembedding.shape, ids.shape
    if tokens == 0:
        none = jnp.zeros((0,), jnp.float32)
        return none, jnp.zeros(ids.shape, jnp.float32), none
    operand = jnp.promote_types(hidden.dtype, unembedding.dtype)
    lanes = _lanes(chosen)
    tile = _tile(hidden, unembedding, ids)
    assert tile is not None
    rows, columns = tile.rows, tile.columns
    row_blocks, column_blocks = pl.cdiv(tokens, rows), pl.cdiv(vocabulary, columns)

    # Past the last live block the indices repeat, and a block that is already there is not fetched.
    def rows_at(i, j, count):
        return jnp.minimum(i, jnp.maximum(pl.cdiv(count[0], rows) - 1, 0)), 0

    def columns_at(i, j, count):
        return jnp.where(i * rows < count[0], j, column_blocks - 1), 0

    kernel = pl.pallas_call(
        partial(_kernel, vocabulary=vocabulary, chosen=chosen, transform=transform),
        out_shape=jax.ShapeDtypeStruct((tokens, lanes), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(row_blocks, column_blocks),
            in_specs=[
                pl.BlockSpec((rows, width), rows_at, pipeline_mode=pl.Buffered(1)),
                pl.BlockSpec((columns, width), columns_at),
                pl.BlockSpec((rows, lanes), rows_at),
            ],
            out_specs=pl.BlockSpec((rows, lanes), lambda i, j, count: (i, 0)),
            scratch_shapes=[pltpu.VMEM((tile.product_rows, columns // 2), jnp.float32)] * 2
            + [pltpu.VMEM((rows, LANES), jnp.float32)] * 3,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tile.vmem_bytes
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * vocabulary * width,
            transcendentals=tokens * vocabulary * (1 if transform.soft_cap is None else 2),
            bytes_accessed=unembedding.size * unembedding.dtype.itemsize * row_blocks
            + tokens * (width * operand.itemsize + 8 * lanes),
        ),
        interpret=INTERPRET,
        name="head_forward",
    )
    padded = jnp.pad(ids, ((0, 0), (0, lanes - chosen)), constant_values=_NOWHERE)
    padded = jnp.where(padded < 0, _NOWHERE, padded)
    live = jnp.full((1,), tokens if count is None else count, jnp.int32)
    out = kernel(live, hidden.astype(operand), unembedding, padded)
    return out[:, chosen], out[:, :chosen], out[:, chosen + 1]


def why_not(hidden: Array, unembedding: Array, ids: Array) -> str | None:
    """What keeps this body from these arrays on the device that is traced for, in words."""
    platform = tiles.target().platform
    if platform != "tpu" and not INTERPRET:
        return f"needs a TPU, and this program is for {platform}"
    if ids.shape[1] > MOST_IDS:
        return f"takes at most {MOST_IDS} ids a token"
    for array in (hidden, unembedding):
        if array.dtype not in (jnp.bfloat16, jnp.float32):
            return f"wants bfloat16 or float32, not {array.dtype}"
    if _tile(hidden, unembedding, ids) is None:
        return "cannot hold rows this wide in the chip's vector memory"
    return None


def _lanes(chosen: int) -> int:
    return -(-(chosen + 2) // LANES) * LANES


def _tile(hidden: Array, unembedding: Array, ids: Array) -> Tile | None:
    largest = tiles.largest_tile(tiles.target())
    itemsize = jnp.promote_types(hidden.dtype, unembedding.dtype).itemsize
    tokens, width = hidden.shape
    return largest and tiles.fit(largest, tokens, width, itemsize, _lanes(ids.shape[1]))


def _kernel(
    count, hidden, unembedding, ids, out, z_first, z_second, m, s, t,
    *, vocabulary, chosen, transform,
):  # fmt: skip
    row_block, block = pl.program_id(0), pl.program_id(1)
    last = pl.num_programs(1) - 1
    part, half = z_first.shape  # rows of a product, and columns
    parts = hidden.shape[0] // part
    live = row_block * hidden.shape[0] < count[0]

    @pl.when(block == 0)
    def _():
        out[...] = jnp.full(out.shape, jnp.nan, jnp.float32)
        m[...] = jnp.full(m.shape, _LOWEST, jnp.float32)
        s[...] = jnp.zeros(s.shape, jnp.float32)
        t[...] = jnp.zeros(t.shape, jnp.float32)
        # The first product is made while the logits of a product before it are taken.
        z_second[...] = jnp.full(z_second.shape, -jnp.inf, jnp.float32)

    def multiply(z, rows, second):
        w = unembedding[second * half : (second + 1) * half, :].astype(hidden.dtype)
        products = lax.dot_general(
            hidden[rows, :], w, _ROWS_BY_ROWS, preferred_element_type=jnp.float32
        )
        values = logits_of(products, transform)
        # Rows of W past the vocabulary's end hold anything, and only the last block has them.
        valid = min(max(vocabulary % (2 * half) - second * half, 0), half)
        if vocabulary % (2 * half) and valid < half:
            column = lax.broadcasted_iota(jnp.int32, values.shape, 1)
            values = jnp.where(column < jnp.where(block == last, valid, half), values, -jnp.inf)
        z[...] = values

    def fold(z, first_row, index):
        for start in range(0, part, STRIP):
            size = min(STRIP, part - start)
            rows = pl.ds(pl.multiple_of(first_row + start, size), size)
            group = index * (half // LANES)
            _fold_strip(rows, pl.ds(start, size), group, z, ids, out, m, s, t)

    @pl.when(live)
    def _():
        @pl.loop(0, parts)
        def _(i):
            first_row = pl.multiple_of(i * part, part)
            before = pl.multiple_of(jnp.where(i == 0, parts - 1, i - 1) * part, part)
            rows = pl.ds(first_row, part)
            multiply(z_first, rows, 0)
            fold(z_second, before, jnp.where(i == 0, 2 * block - 1, 2 * block + 1))
            multiply(z_second, rows, 1)
            fold(z_first, first_row, 2 * block)

    @pl.when(live & (block == last))
    def _():
        fold(z_second, (parts - 1) * part, 2 * block + 1)
        highest = jnp.max(m[...], axis=1, keepdims=True)
        shift = m[...] - highest
        scale = jnp.exp(shift)
        s_row = jnp.sum(scale * s[...], axis=1, keepdims=True)
        t_row = jnp.sum(scale * (t[...] + shift * s[...]), axis=1, keepdims=True)
        log_s = jnp.log(s_row)
        lane = lax.broadcasted_iota(jnp.int32, out.shape, 1)
        ends = jnp.where(lane == chosen, highest + log_s, log_s - t_row / s_row)
        out[...] = jnp.where((lane == chosen) | (lane == chosen + 1), ends, out[...])


def _fold_strip(strip, z_strip, first_group, z, ids, out, m, s, t):
    """Takes z[z_strip], groups of 128 columns from `first_group` on, into rows of m, s, t, out."""
    groups = [pl.ds(at, LANES) for at in range(0, z.shape[1], LANES)]
    m_old = m[strip, :]
    m_new = m_old
    for at in groups:
        m_new = jnp.maximum(m_new, z[z_strip, at])
    shift = m_old - m_new
    scale = jnp.exp(shift)
    s_old = s[strip, :]
    s_new = scale * s_old
    t_new = scale * (t[strip, :] + shift * s_old)

    registers = [pl.ds(at, LANES) for at in range(0, ids.shape[1], LANES)]
    wanted = [ids[strip, at] for at in registers]
    found = [out[strip, at] for at in registers]
    for g, at in enumerate(groups):
        z_g = z[z_strip, at]
        for k, id_k in enumerate(wanted):
            lane, group = id_k & (LANES - 1), id_k >> LANE_BITS
            here = jnp.take_along_axis(z_g, lane, axis=1, mode="promise_in_bounds")
            found[k] = jnp.where(group == first_group + g, here, found[k])
        u = jnp.maximum(z_g - m_new, LEAST_LOG_P)
        e = jnp.exp(u)
        s_new += e
        t_new += u * e
    m[strip, :], s[strip, :], t[strip, :] = m_new, s_new, t_new
    for at, value in zip(registers, found, strict=True):
        out[strip, at] = value


def _forward(hidden, unembedding, ids, transform, count):
    return forward(hidden, unembedding, ids, transform, count), None


pallas_tpu = with_backward(_forward)
