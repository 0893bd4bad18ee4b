"""FSDP: a weight is gathered where it is used, and its gradient scattered to where it is stored.

Written out as collectives, since compilers made less of sharding constraints: for v5p:4x4x4 libtpu
0.0.42.1 summed whole gradients on every device, of which each then took its part, and made of a
gather over all three dimensions of the torus an all-reduce of arrays that are 0 elsewhere, twice
the bytes. So one mesh axis is gathered after the other, from the last, whose parts are neighbours.
"""

import math
from collections.abc import Callable

import jax
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from dppo_jax.sharding import axes_of, constrain, current_view, mesh_here, spec_of

Axes = tuple[str | None, ...]
_ALONG = "sequence"


def stored_axes(axes: Axes, mesh: AbstractMesh) -> list[tuple[str, ...]]:
    """For each dimension of a weight, the mesh axes that split its storage alone."""
    stored, used = spec_of(axes, mesh, "parameters"), spec_of(axes, mesh, "compute")
    found = []
    for dimension in range(len(axes)):
        parts = [
            (spec[dimension],) if isinstance(spec[dimension], str) else spec[dimension] or ()
            for spec in (stored, used)
            if dimension < len(spec)
        ]
        whole = len(parts) == 1 or (len(parts) == 2 and parts[0] != parts[1])
        found.append(tuple(parts[0]) if whole else ())
    return found


def whole(part: Float[Array, "..."], axes: Axes, mesh: AbstractMesh) -> Float[Array, "..."]:
    """A device's part of a weight to the weight in use, inside `jax.shard_map`.

    The transpose is a sum over the devices of which each keeps its part.
    """
    for dimension, split in enumerate(stored_axes(axes, mesh)):
        for axis in reversed(split):
            part = lax.all_gather(part, axis, axis=dimension, tiled=True)
    return part


def with_whole(
    function: Callable[[Array, Array], Array],
    x: Shaped[Array, "N ..."],
    weight: Float[Array, "..."],
    axes: Axes,
) -> Shaped[Array, "N ..."]:
    """function(x, weight), token by token, the weight whole along what only its storage splits.

    `axes` are the weight's logical axes. In the decode view it stays split.
    """
    mesh = mesh_here()
    tokens = axes_of("tokens", mesh, "compute")
    even = len(x) % math.prod(mesh.shape[axis] for axis in tokens) == 0
    if current_view() == "decode" or not even or not any(stored_axes(axes, mesh)):
        return function(x, constrain(weight, *axes))
    stored = PartitionSpec(*(split or None for split in stored_axes(axes, mesh)))
    rows = PartitionSpec(tokens)
    run = jax.shard_map(
        lambda x, part: function(x, whole(part, axes, mesh)),
        in_specs=(rows, stored),
        out_specs=rows,
        axis_names=set(mesh.axis_names) - {"tensor"},  # the compiler's, as elsewhere in a layer
        check_vma=False,
    )
    return run(x, weight)


def looked_up(
    ids: Int[Array, "*N"], table: Float[Array, "V D"], axes: Axes
) -> Float[Array, "*N D"]:
    """table[ids], `axes` being the table's logical axes.

    Where the mesh splits the columns of sequences, none holds the whole table, or its gradient:
    each device looks its neighbours' tokens up in its part of the width, and they exchange those.
    """
    mesh = mesh_here()
    tokens = axes_of("tokens", mesh, "compute")
    split = () if mesh.empty else stored_axes(axes, mesh)[1]
    even = len(ids) % math.prod(mesh.shape[axis] for axis in tokens) == 0
    if current_view() == "decode" or not even or _ALONG not in split:
        return with_whole(lambda ids, rows: rows[ids], ids, table, axes)
    others = tuple(axis for axis in split if axis != _ALONG)  # come first in the storage, too

    def local(ids, part):
        for axis in reversed(others):
            part = lax.all_gather(part, axis, axis=1, tiled=True)
        everyone = lax.all_gather(ids, _ALONG, tiled=True)
        found = lax.all_to_all(part[everyone], _ALONG, split_axis=0, concat_axis=1, tiled=True)
        blocks = math.prod(mesh.shape[axis] for axis in others)
        found = found.reshape(len(ids), mesh.shape[_ALONG], blocks, -1)
        return found.swapaxes(1, 2).reshape(len(ids), -1)

    rows = PartitionSpec(tokens)
    run = jax.shard_map(
        local,
        in_specs=(rows, PartitionSpec(None, split)),
        out_specs=rows,
        axis_names=set(mesh.axis_names) - {"tensor"},
        check_vma=False,
    )
    return run(ids, table)
