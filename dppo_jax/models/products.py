"""x @ w, on a CPU with weights and gradients laid out as XLA multiplies fast."""

import jax
from jax import lax
from jaxtyping import Array, Float

from dppo_jax.kernels import panels, tiles
from dppo_jax.kernels.panels import Panels


def product(x: Float[Array, "N I"], weight: Float[Array, "I O"] | Panels) -> Float[Array, "N O"]:
    """x @ weight, differentiable in both but for panels."""
    if isinstance(weight, Panels):
        return panels.product(x, weight)
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
