"""What most stacks do where the head is used here: the forms that it is compared with."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dppo_jax.kernels.single_pass import TokenTerms

CHUNK_TOKENS = 512  # of `chunked`


def naive(
    hidden: Float[Array, "N D"], unembedding: Float[Array, "V D"], ids: Int[Array, "N J"]
) -> TokenTerms:
    """Terms from all N x V logits in float32, differentiated by JAX."""
    z = jnp.dot(hidden, unembedding.T, preferred_element_type=jnp.float32)
    log_p = jax.nn.log_softmax(z, axis=-1)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return TokenTerms(jnp.take_along_axis(log_p, ids, axis=-1), entropy)


def chunk_size(tokens: int) -> int:
    """Tokens of a chunk of `chunked`: the largest divisor up to CHUNK_TOKENS."""
    return max(d for d in range(1, min(CHUNK_TOKENS, tokens) + 1) if tokens % d == 0)


def chunked(
    hidden: Float[Array, "N D"], unembedding: Float[Array, "V D"], ids: Int[Array, "N J"]
) -> TokenTerms:
    """`naive` over chunks of tokens, each computed again in the backward pass."""
    tokens = len(hidden)
    size = chunk_size(tokens)

    @jax.checkpoint
    def one(chunk):
        return naive(chunk[0], unembedding, chunk[1])

    parts = [leaf.reshape(-1, size, leaf.shape[-1]) for leaf in (hidden, ids)]
    terms = jax.lax.map(one, tuple(parts))
    return TokenTerms(terms.logp.reshape(tokens, -1), terms.entropy.reshape(-1))
