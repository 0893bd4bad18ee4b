"""x @ w, and on a CPU its weight's gradient in the order that XLA multiplies fast."""

import jax
from jax import lax
from jaxtyping import Array, Float

from dppo_jax.kernels import tiles


def product(x: Float[Array, "N I"], weight: Float[Array, "I O"]) -> Float[Array, "N O"]:
    """x @ weight, differentiable in both."""
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
