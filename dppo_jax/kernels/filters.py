"""Sampling filters, each a threshold on the logits: top-k, top-p (nucleus) and min-p.

The kept set of a row is {v : z_v >= threshold}. Nothing is sorted: the threshold is found by
bisection over the 32 bits of a float, one masked sum over the row a bit, which vectorises on every
backend where a sort of the vocabulary does not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dppo_jax.kernels.columns import Columns


@dataclass(frozen=True)
class Filters:
    """Which tokens may be sampled. The defaults keep all.

    top_k: the k most likely; 0 is off, and so is a k of the vocabulary or more.
    top_p: of those, renormalised, the fewest most likely whose mass reaches p
      (arXiv 1904.09751); 1 is off.
    min_p: of those, the ones with at least min_p times the most likely token's probability
      (arXiv 2407.01082); 0 is off.

    In this order, that of Hugging Face's generate and of vLLM before its version 1, which puts
    min-p first: that differs where top_p is on as well, and then keeps fewer tokens.
    Tokens that tie with the last one kept are kept: the set is a function of the probabilities
    alone. Hugging Face and vLLM do the same for top-k, and cut ties in sorting order for top-p.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative (0: keep all)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1 (1: keep all)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be within 0..1 (0: keep all)")

    @property
    def on(self) -> bool:
        """Whether anything can be dropped."""
        return self != Filters()


class RowFilters(NamedTuple):
    """`Filters` of each row; out of their ranges they mean nothing, and nothing checks that."""

    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]

    @property
    def on(self) -> Bool[Array, " B"]:
        return (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)


def threshold(
    logits: Float[Array, "B C"],
    filters: Filters | RowFilters,
    beyond: Float[Array, " B"] | float = 0.0,
    columns: Columns | None = None,
) -> Float[Array, " B"]:
    """The least logit that `filters` keep in each row; -inf where they keep all.

    `columns` are those of `logits`, None all: where other devices have some, each step of a
    bisection sums a number a row over them, and the threshold is as exact as on one.

    `logits` are those that are sampled from, temperature applied, in float32. Masses are float32
    sums: a token whose inclusion depends on the seventh digit of a mass may fall on either side.
    Of `RowFilters`, a kind that no row has on costs nothing. Where `logits` are only the largest of
    the vocabulary, `beyond` is what the others add to Σ e^(z - max z) without top-k.
    """
    columns = columns or Columns(logits.shape[1])
    largest = columns.max(jnp.max(logits, axis=1))
    top_k, top_p, min_p = filters.top_k, filters.top_p, filters.min_p

    def least_of_k() -> Array:
        def at_least(t):
            return columns.sum(jnp.sum(logits >= t[:, None], axis=1, dtype=jnp.int32))

        return _highest(lambda t: at_least(t) >= top_k, largest)

    fewer = (top_k > 0) & (top_k < columns.vocabulary)
    least = _where_on(fewer, least_of_k, largest, columns)

    def nucleus() -> Array:
        mass = jnp.exp(logits - largest[:, None])
        mass = jnp.where(logits >= least[:, None], mass, 0.0)

        def within(t):
            return columns.sum(jnp.sum(jnp.where(logits >= t[:, None], mass, 0.0), axis=1))

        everything = columns.sum(jnp.sum(mass, axis=1))
        enough = top_p * (everything + jnp.where(top_k > 0, 0.0, beyond))
        return _highest(lambda t: within(t) >= enough, largest)

    least = jnp.maximum(least, _where_on(top_p < 1, nucleus, largest, columns))
    return jnp.maximum(least, largest + jnp.log(jnp.float32(min_p)))


def capped(logits: Float[Array, "B C"], k: int, columns: Columns) -> Float[Array, "B C"]:
    """-inf but at the k largest of each row; of equals, the first are among them."""
    largest, ids = columns.top(logits, k)
    at = columns.place(ids, logits.shape[1])
    nothing = jnp.full_like(logits, -jnp.inf)
    return nothing.at[jnp.arange(len(logits))[:, None], at].set(largest, mode="drop")


def _where_on(
    on: bool | Bool[Array, " B"],
    compute: Callable[[], Array],
    like: Float[Array, " B"],
    columns: Columns,
) -> Float[Array, " B"]:
    """compute() in the rows that are on, -inf in the others; not computed where none is."""
    off = jnp.full_like(like, -jnp.inf)
    if not isinstance(on, Array):
        return compute() if on else off
    return lax.cond(columns.any(on), lambda: jnp.where(on, compute(), off), lambda: off)


def _highest(
    enough: Callable[[Float[Array, " B"]], Array], largest: Float[Array, " B"]
) -> Float[Array, " B"]:
    """The highest float t <= largest with enough(t), a row at a time; -inf where none has it.

    `enough` must hold below every t where it holds.
    """
    low = jnp.full(largest.shape, _order(jnp.float32(-jnp.inf)))

    def halve(_, bounds):
        low, high = bounds  # enough(low), and not enough(high)
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, rounded down, without overflow
        holds = enough(_float(middle))
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    low, _ = lax.fori_loop(0, 32, halve, (low, _order(largest) + 1))
    return _float(low)


def _order(x: Float[Array, "*N"]) -> Array:
    """An int32 for each float32, in the same order."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _float(order: Array) -> Array:
    bits = jnp.where(order < 0, order ^ jnp.int32(0x7FFFFFFF), order)
    return lax.bitcast_convert_type(bits, jnp.float32)
