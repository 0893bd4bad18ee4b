"""The head: the public op and the choice of the body that computes it."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from dppo_jax.kernels import tiles, tpu
from dppo_jax.kernels.reference import reference
from dppo_jax.kernels.sharded import Layout, sharded_head, sharded_loss_and_grad
from dppo_jax.kernels.single_pass import RowLoss, TokenTerms, fused_loss_and_grad
from dppo_jax.kernels.xla import Transform, forward, xla


class HeadOutput(NamedTuple):
    """Statistics of softmax(z) a token, float32; log p(id) = logit_at - lse[:, None]."""

    lse: Float[Array, " N"]  # log sum_v e^(z_v)
    logit_at: Float[Array, "N J"]  # z at `ids`; NaN where the id is outside [0, V)
    entropy: Float[Array, " N"]  # nats


# (lse [N], sampled logit [N], stored logits [N,J-1], entropy [N])
_Parts = tuple[Array, Array, Array, Array]


class _Body(NamedTuple):
    differentiable: Callable[[Array, Array, Array, Array | None, Transform], _Parts]
    statistics: Callable[[Array, Array, Array, Transform], tuple[Array, Array, Array]]


def _reference_statistics(hidden, unembedding, ids, transform) -> tuple[Array, Array, Array]:
    return reference(hidden, unembedding, ids, *transform)


def _reference(hidden, unembedding, ids, count, transform) -> _Parts:
    lse, logit_at, entropy = reference(hidden, unembedding, ids, *transform)
    return lse, logit_at[:, 0], logit_at[:, 1:], entropy


def _xla_statistics(hidden, unembedding, ids, transform) -> tuple[Array, Array, Array]:
    return forward(hidden, unembedding, ids, transform)[0]


_BODIES = {
    "xla": _Body(xla, _xla_statistics),
    "pallas_tpu": _Body(tpu.pallas_tpu, tpu.forward),
    "reference": _Body(_reference, _reference_statistics),
}


def head(
    hidden: Float[Array, "N D"],
    unembedding: Float[Array, "V D"],
    ids: Integer[Array, "N J"],
    *,
    temperature: float = 1.0,
    soft_cap: float | None = None,
    stored_gradient: bool = True,
    count: Integer[Array, ""] | int | None = None,
    body: str | None = None,
    layout: Layout | None = None,
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
      count: how many rows are in use, the first ones (`kernels.packing` brings them there). The
        rest are zero in all outputs and gradients, and blocks of them are neither read nor
        computed. Not with a layout: each device would need its own.
      body: a name in the table of bodies, or None to choose: "pallas_tpu" where the code runs on
        one TPU (a single device, or with a layout: the compiler cannot partition a kernel) and
        takes these shapes, "xla" elsewhere.
      layout: how the arrays lie on the mesh that `jax.set_mesh` has set: each device then computes
        its tokens against its rows of the unembedding. None leaves the sharding to the compiler.

    Returns:
      `HeadOutput`, float32 whatever the inputs (float64 from float64), sums in the same precision.

    Raises:
      ValueError: wrong ranks, sizes that disagree or are zero, an unknown body or one that the
        platform or the shapes rule out, temperature or soft_cap not above 0. TypeError: dtypes.
        Both when tracing, with the shapes.
    """
    _check(hidden, unembedding, ids)
    transform = checked_transform(temperature, soft_cap)
    name = _default_body(hidden, unembedding, ids, layout) if body is None else body
    if name not in _BODIES:
        raise ValueError(f"unknown head body {name!r}; known: {', '.join(sorted(_BODIES))}")
    index = _index(ids, unembedding.shape[0])
    if layout is None:
        if count is not None:
            count = jnp.asarray(count, jnp.int32)
        out = _BODIES[name].differentiable(hidden, unembedding, index, count, transform)
    else:
        if count is not None:
            raise ValueError("head: a count of rows goes with no layout; leave one of them out")
        layout.check(len(hidden), *unembedding.shape)
        statistics = _BODIES[name].statistics
        out = sharded_head(hidden, unembedding, index, transform, statistics, layout)
    lse, sampled, stored, entropy = out if count is None else _first_rows(out, count)
    if not stored_gradient:
        stored = jax.lax.stop_gradient(stored)
    return HeadOutput(lse, jnp.concatenate([sampled[:, None], stored], axis=1), entropy)


def fused_loss(
    loss: RowLoss,
    hidden: Float[Array, "N D"],
    unembedding: Float[Array, "V D"],
    ids: Integer[Array, "N J"],
    rows: Any,
    *,
    temperature: float = 1.0,
    soft_cap: float | None = None,
    stored_gradient: bool = True,
    valid: Bool[Array, " N"] | None = None,
    layout: Layout | None = None,
) -> tuple[Float[Array, ""], TokenTerms]:
    """(sum_n loss(terms_n, rows_n), terms) with the gradient made in the same pass over the logits.

    For losses whose value at a token depends on that token alone: 6NDV flops, forward and backward,
    where `head` takes 8NDV. Same value and gradient as the loss of `head`'s output. The terms carry
    no gradient. Not differentiated, it is `head` and the loss. See `kernels.single_pass`.

    Args:
      loss: (TokenTerms, rows) of any n of the tokens -> losses [n].
      rows: a pytree of what else the loss needs, leaves [N, ...]; no gradient reaches it.
      valid: False at tokens that are no part of the loss and cost next to nothing; their terms are
        0 where a gradient is taken. None: all are.
      hidden, unembedding, ids, temperature, soft_cap, stored_gradient, layout: as `head`. A float32
        matrix beside bfloat16 hidden states is used in bfloat16; its gradient stays float32.
    """
    _check(hidden, unembedding, ids)
    index = _index(ids, unembedding.shape[0])
    if layout is not None:
        layout.check(len(hidden), *unembedding.shape)
    setting = _Setting(checked_transform(temperature, soft_cap), stored_gradient, layout)
    total, terms = _fused_loss(loss, setting, hidden, unembedding, index, rows, valid)
    return total, jax.lax.stop_gradient(terms)


class _Setting(NamedTuple):
    transform: Transform
    stored_gradient: bool
    layout: Layout | None


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused_loss(loss, setting, hidden, unembedding, ids, rows, valid):
    matrix = unembedding.astype(hidden.dtype)
    out = head(hidden, matrix, ids, **setting.transform._asdict(), layout=setting.layout)
    terms = TokenTerms(out.logit_at - out.lse[:, None], out.entropy)
    losses = loss(terms, rows)
    return jnp.sum(losses if valid is None else jnp.where(valid, losses, 0.0)), terms


def _fused_loss_forward(loss, setting, hidden, unembedding, ids, rows, valid):
    matrix = unembedding.astype(hidden.dtype)
    options = setting.transform._asdict() | {"stored_gradient": setting.stored_gradient}
    if setting.layout is None:
        total, terms, gradients = fused_loss_and_grad(
            loss, hidden, matrix, ids, rows, valid=valid, **options
        )
    else:
        total, terms, gradients = sharded_loss_and_grad(
            loss, hidden, matrix, ids, rows, valid, setting.layout, **options
        )
    dtype = jnp.zeros((0,), unembedding.dtype)  # a dtype is no residual; an empty array is
    return (total, terms), (gradients, dtype)


def _fused_loss_backward(loss, setting, kept, cotangents):
    gradients, dtype = kept
    g, _ = cotangents
    d_hidden = (g * gradients.hidden).astype(gradients.hidden.dtype)
    return d_hidden, (g * gradients.unembedding).astype(dtype.dtype), None, None, None


_fused_loss.defvjp(_fused_loss_forward, _fused_loss_backward)


def _first_rows(out: _Parts, count: Array | int) -> _Parts:
    used = jnp.arange(len(out[0])) < count
    lse, sampled, stored, entropy = (
        jnp.where(used.reshape(-1, *(1,) * (part.ndim - 1)), part, 0) for part in out
    )
    return lse, sampled, stored, entropy


def _default_body(hidden: Array, unembedding: Array, ids: Array, layout: Layout | None) -> str:
    alone = layout is not None or tiles.target().one_device
    return "pallas_tpu" if alone and tpu.why_not(hidden, unembedding, ids) is None else "xla"


def checked_transform(temperature: float, soft_cap: float | None) -> Transform:
    """The logits' transform; raises ValueError unless both are above 0 (no soft-cap: None)."""
    for name, value in (("temperature", temperature), ("soft_cap", soft_cap)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a finite number above 0; got {value}")
    return Transform(float(temperature), None if soft_cap is None else float(soft_cap))


def _index(ids: Array, vocabulary: int) -> Array:
    """int32 indices without wrapping: what does not fit is outside [0, V), which becomes -1."""
    wide = ids if ids.dtype.itemsize >= 4 else ids.astype(jnp.int32)
    inside = (wide >= 0) & (wide < vocabulary)
    return jnp.where(inside, wide.astype(jnp.int32), -1)


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
