"""The head in its plainest form, for tests: all N x V logits, differentiated by JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def reference(
    hidden: Float[Array, "N D"],
    unembedding: Float[Array, "V D"],
    ids: Int[Array, "N J"],
    temperature: float,
    soft_cap: float | None,
) -> tuple[Float[Array, " N"], Float[Array, "N J"], Float[Array, " N"]]:
    """(lse, logit_at, entropy) of z = soft_cap * tanh(x.w / soft_cap) / temperature.

    Computed in float32, or in float64 where the inputs are. An id outside [0, V) gives NaN.
    Probability 0 adds 0 to the entropy.
    """
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    z = jnp.matmul(hidden.astype(dtype), unembedding.astype(dtype).T, precision="highest")
    if soft_cap is not None:
        z = soft_cap * jnp.tanh(z / soft_cap)
    z = z / temperature
    log_p = jax.nn.log_softmax(z, axis=1)
    p = jnp.exp(log_p)
    entropy = -jnp.sum(p * jnp.where(p > 0, log_p, 0), axis=1)
    inside = (ids >= 0) & (ids < z.shape[1])
    logit_at = jnp.take_along_axis(z, jnp.where(inside, ids, 0), axis=1)
    return jax.nn.logsumexp(z, axis=1), jnp.where(inside, logit_at, jnp.nan), entropy
