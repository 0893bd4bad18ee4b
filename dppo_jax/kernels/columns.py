"""The columns of the vocabulary that a device has, and what is found over all of them.

Everything that the sampler computes of a row is a maximum, a sum, or the k largest over the
vocabulary. Here are those three, for a device that has all columns and for one whose neighbours
along a mesh axis have the others: numbers a row cross the axis, k candidates a device, never a
row of logits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dppo_jax.kernels import tiles

# On a CPU the top 20 of 64 rows of 4,096 columns take 0.5 ms by groups of 32 columns and 1.1 at
# once, of 151,936 columns 7 and 21; by groups of 16 or 64 about as long as of 32. At once is no
# slower where a row has fewer than 64 to 128 columns for each that is looked for.
GROUP = 32
LONG = 128  # columns of a row, for each that is looked for


class Columns(NamedTuple):
    """Columns [start, start + C) of a vocabulary, those of the arrays [B, C] of this device."""

    vocabulary: int
    start: int | Int[Array, ""] = 0
    axis: str | None = None  # of the mesh, along which the other columns lie; None: there are none
    mesh: tuple[str, ...] = ()  # all its axes

    def sum(self, x: Array) -> Array:
        return x if self.axis is None else lax.psum(x, self.axis)

    def max(self, x: Array) -> Array:
        return x if self.axis is None else lax.pmax(x, self.axis)

    def any(self, flags: Bool[Array, " B"]) -> Bool[Array, ""]:
        """Whether it holds in any row of any device: all of them must take the same branch."""
        here = jnp.any(flags)
        return lax.pmax(here.astype(jnp.int32), self.mesh) > 0 if self.mesh else here

    def place(self, ids: Int[Array, "B J"], size: int) -> Int[Array, "B J"]:
        """Where ids lie among the `size` columns here; `size` for those that do not."""
        at = ids - self.start
        return jnp.where((at >= 0) & (at < size), at, size)

    def value_at(self, x: Float[Array, "B C"], ids: Int[Array, " B"]) -> Float[Array, " B"]:
        """x of one column a row."""
        at = self.place(ids[:, None], x.shape[1])
        return self.sum(
            x.at[jnp.arange(len(x))[:, None], at].get(mode="fill", fill_value=0.0)[:, 0]
        )

    def log_sum_exp(self, z: Float[Array, "B C"]) -> Float[Array, " B"]:
        largest = self.max(jnp.max(z, axis=1))
        return largest + jnp.log(self.sum(jnp.exp(z - largest[:, None]).sum(axis=1)))

    def log_softmax(self, z: Float[Array, "B C"]) -> Float[Array, "B C"]:
        """As jax.nn's: z - max first, which keeps the digits of the logarithm."""
        z = z - self.max(jnp.max(z, axis=1))[:, None]
        return z - jnp.log(self.sum(jnp.exp(z).sum(axis=1)))[:, None]

    def top(self, x: Float[Array, "B C"], k: int) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
        """The k largest and their ids, largest first; of equals the first."""
        values, ids = top_k(x, min(k, x.shape[1]))
        ids = ids + self.start
        if self.axis is None or not k:
            return values, ids
        values, ids = (
            lax.all_gather(leaf, self.axis, axis=1, tiled=True) for leaf in (values, ids)
        )
        values, at = lax.top_k(values, k)  # equal values lie in the order of their ids
        return values, jnp.take_along_axis(ids, at, axis=1)

    def window(
        self, p: Float[Array, "B C"], begins: Int[Array, " B"], size: int
    ) -> Float[Array, "B size"]:
        """Columns [begins, begins + size) of each row, 0 for those that other devices have."""
        if self.axis is None and size == p.shape[1]:
            return p
        if self.axis is not None:
            p = jnp.pad(p, ((0, 0), (size, size)))
            # lax counts negative places from the end; a window before all of them is padding
            begins = jnp.maximum(begins - self.start + size, 0)
        return jax.vmap(lambda row, first: lax.dynamic_slice(row, (first,), (size,)))(p, begins)

    def sums_of(self, p: Float[Array, "B C"], size: int) -> Float[Array, "B G"]:
        """Σ p over columns [0, size), [size, 2 size), ... of the vocabulary."""
        groups = -(-self.vocabulary // size)
        if self.axis is None:
            whole = jnp.pad(p, ((0, 0), (0, groups * size - p.shape[1])))
            return whole.reshape(len(p), groups, size).sum(axis=2)
        touched = -(-p.shape[1] // size) + 1  # groups that these columns may be of
        room = jnp.zeros((len(p), touched * size), p.dtype)
        room = lax.dynamic_update_slice(room, p, (0, self.start % size))
        here = room.reshape(len(p), touched, size).sum(axis=2)
        sums = jnp.zeros((len(p), groups + touched), p.dtype)
        sums = lax.dynamic_update_slice(sums, here, (0, self.start // size))
        return self.sum(sums)[:, :groups]


def top_k(x: Float[Array, "B C"], k: int) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """lax.top_k, on a CPU by groups where a row is long."""
    if 0 < LONG * k <= x.shape[1] and tiles.target().platform == "cpu":
        return top_k_by_groups(x, k)
    values, ids = lax.top_k(x, k)
    return values, ids


def top_k_by_groups(
    x: Float[Array, "B C"], k: int, size: int = GROUP
) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """lax.top_k among the columns of the k groups of `size` whose maxima are the largest.

    The same to the bit, ties too: each of k groups that come before a column's own, by their
    maxima and then by their place, holds a column that comes before it. C must be k * size or more.
    """
    rows, columns = x.shape
    padded = jnp.pad(x, ((0, 0), (0, -columns % size)), constant_values=-jnp.inf)
    groups = padded.reshape(rows, -1, size)
    _, best = lax.top_k(jnp.max(groups, axis=2), k)
    best = jnp.sort(best, axis=1)  # so that equal values lie in the order of their ids
    found = jnp.take_along_axis(groups, best[:, :, None], axis=1).reshape(rows, -1)
    values, at = lax.top_k(found, k)
    return values, jnp.take_along_axis(best, at // size, axis=1) * size + at % size
