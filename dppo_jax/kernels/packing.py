"""Valid tokens first, so that the head computes them and nothing else (`head(..., count=)`)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


class Packing(NamedTuple):
    """An order of N rows with the valid ones first, in the order they had."""

    order: Int[Array, " N"]  # the row that stands at each place
    valid: Int[Array, ""]  # how many rows are; the `count` of the head

    def pack(self, rows: Shaped[Array, "N ..."]) -> Shaped[Array, "N ..."]:
        """The rows in packed order."""
        return rows[self.order]

    def unpack(self, packed: Shaped[Array, "N ..."]) -> Shaped[Array, "N ..."]:
        """Packed rows where they came from; zeros at the invalid ones."""
        used = (jnp.arange(len(packed)) < self.valid).reshape(-1, *(1,) * (packed.ndim - 1))
        home = (
            jnp.zeros_like(self.order)
            .at[self.order]
            .set(jnp.arange(len(packed), dtype=self.order.dtype), unique_indices=True)
        )
        return jnp.where(used, packed, 0)[home]


def packing(mask: Bool[Array, " N"]) -> Packing:
    """The packing of the rows whose mask is True.

    Under jit the shapes stay [N, ...]: what the invalid rows would cost is saved in time, by blocks
    of the body's rows, not in memory.
    """
    order = jnp.argsort(~mask, stable=True)
    return Packing(order.astype(jnp.int32), jnp.sum(mask, dtype=jnp.int32))
