"""Statistics of a distribution from those of its parts, which devices along a mesh axis have."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def combine(
    lse: Float[Array, " N"], entropy: Float[Array, " N"], axis: str
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """(lse, entropy) of a distribution from those of its parts on the devices along `axis`.

    A part with log-sum-exp l and entropy h within it has sum e^(z-l) = 1 and
    sum (z-l) e^(z-l) = -h, so that with m = max l over parts, s = sum e^(l-m) and
    t = sum e^(l-m) (l - m - h): lse = m + log s, entropy = log s - t/s.
    """
    m = jnp.maximum(lax.pmax(lse, axis), jnp.finfo(lse.dtype).min)
    weight = jnp.exp(lse - m)
    # A part of nothing but -inf weighs 0 whatever its entropy is.
    within = jnp.where(weight > 0, weight * (lse - m - entropy), 0.0)
    s, t = lax.psum((weight, within), axis)
    log_s = jnp.log(s)
    return m + log_s, log_s - t / s


def combine_logits(logit_at: Float[Array, "N J"], axis: str) -> Float[Array, "N J"]:
    """Logits of which one device along `axis` has each and the others NaN; NaN where none has."""
    here = ~jnp.isnan(logit_at)
    found, shards = lax.psum((jnp.where(here, logit_at, 0.0), here.astype(logit_at.dtype)), axis)
    return jnp.where(shards > 0, found, jnp.nan)
