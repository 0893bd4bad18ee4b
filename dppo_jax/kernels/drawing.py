"""Logits to the next token and what is recorded of the distribution that it is drawn from."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dppo_jax.kernels.columns import Columns
from dppo_jax.kernels.filters import Filters, RowFilters, capped, threshold
from dppo_jax.kernels.xla import even_columns

# Of a group: with a batch of 256 its logits take 8 MiB, and reading its rows of W takes tens of
# microseconds, long beside the fixed cost of a step.
COLUMNS = 8192


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


class Numbers(NamedTuple):
    """Uniform numbers in [0, 1), one of each a row: what a token is drawn with."""

    group: Float[Array, " B"]
    block: Float[Array, " B"]
    column: Float[Array, " B"]


def numbers(key: Array, batch: int) -> Numbers:
    """Of one key for all rows, or of a key a row."""

    def of(key, shape):
        return jax.random.uniform(jax.random.fold_in(key, 0), shape), jax.random.uniform(
            key, (2, *shape)
        )

    if key.ndim:
        group, within = jax.vmap(lambda own: of(own, ()))(key)
        return Numbers(group, *within.T)
    group, within = of(key, (batch,))
    return Numbers(group, *within)


def group_columns(vocabulary: int) -> int:
    """Columns of a group; the last one of a vocabulary that is no multiple starts early."""
    return even_columns(vocabulary, COLUMNS)


def pick(weights: Float[Array, "B N"], u: Float[Array, " B"]) -> Int[Array, " B"]:
    """The first index whose cumulative weight exceeds u of the total."""
    cumulative = jnp.cumsum(weights, axis=-1)
    target = u[:, None] * cumulative[:, -1:]
    # u < 1, yet u * total can round up to the total.
    below_total = jnp.minimum(target, jnp.nextafter(cumulative[:, -1:], 0.0))
    return jnp.sum(cumulative <= below_total, axis=-1, dtype=jnp.int32)


def block_width(size: int) -> int:
    """Columns of a block of a group."""
    return max(1, int(size**0.5))


def within_group(
    p: Float[Array, "B size"], numbers: Numbers, columns: Columns | None = None
) -> Int[Array, " B"]:
    """An index with probability p / sum(p): a block of about √size indices, then one in it.

    `columns`: where its devices have a part of p each, and 0 for the rest.
    """
    add = columns.sum if columns else lambda x: x
    batch, size = p.shape
    width = block_width(size)
    blocks = jnp.pad(p, ((0, 0), (0, -size % width))).reshape(batch, -1, width)
    block = pick(add(jnp.sum(blocks, axis=-1)), numbers.block)
    inside = add(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0])
    return block * width + pick(inside, numbers.column)


def inverse_cdf(
    p: Float[Array, "B C"], numbers: Numbers, columns: Columns | None = None
) -> Int[Array, " B"]:
    """Draws a column with probability p / sum(p); one of probability 0 never.

    First a group of at most COLUMNS columns (the chunk of `streamed_sampler`), then a block of it,
    then a column, each with its own uniform number: three random numbers a row instead of V, and a
    resolution of 2⁻⁴⁶ or more where one would give 2⁻²³. Groups and blocks depend on V alone, so
    that a row's numbers give the same token whatever form draws it and however many devices the
    columns lie on, but for what a float32 sum rounds.
    """
    columns = columns or Columns(p.shape[1])
    size = group_columns(columns.vocabulary)
    if size == columns.vocabulary:  # one group
        begins = jnp.zeros((len(p),), jnp.int32)
        return within_group(columns.window(p, begins, size), numbers, columns)
    first = size * pick(columns.sums_of(p, size), numbers.group)
    begins = jnp.minimum(first, columns.vocabulary - size)
    window = columns.window(p, begins, size)
    new = begins[:, None] + jnp.arange(size) >= first[:, None]
    return begins + within_group(jnp.where(new, window, 0.0), numbers, columns)


def place_in_list(
    p: Float[Array, "B N"], column: Int[Array, "B N"], numbers: Numbers, vocabulary: int
) -> Int[Array, " B"]:
    """`inverse_cdf` of rows that are 0 but in the columns listed, in rising order: the place."""
    size = group_columns(vocabulary)
    group = column // size
    block = (column - jnp.minimum(group * size, vocabulary - size)) // block_width(size)
    at = pick(p, numbers.group)
    for part, u in ((group, numbers.block), (block, numbers.column)):
        chosen = jnp.take_along_axis(part, at[:, None], axis=1)
        p = jnp.where(part == chosen, p, 0.0)
        at = pick(p, u)
    return at


def draw(
    logits: Float[Array, "B C"],
    numbers: Numbers,
    temperature: float | Float[Array, " B"],
    top_k_capture: int,
    filters: Filters | RowFilters = Filters(),  # noqa: B008  frozen
    *,
    replay: bool = False,
    columns: Columns | None = None,
) -> Drawn:
    """Samples from softmax(logits / temperature) within `filters`, and records that distribution.

    What is recorded is the distribution sampled from: zero outside the filters' kept set and
    renormalised (vLLM's `processed_logprobs`). Temperature 0 takes the most likely token, the first
    of equals, and records temperature 1. Temperature and filters are one for all rows, or one a
    row. `columns` are those of `logits`, None all.

    With `replay`, rows with a filter on keep at most the `top_k_capture` most likely tokens: what
    they were drawn from is then all recorded, and can be scored again (`scoring.renormalised`).
    """
    columns = columns or Columns(logits.shape[1])
    asked = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), len(logits))
    greedy = asked == 0
    logits = logits.astype(jnp.float32)
    # The difference first: 0 at the largest whatever the temperature, where that of two quotients,
    # fused, may be far below 0 everywhere.
    below = logits - columns.max(jnp.max(logits, axis=1))[:, None]
    below = below / jnp.where(greedy, 1.0, asked)[:, None]
    if isinstance(filters, RowFilters) or filters.on:
        least = threshold(below, filters, columns=columns)
        below = jnp.where(below >= least[:, None], below, -jnp.inf)
        if replay:
            truncated = jnp.broadcast_to(filters.on, len(below))
            below = jnp.where(truncated[:, None], capped(below, top_k_capture, columns), below)
    e = jnp.exp(below)
    total = columns.sum(jnp.sum(e, axis=1))
    log_total = jnp.log(total)

    def most_likely() -> Int[Array, " B"]:
        # Not where `below` is 0: a compiler that fuses the difference may leave it nowhere so. Nor
        # the first of the top K, whose reading beside them makes XLA sort whole rows on a CPU.
        return columns.top(below, 1)[1][:, 0]

    if isinstance(temperature, int | float):
        token = inverse_cdf(e, numbers, columns) if temperature else most_likely()
    else:
        drawn = inverse_cdf(e, numbers, columns)
        token = lax.cond(
            columns.any(greedy), lambda: jnp.where(greedy, most_likely(), drawn), lambda: drawn
        )
    logp = columns.value_at(below, token) - log_total
    topk, topk_ids = columns.top(below, top_k_capture)
    spread = columns.sum(jnp.sum(jnp.where(e > 0, e * below, 0.0), axis=1))
    out = Drawn(token, logp, topk_ids, topk - log_total[:, None], log_total - spread / total)
    if not replay:
        return out
    kept = jnp.sum(out.topk_logp > -jnp.inf, axis=1, dtype=jnp.int32)
    return out._replace(kept_count=jnp.where(filters.on, kept, 0))
