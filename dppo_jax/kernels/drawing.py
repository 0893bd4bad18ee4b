"""Logits to the next token and what is recorded of the distribution that it is drawn from."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dppo_jax.kernels.filters import Filters, RowFilters, capped, threshold


class Drawn(NamedTuple):
    """What one decoding step records of the distribution that it sampled from."""

    token: Int[Array, " B"]
    logp: Float[Array, " B"]
    topk_ids: Int[Array, "B K"]  # most likely first
    topk_logp: Float[Array, "B K"]  # -inf where fewer than K tokens may be sampled
    entropy: Float[Array, " B"]  # nats
    raw_logp: Float[Array, " B"] | None = None  # of the token; see `rows.draw_rows`
    # With replay: of topk_ids, how many could be drawn; 0 where no filter was on.
    kept_count: Int[Array, " B"] | None = None


def uniforms(key: Array, batch: int) -> Float[Array, "2 B"]:
    """Two uniform numbers a row, of one key for all or of a key a row."""
    if key.ndim:
        return jax.vmap(lambda own: jax.random.uniform(own, (2,)), out_axes=1)(key)
    return jax.random.uniform(key, (2, batch))


def inverse_cdf(p: Float[Array, "B V"], key: Array) -> Int[Array, " B"]:
    """Draws an index a row with probability p / sum(p); an index of probability 0 never.

    First a block of about √V indices, then an index in it, each with its own uniform number: two
    random numbers a row instead of V, and a resolution of 2⁻⁴⁶ where one would give 2⁻²³. `key` is
    one for all rows or one a row.
    """
    batch, vocab = p.shape
    width = max(1, int(vocab**0.5))
    blocks = jnp.pad(p, ((0, 0), (0, -vocab % width))).reshape(batch, -1, width)
    uniform = uniforms(key, batch)

    def pick(weights, u):  # the first index whose cumulative weight exceeds u of the total
        cumulative = jnp.cumsum(weights, axis=-1)
        target = u[:, None] * cumulative[:, -1:]
        # u < 1, yet u * total can round up to the total.
        below_total = jnp.minimum(target, jnp.nextafter(cumulative[:, -1:], 0.0))
        return jnp.sum(cumulative <= below_total, axis=-1)

    block = pick(jnp.sum(blocks, axis=-1), uniform[0])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * width + pick(inside, uniform[1])).astype(jnp.int32)


def draw(
    logits: Float[Array, "B V"],
    key: Array,
    temperature: float | Float[Array, " B"],
    top_k_capture: int,
    filters: Filters | RowFilters = Filters(),  # noqa: B008  frozen
    *,
    replay: bool = False,
) -> Drawn:
    """Samples from softmax(logits / temperature) within `filters`, and records that distribution.

    What is recorded is the distribution sampled from: zero outside the filters' kept set and
    renormalised (vLLM's `processed_logprobs`). Temperature 0 takes the most likely token, the first
    of equals, and records temperature 1. Key, temperature and filters are one for all rows, or one
    a row.

    With `replay`, rows with a filter on keep at most the `top_k_capture` most likely tokens: what
    they were drawn from is then all recorded, and can be scored again (`scoring.renormalised`).
    """
    by_row = isinstance(temperature, Array)
    divisor = (
        jnp.where(temperature == 0, 1.0, temperature)[:, None] if by_row else temperature or 1.0
    )
    z = logits.astype(jnp.float32) / divisor
    if isinstance(filters, RowFilters) or filters.on:
        z = jnp.where(z >= threshold(z, filters)[:, None], z, -jnp.inf)
        if replay:
            truncated = jnp.broadcast_to(filters.on, len(z))
            z = jnp.where(truncated[:, None], capped(z, top_k_capture), z)
    logp = jax.nn.log_softmax(z, axis=-1)
    p = jnp.exp(logp)
    if by_row:
        token = jnp.where(temperature == 0, _most_likely(logp), inverse_cdf(p, key))
    else:
        token = inverse_cdf(p, key) if temperature else _most_likely(logp)
    logp_token = jnp.take_along_axis(logp, token[:, None], axis=-1)[:, 0]
    topk_logp, topk_ids = jax.lax.top_k(logp, top_k_capture)
    entropy = -jnp.sum(jnp.where(p > 0, p * logp, 0.0), axis=-1)
    drawn = Drawn(token, logp_token, topk_ids, topk_logp, entropy)
    if not replay:
        return drawn
    kept = jnp.sum(topk_logp > -jnp.inf, axis=1, dtype=jnp.int32)
    return drawn._replace(kept_count=jnp.where(filters.on, kept, 0))


def _most_likely(logp: Float[Array, "B V"]) -> Int[Array, " B"]:
    return jnp.argmax(logp, axis=-1).astype(jnp.int32)
