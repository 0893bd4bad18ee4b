"""The head as XLA matrix products over chunks of the vocabulary: CPU, GPU, and any TPU fallback.

Forward keeps three running numbers a token, m = max z, s = sum e^(z-m), t = sum (z-m) e^(z-m), and
ends with lse = m + log s, entropy = log s - t/s (online softmax, Milakov & Gimelshein 2018,
arXiv:1805.02867, with the entropy sum beside it). t is kept relative to m because
lse - sum p z cancels badly where |z| is large.

Backward recomputes a chunk's logits and forms, from the cotangents of the three outputs,

    dz_i = p_i (g_lse - g_entropy (log p_i + entropy)) + sum_j g_at_j 1[i = ids_j]

then two products: dhidden += dz W_chunk in a float32 carry, dW_chunk = dz^T hidden, written once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

# A chunk's logits are the workspace: 2^24 of them take 64 MiB in float32, little beside the
# parameters and optimizer state, and make products large enough to run at full speed.
CHUNK_LOGITS = 2**24
# With many tokens the chunk must not shrink further: each chunk reads and writes the float32
# dhidden once, 8ND bytes for 6ND * columns flops, so 4096 columns keep that traffic far above
# the flops-per-byte ridge of every accelerator we know (KERNELS: 166 to 560).
LEAST_COLUMNS = 4096
# Rows that are computed or skipped together where a count says how many are in use. Each such block
# of the backward reads and writes a chunk's float32 dunembedding: 0.75 * rows flops a byte.
COUNTED_ROWS = 2048
# Chunk borders at multiples of the widest vector tile (128 lanes of a TPU).
COLUMN_TILE = 128
# Stands for log p = -inf in products with p = 0: e^-1000 is 0 even in float64, and 0 * -1000 = 0.
LEAST_LOG_P = -1e3


class Transform(NamedTuple):
    """Products x.w to logits: z = soft_cap * tanh(x.w / soft_cap) / temperature."""

    temperature: float
    soft_cap: float | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Saved:
    """What the backward pass reads; the flags are static."""

    hidden: Float[Array, "N D"]
    unembedding: Float[Array, "V D"]
    ids: Int[Array, "N J"]
    lse: Float[Array, " N"]
    entropy: Float[Array, " N"]
    products: Float[Array, "N V"] | None  # kept only where one small chunk is the vocabulary
    wants_hidden: bool = field(metadata={"static": True})
    wants_unembedding: bool = field(metadata={"static": True})
    count: Int[Array, ""] | None = None  # rows in use; None: all


def chunk_columns(tokens: int, vocabulary: int, least: int | None = None) -> int:
    """Columns of a chunk: CHUNK_LOGITS logits, at least `least` (LEAST_COLUMNS), nearly equal.

    Where V is no multiple, the last chunk starts early and overlaps its neighbour: no padded copy
    of the matrix, and equal chunks keep the overlap under one tile a chunk.
    """
    columns = max(LEAST_COLUMNS if least is None else least, CHUNK_LOGITS // max(tokens, 1))
    return even_columns(vocabulary, columns)


def even_columns(vocabulary: int, columns: int) -> int:
    """At most about `columns`, so that chunks are nearly equal."""
    if vocabulary <= columns:
        return vocabulary
    even = -(-vocabulary // -(-vocabulary // columns))
    return -(-even // COLUMN_TILE) * COLUMN_TILE


def statistics_dtype(hidden: Array, unembedding: Array) -> jnp.dtype:
    """float32, or float64 where an input is float64 (tests)."""
    return jnp.promote_types(jnp.promote_types(hidden.dtype, unembedding.dtype), jnp.float32)


def contract(left: Array, right: Array, axis_left: int, axis_right: int, dtype) -> Array:
    """A plain two-dimensional product in the inputs' common dtype, accumulated in `dtype`."""
    operand = jnp.promote_types(left.dtype, right.dtype)
    dimensions = (((axis_left,), (axis_right,)), ((), ()))
    return lax.dot_general(
        left.astype(operand), right.astype(operand), dimensions, preferred_element_type=dtype
    )


def logits_of(products: Array, transform: Transform) -> Array:
    if transform.soft_cap is not None:
        products = transform.soft_cap * jnp.tanh(products / transform.soft_cap)
    return products if transform.temperature == 1.0 else products / transform.temperature


class Chunk(NamedTuple):
    start: int | Array
    rows: Array  # [C, D] of the unembedding
    fresh: Array | None  # [C], False where an earlier chunk had the column; None: all True


def chunk_at(unembedding: Array, index: int | Array, columns: int) -> Chunk:
    """Chunk `index`; the last one of a vocabulary that is no multiple starts early."""
    vocabulary = unembedding.shape[0]
    if columns == vocabulary:
        return Chunk(0, unembedding, None)
    first = index * columns
    start = jnp.minimum(first, vocabulary - columns)
    rows = lax.dynamic_slice_in_dim(unembedding, start, columns)
    ragged = vocabulary % columns != 0
    return Chunk(start, rows, start + jnp.arange(columns) >= first if ragged else None)


def over_chunks(step: Callable, state, vocabulary: int, columns: int):
    """Runs step(index, state) for every chunk; one chunk needs no loop."""
    if columns == vocabulary:
        return step(0, state)
    return lax.fori_loop(0, -(-vocabulary // columns), step, state)


class _Rows(NamedTuple):
    """A block of the rows of some arrays; the last one starts early rather than end short."""

    part: Any
    start: Any  # None: all rows
    first: Array | int  # the first row that no block before had

    def put(self, whole: Any, part: Any) -> Any:
        def put(whole, part):
            return lax.dynamic_update_slice_in_dim(whole, part, self.start, axis=0)

        return jax.tree.map(put, whole, part)

    def add(self, whole: Array, part: Array) -> Array:
        if self.start is None:
            return whole + part
        before = lax.dynamic_slice_in_dim(whole, self.start, part.shape[0])
        return self.put(whole, before + part)

    def mine(self, count: Array) -> Array:
        row = jnp.arange(self.part[0].shape[0]) + (0 if self.start is None else self.start)
        return (row >= self.first) & (row < count)


def _rows(arrays: Any, index: Array | None) -> _Rows:
    if index is None:
        return _Rows(arrays, None, 0)
    tokens = arrays[0].shape[0]
    size = min(COUNTED_ROWS, tokens)
    start = jnp.minimum(index * size, tokens - size)
    part = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size), arrays)
    return _Rows(part, start, index * size)


def _over_rows(block: Callable, state, tokens: int, count: Array | None):
    """Runs block(index, state) for the blocks of rows that begin before count, or once for all."""
    if count is None or tokens == 0:
        return block(0, state)
    size = min(COUNTED_ROWS, tokens)
    return lax.fori_loop(0, -(-count // size), block, state)


def forward(
    hidden: Float[Array, "N D"],
    unembedding: Float[Array, "V D"],
    ids: Int[Array, "N J"],
    transform: Transform,
    count: Int[Array, ""] | None = None,
) -> tuple[tuple[Array, Array, Array], Array | None]:
    """(lse [N], logit_at [N,J], entropy [N]), and the products [N,V] where one chunk held them.

    ids outside [0, V) give NaN in logit_at. With a count, blocks of rows that begin there or later
    are not computed, and what stands there means nothing.
    """
    dtype = statistics_dtype(hidden, unembedding)
    if count is not None:
        nothing = (
            jnp.zeros(len(ids), dtype),
            jnp.zeros(ids.shape, dtype),
            jnp.zeros(len(ids), dtype),
        )

        def block(index, out):
            rows = _rows((hidden, ids), index)
            part, _ = forward(rows.part[0], unembedding, rows.part[1], transform)
            return rows.put(out, part)

        return _over_rows(block, nothing, len(ids), count), None
    columns = chunk_columns(len(hidden), len(unembedding))
    statistics, kept = forward_by(columns, hidden, unembedding, ids, transform)
    return statistics, None if kept is None else kept[0]


def forward_by(
    columns: int,
    hidden: Float[Array, "N D"],
    unembedding: Float[Array, "V D"],
    ids: Int[Array, "N J"],
    transform: Transform,
    *,
    keep: bool = False,
) -> tuple[tuple[Array, Array, Array], Float[Array, "chunks N columns"] | None]:
    """`forward` of all rows by chunks of `columns`, and every chunk's products.

    The products are None without `keep`, unless one chunk is the vocabulary. Chunks are those of
    `chunk_at`.
    """
    dtype = statistics_dtype(hidden, unembedding)
    tokens, vocabulary = hidden.shape[0], unembedding.shape[0]
    chunks = -(-vocabulary // columns)

    def step(index, state):
        m, s, t, logit_at, kept = state
        chunk = chunk_at(unembedding, index, columns)
        products = contract(hidden, chunk.rows, 1, 1, dtype)
        z = logits_of(products, transform)

        local = ids - chunk.start
        here = (local >= 0) & (local < columns)
        found = jnp.take_along_axis(
            z, jnp.clip(local, 0, columns - 1), axis=1, mode="promise_in_bounds"
        )
        logit_at = jnp.where(here, found, logit_at)

        if chunk.fresh is not None:
            z = jnp.where(chunk.fresh, z, -jnp.inf)
        m_new = jnp.maximum(m, z.max(axis=1))
        shift = m - m_new
        scale = jnp.exp(shift)
        s_chunk = jnp.exp(z - m_new[:, None]).sum(axis=1)
        # The barrier hides that the difference is the same: XLA's CPU compiler would write a
        # shared one to memory instead of fusing it into each sum (3x slower, measured).
        u = jnp.maximum(z - lax.optimization_barrier(m_new)[:, None], LEAST_LOG_P)
        t_chunk = (u * jnp.exp(u)).sum(axis=1)
        if chunks == 1:
            kept = products[None]
        elif keep:
            kept = lax.dynamic_update_index_in_dim(kept, products, index, axis=0)
        return m_new, scale * s + s_chunk, scale * (t + shift * s) + t_chunk, logit_at, kept

    # The lowest finite m, not -inf: differences of it stay defined before the first chunk and in
    # rows whose first chunks are all -inf.
    zero = jnp.zeros((tokens,), dtype)
    kept = jnp.zeros((chunks, tokens, columns), dtype) if keep and chunks > 1 else None
    state = (zero + jnp.finfo(dtype).min, zero, zero, jnp.full(ids.shape, jnp.nan, dtype), kept)
    m, s, t, logit_at, kept = over_chunks(step, state, vocabulary, columns)
    log_s = jnp.log(s)
    return (m + log_s, logit_at, log_s - t / s), kept


def backward(
    saved: Saved,
    transform: Transform,
    g_lse: Float[Array, " N"] | None,
    g_sampled: Float[Array, " N"] | None,
    g_stored: Float[Array, "N K"] | None,
    g_entropy: Float[Array, " N"] | None,
) -> tuple[Float[Array, "N D"] | None, Float[Array, "V D"] | None]:
    """(dhidden, not yet rounded to its dtype, dunembedding) from the outputs' cotangents.

    A None is a zero that costs nothing.
    """
    hidden, unembedding = saved.hidden, saved.unembedding
    dtype = statistics_dtype(hidden, unembedding)
    operand = jnp.promote_types(hidden.dtype, unembedding.dtype)
    tokens, vocabulary = hidden.shape[0], unembedding.shape[0]
    columns = chunk_columns(tokens, vocabulary)

    def products_cotangent(chunk: Chunk, rows: "_Rows") -> tuple[Array, Array]:
        """The cotangent of hidden W_chunk^T for a block of rows, and these rows of hidden."""
        hidden, ids, lse, entropy, g_lse, g_sampled, g_stored, g_entropy = rows.part
        products = saved.products
        if products is None:
            products = contract(hidden, chunk.rows, 1, 1, dtype)
        z = logits_of(products, transform)
        dz = jnp.zeros_like(z)
        if g_lse is not None or g_entropy is not None:
            weight = 0.0 if g_lse is None else g_lse[:, None]
            if g_entropy is not None:
                log_p = jnp.maximum(z - lse[:, None], LEAST_LOG_P)
                weight = weight - g_entropy[:, None] * (log_p + entropy[:, None])
            dz = jnp.exp(z - lse[:, None]) * weight
        local = ids - chunk.start
        if g_sampled is not None:
            # A comparison fuses into the pass that writes dz; a scatter would be a second pass.
            dz += jnp.where(jnp.arange(columns) == local[:, :1], g_sampled[:, None], 0)
        if g_stored is not None:
            slots = jnp.where((local >= 0) & (local < columns), local, columns)[:, 1:]
            dz = jax.vmap(lambda row, at, g: row.at[at].add(g, mode="drop"))(dz, slots, g_stored)
        if transform.soft_cap is not None:
            dz *= 1 - jnp.tanh(products / transform.soft_cap) ** 2
        if transform.temperature != 1.0:
            dz /= transform.temperature
        if saved.count is not None:
            # Rows of no use, or of an earlier block, may hold anything: 0 * NaN is NaN.
            mine = rows.mine(saved.count)[:, None]
            dz, hidden = jnp.where(mine, dz, 0), jnp.where(mine, hidden, 0)
        return dz.astype(operand), hidden

    def step(index, state):
        d_hidden, d_unembedding = state
        chunk = chunk_at(unembedding, index, columns)

        def block(row_block, state):
            d_hidden, d_rows = state
            rows = _rows(by_row, row_block if saved.count is not None else None)
            dz, hidden = products_cotangent(chunk, rows)
            if d_hidden is not None:
                # Columns met before are zeroed here and not in dz, so that rewriting their
                # dunembedding below writes the same values again.
                matrix = chunk.rows
                if chunk.fresh is not None:
                    matrix = jnp.where(chunk.fresh[:, None], matrix, 0)
                d_hidden = rows.add(d_hidden, contract(dz, matrix, 1, 0, dtype))
            if d_rows is not None:
                more = contract(dz, hidden, 0, 0, dtype)
                d_rows = more if saved.count is None else d_rows + more
            return d_hidden, d_rows

        d_rows = None if d_unembedding is None else jnp.zeros((columns, hidden.shape[1]), dtype)
        d_hidden, d_rows = _over_rows(block, (d_hidden, d_rows), tokens, saved.count)
        if d_unembedding is not None:
            d_unembedding = lax.dynamic_update_slice_in_dim(
                d_unembedding, d_rows.astype(unembedding.dtype), chunk.start, axis=0
            )
        return d_hidden, d_unembedding

    by_row = (
        hidden, saved.ids, saved.lse, saved.entropy, g_lse, g_sampled, g_stored, g_entropy
    )  # fmt: skip
    state = (
        jnp.zeros(hidden.shape, dtype) if saved.wants_hidden else None,
        jnp.zeros_like(unembedding) if saved.wants_unembedding else None,
    )
    return over_chunks(step, state, vocabulary, columns)


def with_backward(run: Callable) -> Callable:
    """A body from its forward: (lse, sampled logit, stored logits, entropy), differentiable.

    `run` is called as `forward` and returns what it returns; the backward is `backward`. The two
    kinds of logits are separate outputs because a cotangent is known to be zero, and skipped, only
    for a whole output: one array would scatter the zeros of the stored columns.
    """

    @partial(jax.custom_vjp, nondiff_argnums=(4,))
    def body(hidden, unembedding, ids, count, transform):
        (lse, logit_at, entropy), _ = run(hidden, unembedding, ids, transform, count)
        return lse, logit_at[:, 0], logit_at[:, 1:], entropy

    def body_forward(hidden, unembedding, ids, count, transform):
        count = None if count is None else count.value
        (lse, logit_at, entropy), products = run(
            hidden.value, unembedding.value, ids.value, transform, count
        )
        if products is not None and products.size > CHUNK_LOGITS:
            products = None
        saved = Saved(
            hidden.value, unembedding.value, ids.value, lse, entropy, products,
            wants_hidden=hidden.perturbed, wants_unembedding=unembedding.perturbed, count=count,
        )  # fmt: skip
        return (lse, logit_at[:, 0], logit_at[:, 1:], entropy), saved

    def body_backward(transform, saved, cotangents):
        known = [None if isinstance(g, SymbolicZero) else g for g in cotangents]
        if all(g is None for g in known):
            return None, None, None, None
        d_hidden, d_unembedding = backward(saved, transform, *known)
        if d_hidden is not None:
            d_hidden = d_hidden.astype(saved.hidden.dtype)
        return d_hidden, d_unembedding, None, None

    body.defvjp(body_forward, body_backward, symbolic_zeros=True)
    return body


xla = with_backward(forward)
