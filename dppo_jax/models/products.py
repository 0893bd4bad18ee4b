"""x @ w, on a CPU with weights and gradients laid out as XLA multiplies fast."""

from dataclasses import dataclass
from types import EllipsisType

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dppo_jax.kernels import tiles

PANEL = 64  # columns


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Panels:
    """A matrix [I, O] in a CPU's memory as several of `PANEL` columns.

    Products of few rows wait for the weights, and these come faster where columns that are read
    together lie together. On an AMD EPYC, with 16 MB of weights, 8 rows took half the time that
    they took by a matrix of 1024 columns, 32 rows 0.8 of it, 64 rows all of it.
    """

    parts: tuple[Float[Array, "I _"], ...]

    def __getitem__(self, everything: EllipsisType) -> "Panels":
        return self  # as a parameter is read

    def astype(self, dtype: jax.typing.DTypeLike) -> "Panels":
        return Panels(tuple(part.astype(dtype) for part in self.parts))


def in_panels(weight: Float[Array, "I O"]) -> Panels:
    starts = range(0, weight.shape[1], PANEL)
    return Panels(tuple(weight[:, start : start + PANEL] for start in starts))


def product(x: Float[Array, "N I"], weight: Float[Array, "I O"] | Panels) -> Float[Array, "N O"]:
    """x @ weight, differentiable in both."""
    if isinstance(weight, Panels):
        return jnp.concatenate([x @ part for part in weight.parts], axis=1)
    narrows = weight.shape[0] > weight.shape[1]
    return _narrowing(x, weight) if narrows and tiles.target().platform == "cpu" else x @ weight


@jax.custom_vjp
def _narrowing(x, weight):
    return x @ weight


def _forward(x, weight):
    return x @ weight, (x, weight)


def _backward(saved, d_out):
    """The gradient of the weight, xᵀ·dy, as (dyᵀ·x)ᵀ: 0.7 of the time where I > O.

    The barrier keeps XLA from turning it back.
    """
    x, weight = saved
    return d_out @ weight.T, lax.optimization_barrier(d_out.T @ x).T


_narrowing.defvjp(_forward, _backward)
