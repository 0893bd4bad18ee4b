"""The head on a mesh: tokens split over some axes, the vocabulary over another.

Each device computes its tokens against its rows of the unembedding, in the bodies that serve one
device. Only numbers a token cross the vocabulary axis (maxima and sums), never a logit. Where the
mesh also stores the matrix split along D, it is gathered once, before the loop over chunks, and
its gradient leaves as it is stored. Gradients are written out with their collectives instead of
being derived through `jax.shard_map`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dppo_jax.kernels.combining import combine, combine_logits
from dppo_jax.kernels.single_pass import Gradients, RowLoss, TokenTerms, fused_loss_and_grad
from dppo_jax.kernels.xla import Saved, backward


class Layout(NamedTuple):
    """Mesh axes of the head's arrays, in the mesh that `jax.set_mesh` has set."""

    tokens: tuple[str, ...]  # split the N tokens
    vocabulary: str | None  # splits the V rows of the unembedding
    width: str | tuple[str, ...] | None  # split the stored unembedding along D

    @property
    def stores(self) -> tuple[str, ...]:
        """The axes of `width`."""
        return (self.width,) if isinstance(self.width, str) else self.width or ()

    @property
    def rows(self) -> PartitionSpec:
        """Of arrays that lead with tokens."""
        return PartitionSpec(self.tokens)

    @property
    def matrix(self) -> PartitionSpec:
        """Of the unembedding while in use: whole along D."""
        return PartitionSpec(self.vocabulary)

    @property
    def stored(self) -> PartitionSpec:
        """Of the unembedding as it is stored, and of its gradient."""
        return PartitionSpec(self.vocabulary, self.stores or None)

    def shift(self, ids: Array, shard_rows: int) -> Array:
        """The ids of this device's shard, counted from its first row; negative where it has not."""
        if self.vocabulary is None:
            return ids
        local = ids - lax.axis_index(self.vocabulary) * shard_rows
        return jnp.where((local >= 0) & (local < shard_rows), local, -1)

    def whole_matrix(self, part: Float[Array, "V d"]) -> Float[Array, "V D"]:
        """What the devices store of it together, one mesh axis after the other (`models.fsdp`)."""
        for axis in reversed(self.stores):
            part = lax.all_gather(part, axis, axis=1, tiled=True)
        return part

    def reduce_matrix(self, gradient: Float[Array, "V D"]) -> Float[Array, "V d"]:
        """The sum over the devices' tokens, of which each keeps what it stores.

        Over the axes that store parts of it first: the others then sum what is left, a part.
        """
        for axis in self.stores:
            if axis in self.tokens:
                gradient = lax.psum_scatter(gradient, axis, scatter_dimension=1, tiled=True)
            else:
                mine = gradient.shape[1] // lax.axis_size(axis)
                start = lax.axis_index(axis) * mine
                gradient = lax.dynamic_slice_in_dim(gradient, start, mine, axis=1)
        summed = tuple(axis for axis in self.tokens if axis not in self.stores)
        gradient = lax.psum(gradient, summed) if summed else gradient
        # libtpu 0.0.42.1 ends (RET_CHECK) where it moves this sum out of a loop of microbatches.
        return lax.optimization_barrier(gradient)

    def check(self, tokens: int, vocabulary: int, width: int) -> None:
        """Raises ValueError naming what the mesh does not divide."""
        mesh = jax.sharding.get_abstract_mesh()
        for name, size, axes in (
            ("tokens N", tokens, self.tokens),
            ("the vocabulary V", vocabulary, (self.vocabulary,)),
            ("the width D", width, self.stores),
        ):
            for axis in axes:
                if axis is not None and axis not in mesh.shape:
                    raise ValueError(f"head: the mesh has no axis {axis!r}: {dict(mesh.shape)}")
            shards = 1
            for axis in axes:
                shards *= 1 if axis is None else mesh.shape[axis]
            if size % shards:
                raise ValueError(
                    f"head: {name} = {size} is not divisible by {shards}, the mesh's "
                    f"{' x '.join(a for a in axes if a)}: pad it or change the mesh"
                )


def on_mesh(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`jax.shard_map` over the mesh that is set; gradients are this module's own business."""
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def sharded_head(hidden, unembedding, ids, transform, forward, layout):
    """(lse [N], sampled logit [N], stored logits [N,K], entropy [N]) on the mesh that is set.

    `forward` is a body's own: (hidden, unembedding, ids, transform) -> (lse, logit_at, entropy).
    """

    def local(hidden, unembedding, ids):
        unembedding = layout.whole_matrix(unembedding)
        here = layout.shift(ids, unembedding.shape[0])
        lse, logit_at, entropy = forward(hidden, unembedding, here, transform)
        if layout.vocabulary is not None:
            lse, entropy = combine(lse, entropy, layout.vocabulary)
            logit_at = combine_logits(logit_at, layout.vocabulary)
        return lse, logit_at[:, 0], logit_at[:, 1:], entropy

    specs = (layout.rows, layout.stored, layout.rows)
    return on_mesh(local, specs, layout.rows)(hidden, unembedding, ids)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Wanted:
    """Which gradients are asked for; static."""

    hidden: bool = field(metadata={"static": True})
    unembedding: bool = field(metadata={"static": True})


class _Residuals(NamedTuple):
    hidden: Array
    unembedding: Array
    ids: Array
    lse: Array
    entropy: Array


def _forward(hidden, unembedding, ids, transform, forward, layout):
    arrays = hidden.value, unembedding.value, ids.value
    out = sharded_head(*arrays, transform, forward, layout)
    wanted = _Wanted(hidden.perturbed, unembedding.perturbed)
    return out, (_Residuals(*arrays, out[0], out[3]), wanted)


def _backward(transform, forward, layout, kept, cotangents):
    residuals, wanted = kept
    known = [None if isinstance(g, SymbolicZero) else g for g in cotangents]
    if all(g is None for g in known):
        return None, None, None

    def local(residuals, known):
        residuals = _Residuals(*residuals)
        residuals = residuals._replace(unembedding=layout.whole_matrix(residuals.unembedding))
        ids = layout.shift(residuals.ids, residuals.unembedding.shape[0])
        saved = Saved(
            residuals.hidden, residuals.unembedding, ids, residuals.lse, residuals.entropy, None,
            wants_hidden=wanted.hidden, wants_unembedding=wanted.unembedding,
        )  # fmt: skip
        d_hidden, d_unembedding = backward(saved, transform, *known)
        if d_hidden is not None:
            if layout.vocabulary is not None:
                d_hidden = lax.psum(d_hidden, layout.vocabulary)
            d_hidden = d_hidden.astype(residuals.hidden.dtype)
        if d_unembedding is not None:
            d_unembedding = layout.reduce_matrix(d_unembedding)
        return d_hidden, d_unembedding

    rows, stored = layout.rows, layout.stored
    compute = on_mesh(local, ((rows, stored, rows, rows, rows), rows), (rows, stored))
    return *compute(tuple(residuals), known), None


sharded_head.defvjp(_forward, _backward, symbolic_zeros=True)


def sharded_loss_and_grad(
    loss: RowLoss,
    hidden: Float[Array, "N D"],
    unembedding: Float[Array, "V D"],
    ids: Int[Array, "N J"],
    rows: Any,
    valid: Bool[Array, " N"] | None,
    layout: Layout,
    **options: Any,
) -> tuple[Float[Array, ""], TokenTerms, Gradients]:
    """`single_pass.fused_loss_and_grad` on the mesh that is set; same results, laid out on it."""

    def local(hidden, unembedding, ids, rows, valid):
        unembedding = layout.whole_matrix(unembedding)
        total, terms, gradients = fused_loss_and_grad(
            loss,
            hidden,
            unembedding,
            layout.shift(ids, unembedding.shape[0]),
            rows,
            valid=valid,
            vocabulary_axis=layout.vocabulary,
            token_axes=layout.tokens,
            **options,
        )
        if layout.tokens:
            total = lax.psum(total, layout.tokens)
        return total, terms, (gradients.hidden, layout.reduce_matrix(gradients.unembedding))

    specs = (layout.rows, layout.stored, layout.rows, layout.rows, layout.rows)
    out = (PartitionSpec(), layout.rows, (layout.rows, layout.stored))
    total, terms, gradients = on_mesh(local, specs, out)(hidden, unembedding, ids, rows, valid)
    return total, terms, Gradients(*gradients)
