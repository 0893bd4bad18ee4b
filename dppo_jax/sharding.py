"""Meshes, and the one table that maps logical axis names to mesh axes.

Parameters carry logical names (`models.decoder.Block`); activations are constrained by the same
names through `constrain`. Without a mesh everything here is the identity.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dppo_jax.kernels.sharded import Layout

MESH_AXES = ("data", "fsdp", "tensor")

# What a parameter's or an activation's logical axis is split over.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": None,
    "layers": None,
}


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1, "all that remain"."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        if sum(size == -1 for size in sizes) > 1 or any(s == 0 or s < -1 for s in sizes):
            raise ValueError(f"mesh {self}: sizes are positive, and at most one is -1")

    def build(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh over `devices` (all of them by default)."""
        devices = jax.devices() if devices is None else devices
        sizes = [self.data, self.fsdp, self.tensor]
        known = int(np.prod([size for size in sizes if size > 0]))
        if -1 in sizes and len(devices) % known == 0:
            sizes[sizes.index(-1)] = len(devices) // known
        if np.prod(sizes) != len(devices):
            asked = " x ".join(f"{n}={s}" for n, s in zip(MESH_AXES, sizes, strict=True))
            raise ValueError(
                f"mesh {asked} does not fit {len(devices)} devices: "
                "set the mesh sizes so that their product is the number of devices"
            )
        return jax.make_mesh(
            tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
        )


def spec_of(logical_axes: Sequence[str | None]) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions have these logical names.

    In the form that jitted programs give back, without None at the end, so that the two compare
    equal.
    """
    parts = [RULES[axis] if axis else None for axis in logical_axes]
    while parts and parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts)


def shardings_of(logical_axes: Any, mesh: Mesh) -> Any:
    """NamedShardings for a pytree of logical-axis tuples (`Model.logical_axes`)."""
    return jax.tree.map(
        lambda axes: NamedSharding(mesh, spec_of(axes)),
        logical_axes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over the data axes, everything else whole."""
    return NamedSharding(mesh, spec_of(("batch",)))


def check_divides(mesh: Mesh, axes: Sequence[str], sizes: dict[str, int]) -> None:
    """Raises ValueError naming the first size that the mesh axes do not divide."""
    shards = int(np.prod([mesh.shape[axis] for axis in axes]))
    for name, size in sizes.items():
        if size % shards:
            asked = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
            raise ValueError(
                f"{name}={size} is not divisible by the mesh's {asked}: "
                f"make it a multiple of {shards}, or change the mesh"
            )


def head_layout() -> Layout | None:
    """How hidden states and unembedding lie on the mesh that is set; None on a single device.

    RULES of "batch", "vocab" and "embed".
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    return Layout(tokens=("data", "fsdp"), vocabulary="tensor", width="fsdp")


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Pins an activation's sharding inside jit, where a mesh is set (`jax.set_mesh`)."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(logical_axes))
