"""A matrix as a CPU reads it fastest for few rows: in panels of columns, each in one piece.

Products of few rows wait for the weights, and these come faster where columns that are read
together lie together. On two cores of an AMD EPYC, of 16 MB of weights, 8 rows took 0.7 to 0.8 of
the time of whole matrices by a product a panel, 0.4 to 0.65 by one of all panels; 32 rows 0.85 to
0.95 by a product a panel, and more than 1 by one of all.
"""

from dataclasses import dataclass
from functools import partial
from types import EllipsisType

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

COLUMNS = 64  # of a panel
FEW = 16  # rows, at the most, that one product of all panels is for
LARGEST = 2**18  # numbers of a matrix with a product a panel


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Panels:
    """A matrix [I, O] as panels of `COLUMNS` columns, in one array or each in its own."""

    parts: Float[Array, "P I C"] | tuple[Float[Array, "I _"], ...]

    def __getitem__(self, everything: EllipsisType) -> "Panels":
        return self  # as a parameter is read

    @property
    def columns(self) -> int:
        return sum(part.shape[-1] for part in self.parts)

    def astype(self, dtype: jax.typing.DTypeLike) -> "Panels":
        return jax.tree.map(lambda part: part.astype(dtype), self)


def apart(weight: Float[Array, "I O"]) -> Float[Array, "I O"] | Panels:
    """The matrix as panels in arrays of their own, or itself where they are not several, or many
    to compile."""
    if weight.shape[1] <= COLUMNS or weight.size > LARGEST:
        return weight
    starts = range(0, weight.shape[1], COLUMNS)
    return Panels(tuple(weight[:, start : start + COLUMNS] for start in starts))


def together(weight: Float[Array, "I O"]) -> Float[Array, "I O"] | Panels:
    """The matrix as panels in one array, or itself where they are not several of one width."""
    if weight.shape[1] <= COLUMNS or weight.shape[1] % COLUMNS:
        return weight
    return Panels(jnp.swapaxes(weight.reshape(len(weight), -1, COLUMNS), 0, 1))


def product(
    x: Float[Array, "N I"], panels: Panels, dtype: jax.typing.DTypeLike | None = None
) -> Float[Array, "N O"]:
    """x times the matrix, summed and given in `dtype`; None: in their own."""
    multiply, parts = partial(jnp.matmul, preferred_element_type=dtype), panels.parts
    if isinstance(parts, tuple):
        return jnp.concatenate([multiply(x, part) for part in parts], axis=1)
    if len(x) <= FEW:
        out = multiply(jnp.broadcast_to(x, (len(parts), *x.shape)), parts)
    else:
        out = lax.map(partial(multiply, x), parts)
    return jnp.swapaxes(out, 0, 1).reshape(len(x), -1)
