"""Loss and gradient of the head in one pass over the logits: 6NDV flops where two passes take 8NDV.

The two-pass head (`kernels.head`) returns statistics, and its backward pass computes every logit
again. Where a token's loss depends on that token alone nothing has to wait: a chunk of tokens gets
its logits against the whole vocabulary once, the caller's loss turns their statistics into
cotangents g, and with these at hand

    dz_i = sum_j g_j 1[i = ids_j] - p_i (sum_j g_j + g_entropy (log p_i + entropy))

goes into dhidden = dz W and dW += dz^T hidden at once. `kernels.xla` has the same formula, where
g_lse = -sum_j g_j because the loss sees log p_j = z_j - lse.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dppo_jax.kernels import tiles
from dppo_jax.kernels.combining import combine, combine_logits
from dppo_jax.kernels.packing import packing
from dppo_jax.kernels.xla import (
    LEAST_LOG_P,
    Transform,
    chunk_at,
    contract,
    even_columns,
    forward_by,
    logits_of,
    over_chunks,
    statistics_dtype,
)

ROW_TILE = 8  # sublanes of a TPU


class TokenTerms(NamedTuple):
    """What a loss may use of the distributions at n tokens; float32."""

    logp: Float[Array, "n J"]  # log-probabilities of `ids`; NaN where an id is outside [0, V)
    entropy: Float[Array, " n"]  # nats


# Losses [n] of n tokens from their terms and the caller's `rows`, each token's from its own alone.
RowLoss = Callable[[TokenTerms, Any], Array]


class Gradients(NamedTuple):
    hidden: Float[Array, "N D"]  # of the dtype of hidden
    unembedding: Float[Array, "V D"]  # float32, whatever the dtype of the matrix


def chunk_tokens(tokens: int) -> int:
    """Tokens of a chunk: nearly equal chunks, rounded up to ROW_TILE.

    SINGLE_PASS_CHUNKS of them, fewer where they would be less than SINGLE_PASS_LEAST_TOKENS.
    """
    chunks = min(tiles.SINGLE_PASS_CHUNKS, max(1, tokens // tiles.SINGLE_PASS_LEAST_TOKENS))
    return max(1, -(-tokens // (chunks * ROW_TILE))) * ROW_TILE


def fused_loss_and_grad(
    loss: RowLoss,
    hidden: Float[Array, "N D"],
    unembedding: Float[Array, "V D"],
    ids: Int[Array, "N J"],
    rows: Any,
    *,
    temperature: float = 1.0,
    soft_cap: float | None = None,
    stored_gradient: bool = True,
    valid: Bool[Array, " N"] | None = None,
    vocabulary_axis: str | None = None,
    token_axes: tuple[str, ...] = (),
) -> tuple[Float[Array, ""], TokenTerms, Gradients]:
    """(sum of losses, terms, its gradients) of z = soft_cap * tanh(x.w / soft_cap) / temperature.

    The logits of a chunk of tokens are the only array with a vocabulary axis beside the matrix and
    its gradient.

    Args:
      loss: (TokenTerms, rows) of a chunk -> losses [n]. A token's loss may depend on its own terms
        and rows only; nothing checks that.
      hidden, unembedding, ids: as `kernels.head.head`; column 0 of ids is the sampled token.
      rows: a pytree of what else the loss needs, leaves [N, ...].
      temperature, soft_cap: as `kernels.head.head`; known when tracing.
      stored_gradient: False makes logp[:, 1:] constants, which saves their scatter.
      valid: False at tokens that are no part of the loss: they cost next to nothing, their terms
        and gradients are 0. None: all are.
      vocabulary_axis: inside `jax.shard_map`, the mesh axis that splits the rows of `unembedding`;
        ids are then those of the shard (outside [0, V) where another shard has them). Maxima and
        sums are combined over it; the gradient of hidden comes out summed.
      token_axes: likewise, the axes that split the tokens: all devices run as many chunks.

    Returns:
      The loss and the terms of all tokens are float32 and carry no gradient of their own.
    """
    transform = Transform(float(temperature), None if soft_cap is None else float(soft_cap))
    dtype = statistics_dtype(hidden, unembedding)
    operand = jnp.promote_types(hidden.dtype, unembedding.dtype)
    tokens = hidden.shape[0]
    size = chunk_tokens(tokens)
    chunks = max(1, -(-tokens // size))
    vocabulary = len(unembedding)
    columns = even_columns(vocabulary, tiles.single_pass_columns(tiles.target(), vocabulary))

    def padded(leaf):
        return jnp.pad(leaf, ((0, chunks * size - tokens), *((0, 0),) * (leaf.ndim - 1)))

    inputs = hidden, ids, rows
    count: Array | int = tokens
    live: Array | int = chunks
    if valid is not None:
        packed = packing(valid)
        inputs, count = jax.tree.map(packed.pack, inputs), packed.valid
        live = -(-count // size)
        if token_axes:
            live = lax.pmax(live, token_axes)
    inputs = jax.tree.map(padded, inputs)

    def chunk_pass(index, d_unembedding):
        """(losses, terms, dhidden) of a chunk of tokens, and the matrix's gradient with theirs."""
        x, at, extra = jax.tree.map(
            lambda leaf: lax.dynamic_slice_in_dim(leaf, index * size, size), inputs
        )
        real = index * size + jnp.arange(size) < count
        x = jnp.where(real[:, None], x, 0)  # a NaN times a zero cotangent would reach the matrix
        (lse, logit_at, entropy), kept = forward_by(
            columns, x, unembedding, at, transform, keep=True
        )
        if vocabulary_axis is not None:
            lse, entropy = combine(lse, entropy, vocabulary_axis)
            logit_at = combine_logits(logit_at, vocabulary_axis)
        terms = TokenTerms(logit_at - lse[:, None], entropy)

        def losses_of(sampled, stored, entropy):
            logp = jnp.concatenate([sampled[:, None], stored], axis=1)
            return jnp.where(real, loss(TokenTerms(logp, entropy), extra), 0.0)

        losses, pull_back = jax.vjp(losses_of, terms.logp[:, 0], terms.logp[:, 1:], terms.entropy)
        g_sampled, g_stored, g_entropy = (
            # Beside a padding row's zero cotangent there may stand an infinite derivative.
            jnp.where(real.reshape(-1, *(1,) * (g.ndim - 1)), g, 0.0)
            for g in pull_back(jnp.ones_like(losses))
        )
        g_all = g_sampled + (jnp.sum(g_stored, axis=1) if stored_gradient else 0.0)

        def products_cotangent(products, start):
            """Of x W^T, for the columns that begin at `start`."""
            z = logits_of(products, transform)
            log_p = jnp.maximum(z - lse[:, None], LEAST_LOG_P)
            dz = -jnp.exp(log_p) * (
                g_all[:, None] + g_entropy[:, None] * (log_p + terms.entropy[:, None])
            )
            local = at - start
            dz += jnp.where(jnp.arange(z.shape[1]) == local[:, :1], g_sampled[:, None], 0.0)
            if stored_gradient and ids.shape[1] > 1:
                slots = jnp.where(_inside(local, z), local, z.shape[1])[:, 1:]
                dz = jax.vmap(lambda row, slot, g: row.at[slot].add(g, mode="drop"))(
                    dz, slots, g_stored
                )
            if transform.soft_cap is not None:
                dz *= 1 - jnp.tanh(products / transform.soft_cap) ** 2
            return dz if transform.temperature == 1.0 else dz / transform.temperature

        def column_block(index, state):
            d_hidden, d_unembedding = state
            chunk = chunk_at(unembedding, index, columns)
            products = lax.dynamic_index_in_dim(kept, index, axis=0, keepdims=False)
            dz = products_cotangent(products, chunk.start)
            if chunk.fresh is not None:
                dz = jnp.where(chunk.fresh, dz, 0)
            dz = dz.astype(operand)
            d_hidden += contract(dz, chunk.rows, 1, 0, dtype)
            more = contract(dz, x, 0, 0, dtype)
            if columns == vocabulary:
                return d_hidden, d_unembedding + more
            before = lax.dynamic_slice_in_dim(d_unembedding, chunk.start, columns)
            return d_hidden, lax.dynamic_update_slice_in_dim(
                d_unembedding, before + more, chunk.start, axis=0
            )

        state = jnp.zeros(x.shape, dtype), d_unembedding
        d_hidden, d_unembedding = over_chunks(column_block, state, vocabulary, columns)
        if vocabulary_axis is not None:
            d_hidden = lax.psum(d_hidden, vocabulary_axis)
        return (jnp.sum(losses), terms, d_hidden.astype(hidden.dtype)), d_unembedding

    def step(index, state):
        total, whole, d_unembedding = state
        (losses, *by_token), d_unembedding = chunk_pass(index, d_unembedding)

        def put(into, part):
            return lax.dynamic_update_slice_in_dim(into, part, index * size, axis=0)

        return total + losses, jax.tree.map(put, whole, tuple(by_token)), d_unembedding

    def nothing(like, dtype):
        return jnp.zeros((chunks * size, *like.shape[1:]), dtype)

    terms = TokenTerms(nothing(ids, dtype), nothing(ids[:, 0], dtype))
    state = (
        jnp.zeros((), dtype),
        (terms, nothing(hidden, hidden.dtype)),
        jnp.zeros(unembedding.shape, dtype),
    )
    if valid is None and chunks == 1:
        state = step(0, state)
    else:
        state = lax.fori_loop(0, live, step, state)
    total, by_token, d_unembedding = state
    by_token = jax.tree.map(lambda leaf: leaf[:tokens], by_token)
    if valid is not None:
        by_token = jax.tree.map(packed.unpack, by_token)
    terms, d_hidden = by_token
    return total, terms, Gradients(d_hidden, d_unembedding)


def _inside(ids: Array, z: Array) -> Array:
    return (ids >= 0) & (ids < z.shape[1])
