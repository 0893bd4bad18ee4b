"""The head: the public op and the choice of the body that computes it."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from dppo_jax.kernels.reference import reference
from dppo_jax.kernels.xla import Transform, xla


class HeadOutput(NamedTuple):
    """Statistics of softmax(z) a token, float32; log p(id) = logit_at - lse[:, None]."""

    lse: Float[Array, " N"]  # log sum_v e^(z_v)
    logit_at: Float[Array, "N J"]  # z at `ids`; NaN where the id is outside [0, V)
    entropy: Float[Array, " N"]  # nats


# (lse [N], sampled logit [N], stored logits [N,J-1], entropy [N])
_Parts = tuple[Array, Array, Array, Array]


def _reference(hidden: Array, unembedding: Array, ids: Array, transform: Transform) -> _Parts:
    lse, logit_at, entropy = reference(hidden, unembedding, ids, *transform)
    return lse, logit_at[:, 0], logit_at[:, 1:], entropy


_BODIES: dict[str, Callable[[Array, Array, Array, Transform], _Parts]] = {
    "xla": xla,
    "reference": _reference,
}


def head(
    hidden: Float[Array, "N D"],
    unembedding: Float[Array, "V D"],
    ids: Integer[Array, "N J"],
    *,
    temperature: float = 1.0,
    soft_cap: float | None = None,
    stored_gradient: bool = True,
    body: str | None = None,
) -> HeadOutput:
    """Log-sum-exp, chosen logits and entropy of z = soft_cap * tanh(x.w / soft_cap) / temperature.

    lse = log sum_v e^(z_v); logit_at_j = z[ids_j]; entropy = lse - sum_v p_v z_v, p = e^(z - lse).
    No array of N x V exists in the compiled program, forward or backward, unless the vocabulary
    fits in one chunk (`xla.chunk_columns`). The gradient is exact for all three outputs, and an
    output or an input without a cotangent costs nothing. Sources: running sums of TRL's
    `_ChunkedLogProbFunction` and verl's `linear_cross_entropy`; gradient in `xla`.

    Args:
      hidden: bfloat16 or float32 (float64 in tests).
      unembedding: likewise; rows are tokens.
      ids: any integer type. Column 0 is the sampled token, the others the stored top-K, in any
        order, with repeats allowed. An id outside [0, V) gives NaN, and adds nothing to a gradient.
      temperature: above 0; known when tracing.
      soft_cap: above 0, or None for no cap; known when tracing.
      stored_gradient: False makes logit_at[:, 1:] constants, for callers that use them under
        stop_gradient only: slicing logit_at hides from JAX that their cotangent is zero.
      body: a name in the table of bodies, or None to choose for the default backend.

    Returns:
      `HeadOutput`, float32 whatever the inputs (float64 from float64), sums in the same precision.

    Raises:
      ValueError: wrong ranks, sizes that disagree or are zero, an unknown body, temperature or
        soft_cap not above 0. TypeError: dtypes. Both when tracing, with the shapes.
    """
    _check(hidden, unembedding, ids)
    for name, value in (("temperature", temperature), ("soft_cap", soft_cap)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a finite number above 0; got {value}")
    # One body today serves every backend; a choice by backend goes here.
    name = "xla" if body is None else body
    if name not in _BODIES:
        raise ValueError(f"unknown head body {name!r}; known: {', '.join(sorted(_BODIES))}")
    transform = Transform(float(temperature), None if soft_cap is None else float(soft_cap))

    # int32 indices without wrapping: what does not fit is outside [0, V), which becomes -1.
    wide = ids if ids.dtype.itemsize >= 4 else ids.astype(jnp.int32)
    inside = (wide >= 0) & (wide < unembedding.shape[0])
    index = jnp.where(inside, wide.astype(jnp.int32), -1)

    lse, sampled, stored, entropy = _BODIES[name](hidden, unembedding, index, transform)
    if not stored_gradient:
        stored = jax.lax.stop_gradient(stored)
    return HeadOutput(lse, jnp.concatenate([sampled[:, None], stored], axis=1), entropy)


def _check(hidden: Array, unembedding: Array, ids: Array) -> None:
    shapes = f"hidden {hidden.shape}, unembedding {unembedding.shape}, ids {ids.shape}"
    if not hidden.ndim == unembedding.ndim == ids.ndim == 2:
        raise ValueError(f"head wants hidden [N,D], unembedding [V,D], ids [N,J]; got {shapes}")
    if hidden.shape[1] != unembedding.shape[1]:
        raise ValueError(f"head: the widths D of hidden and unembedding differ: {shapes}")
    if hidden.shape[0] != ids.shape[0]:
        raise ValueError(f"head: the token counts N of hidden and ids differ: {shapes}")
    if unembedding.shape[0] == 0 or ids.shape[1] == 0:
        raise ValueError(f"head wants V and J of at least 1: {shapes}")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"head wants integer ids; got {ids.dtype} ({shapes})")
    allowed = (jnp.bfloat16, jnp.float32, jnp.float64)
    for name, array in (("hidden", hidden), ("unembedding", unembedding)):
        if array.dtype not in allowed:
            raise TypeError(f"head wants {name} in bfloat16 or float32; got {array.dtype}")
