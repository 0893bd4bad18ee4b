"""Meshes, and the one table that maps logical axis names to mesh axes.

Parameters carry logical names (`models.decoder.Block`); activations are constrained by the same
names through `constrain`. Without a mesh everything here is the identity.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dppo_jax.kernels.sharded import Layout

# From the axis that communicates least to the one that communicates most: neighbours in the last
# are neighbours on the torus.
MESH_AXES = ("data", "fsdp", "expert", "sequence", "tensor")

_ROWS = ("data", "fsdp", "expert")  # split prompts and sequences
_STORE = ("fsdp", "expert", "sequence")  # split what is stored, and is whole while in use

View = Literal["parameters", "compute", "decode"]


class Rule(NamedTuple):
    """The mesh axes of one logical axis, in each of the three views.

    An axis that another dimension of the same array has taken is left out.
    """

    parameters: tuple[str, ...] = ()  # as stored, with gradients and optimizer state
    compute: tuple[str, ...] = ()  # prefill, scoring, update: weights are gathered layer by layer
    decode: tuple[str, ...] = ()  # one token a sequence: weights stay, activations travel


RULES: dict[str, Rule] = {
    # of parameters; while decoding a matrix is split along both sides, so that what is summed over
    # fsdp is a part of the columns (v5p:4x4x4, Qwen3-8B: 5.4 TB a chip and step instead of 40)
    "embed": Rule(_STORE, (), ("fsdp", "expert")),
    "vocab": Rule(("tensor",), ("tensor",), ("tensor", "sequence")),
    "heads": Rule(("tensor",), ("tensor",), ("tensor", "sequence")),
    "kv_heads": Rule(("tensor",), ("tensor",), ("tensor", "sequence")),
    "mlp": Rule(("tensor",), ("tensor",), ("tensor", "sequence")),
    "experts": Rule(("expert",), ("expert",), ("expert",)),
    "layers": Rule(),
    # of activations
    "batch": Rule(_ROWS, _ROWS, (*_ROWS, "sequence")),  # prompts or sequences
    "columns": Rule((), ("sequence",), ()),  # of one sequence
    "tokens": Rule((), (*_ROWS, "sequence"), ("data",)),  # flattened, into matrix products
    "queries": Rule((), (*_ROWS, "sequence"), (*_ROWS, "sequence")),  # flattened, in attention
    "groups": Rule((), (*_ROWS, "sequence"), _ROWS),  # halfway from queries to tokens
    "width": Rule((), (), ("fsdp", "expert")),  # of the residual stream
}

_view: ContextVar[View] = ContextVar("view", default="compute")


@contextmanager
def viewed(view: View) -> Iterator[None]:
    """What is traced inside follows this view of the rules."""
    token = _view.set(view)
    try:
        yield
    finally:
        _view.reset(token)


def current_view() -> View:
    """The view that `constrain` follows."""
    return _view.get()


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1, "all that remain".

    data: rows of the batch, everything else a copy. fsdp: rows, and storage of parameters and
    optimizer state. tensor: heads, MLPs and vocabulary. expert: rows, and the experts of a mixture.
    sequence: the columns of long sequences. `slices` of TPUs (0: as many as the devices say) are
    joined by `data`, then by `fsdp`: the other axes stay on a slice's own interconnect.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    expert: int = 1
    sequence: int = 1
    slices: int = 0

    def __post_init__(self):
        sizes = self._asked.values()
        if sum(size == -1 for size in sizes) > 1 or any(s == 0 or s < -1 for s in sizes):
            raise ValueError(f"mesh {self}: sizes are positive, and at most one is -1")
        if self.slices < 0:
            raise ValueError(f"mesh {self}: slices is positive, or 0 to ask the devices")

    @property
    def _asked(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    def sizes(self, devices: int) -> dict[str, int]:
        """The size of every axis over this many devices; ValueError where they do not fit."""
        sizes = self._asked
        known = math.prod(size for size in sizes.values() if size > 0)
        for axis, size in sizes.items():
            if size == -1 and devices % known == 0:
                sizes[axis] = devices // known
        if math.prod(sizes.values()) != devices:
            asked = " x ".join(f"{axis}={n}" for axis, n in sizes.items() if n != 1) or "of 1"
            raise ValueError(
                f"mesh {asked} does not fit {devices} devices: "
                "set the mesh sizes so that their product is the number of devices"
            )
        return sizes

    def build(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh over `devices` (all of them by default)."""
        devices = jax.devices() if devices is None else devices
        return Mesh(self.arrange(devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))

    def arrange(self, devices: Sequence[Any]) -> np.ndarray:
        """The devices in the order of the mesh: near each other where the axes talk most.

        Of TPUs that are no whole torus, as a part of each host is none, in the order given.
        """
        sizes = self.sizes(len(devices))
        shape = tuple(sizes.values())
        if not _whole_torus(devices):
            return np.array(devices).reshape(shape)
        count, by_process = self._slices(devices)
        if count == 1:
            return _on_torus(lambda **split: mesh_utils.create_device_mesh(shape, devices, **split))
        outer = dict.fromkeys(MESH_AXES, 1)
        outer["data"] = math.gcd(count, sizes["data"])
        outer["fsdp"] = count // outer["data"]
        if sizes["fsdp"] % outer["fsdp"]:
            raise ValueError(
                f"data={sizes['data']} x fsdp={sizes['fsdp']} do not spread over {count} slices: "
                f"make one of them a multiple of {count}"
            )
        inner = tuple(sizes[axis] // outer[axis] for axis in MESH_AXES)
        return _on_torus(
            lambda **split: mesh_utils.create_hybrid_device_mesh(
                inner, tuple(outer.values()), devices, process_is_granule=by_process, **split
            )
        )

    def _slices(self, devices: Sequence[Any]) -> tuple[int, bool]:
        """How many slices the devices are, and whether each is a process's."""
        found = len({getattr(device, "slice_index", 0) for device in devices})
        if not self.slices:
            return (found if devices[0].platform == "tpu" else 1), False
        processes = len({device.process_index for device in devices})
        if self.slices not in (1, found, processes) or (self.slices == 1 < found):
            raise ValueError(
                f"slices={self.slices}, but the devices are of {found} slices and {processes} "
                "processes: set MeshConfig.slices to 0"
            )
        return self.slices, self.slices != found


def _whole_torus(devices: Sequence[Any]) -> bool:
    """Whether the TPUs of each slice fill a box; true of devices without coordinates."""
    slices: dict[int, set[tuple[int, ...]]] = {}
    for device in devices:
        if getattr(device, "coords", None) is not None:
            slices.setdefault(getattr(device, "slice_index", 0), set()).add(tuple(device.coords))
    return all(
        math.prod(max(along) - min(along) + 1 for along in zip(*taken, strict=True)) == len(taken)
        for taken in slices.values()
    )


def _on_torus(arrange: Any) -> np.ndarray:
    """An arrangement that splits no physical axis of the torus, where there is one."""
    try:
        return arrange()
    except NotImplementedError:
        return arrange(allow_split_physical_axes=True)


def mesh_here() -> AbstractMesh:
    """The mesh that is set, with size 1 along axes that a `jax.shard_map` around here has split."""
    mesh = jax.sharding.get_abstract_mesh()
    split = mesh.manual_axes
    sizes = tuple(1 if axis in split else size for axis, size in mesh.shape.items())
    return AbstractMesh(sizes, mesh.axis_names) if split else mesh


def axes_of(
    logical_axis: str, mesh: Mesh | AbstractMesh, view: View, size: int = 0
) -> tuple[str, ...]:
    """The mesh axes of more than one device that split a logical axis; the mesh may lack some.

    Given the `size` of the dimension, the last ones that do not divide it are left out.
    """
    rule = getattr(RULES[logical_axis], view)
    return _dividing(tuple(axis for axis in rule if mesh.shape.get(axis, 1) > 1), mesh, size)


def _dividing(axes: tuple[str, ...], mesh: Mesh | AbstractMesh, size: int) -> tuple[str, ...]:
    while size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes


def spec_of(
    logical_axes: Sequence[str | None],
    mesh: Mesh | AbstractMesh,
    view: View = "parameters",
    shape: Sequence[int] | None = None,
) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions have these logical names.

    In the form that jitted programs give back, without axes of one device and without None at the
    end, so that the two compare equal. Given the array's `shape`, the last mesh axes of a dimension
    that they do not divide are left out.
    """
    taken: set[str] = set()
    parts: list[Any] = []
    for place, logical in enumerate(logical_axes):
        axes = axes_of(logical, mesh, view) if logical else ()
        axes = tuple(axis for axis in axes if axis not in taken)
        axes = _dividing(axes, mesh, shape[place] if shape else 0)
        taken |= set(axes)
        parts.append(axes[0] if len(axes) == 1 else axes or None)
    while parts and parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts)


def shardings_of(logical_axes: Any, mesh: Mesh) -> Any:
    """NamedShardings for a pytree of logical-axis tuples (`Model.logical_axes`), as stored."""
    return jax.tree.map(
        lambda axes: NamedSharding(mesh, spec_of(axes, mesh)),
        logical_axes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over the axes that split batches, everything else whole."""
    return NamedSharding(mesh, spec_of(("batch",), mesh))


def on_each_copy(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`function` on each device's part, where devices along `data` are all that there are.

    Each has the parameters whole, and waits for no other: a loop may end earlier on one. On any
    other mesh it is `function`: of groups of several devices, the compiler's transfers inside such
    a loop go from group to group, and wait for ever.
    """
    mesh = mesh_here()
    if mesh.empty or mesh.size == 1 or mesh.size != mesh.shape.get("data", 1):
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def rows_here(make: Callable[[int], Any], rows: int) -> Any:
    """This device's `rows` of make(all rows), inside `on_each_copy`; elsewhere make(rows)."""
    mesh = jax.sharding.get_abstract_mesh()
    if "data" not in mesh.manual_axes:
        return make(rows)
    start = rows * jax.lax.axis_index("data")
    everywhere = make(rows * mesh.shape["data"])
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, rows), everywhere)


def check_divides(
    mesh: Mesh | AbstractMesh,
    logical_axis: str,
    sizes: Mapping[str, int],
    view: View = "parameters",
) -> None:
    """Raises ValueError naming the first size that the rule's mesh axes do not divide."""
    axes = axes_of(logical_axis, mesh, view)
    shards = math.prod(mesh.shape[axis] for axis in axes)
    for name, size in sizes.items():
        if size % shards:
            asked = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
            raise ValueError(
                f"{name}={size} is not divisible by the mesh's {asked}: "
                f"make it a multiple of {shards}, or change the mesh"
            )


def batch_shards() -> int:
    """How many pieces the mesh that is set splits the rows of a batch into; 1 without a mesh."""
    mesh = mesh_here()
    if mesh.empty:
        return 1
    return math.prod(mesh.shape[axis] for axis in axes_of("batch", mesh, "compute"))


def head_layout(tokens: int, vocabulary: int) -> Layout | None:
    """How so many hidden states and the unembedding lie on the mesh set; None on one device.

    RULES of "tokens", "vocab" and "embed". Where no tensor axis splits the vocabulary and the
    devices along `sequence` have few tokens beside it, they take all of these together, each
    against its part of the vocabulary: the matrix and its gradient are then whole nowhere, and 10
    bytes a token and number of the width travel instead of 6 a row of the matrix.
    """
    mesh = mesh_here()
    if mesh.empty or mesh.size == 1:
        return None
    split, along = axes_of("tokens", mesh, "compute"), axes_of("vocab", mesh, "compute")
    stored = axes_of("embed", mesh, "parameters")
    rows = tuple(axis for axis in split if axis != "sequence")
    together = tokens // math.prod(mesh.shape[axis] for axis in rows)
    even = vocabulary % sequence_shards() == 0
    if not along and rows != split and even and 10 * together <= 6 * vocabulary:
        stored = tuple(axis for axis in stored if axis != "sequence")
        return Layout(rows, "sequence", stored)
    return Layout(split, along[0] if along else None, stored)


def sampler_layout(rows: int) -> Layout | None:
    """The same while decoding, for that many rows: each device draws some; None on one device.

    RULES of "queries" and "vocab". Axes that do not divide the rows are left out. The unembedding
    is whole along D: `constrain(matrix, "vocab", None)` gathers it, once, outside the loop.
    """
    mesh = mesh_here()
    if mesh.empty or mesh.size == 1:
        return None
    split = axes_of("queries", mesh, "decode", rows)
    vocabulary = axes_of("vocab", mesh, "compute")
    return Layout(split, vocabulary[0] if vocabulary else None, None)


def sequence_shards() -> int:
    """How many devices the columns of a sequence are split over."""
    return mesh_here().shape.get("sequence", 1)


def _blocks(rows: int, columns: int) -> tuple[int, int]:
    """Into how many blocks of rows and of columns the mesh cuts an array [rows, columns]."""
    mesh = mesh_here()
    down = math.prod(mesh.shape[axis] for axis in axes_of("batch", mesh, "compute"))
    across = sequence_shards()
    # What is not cut evenly is not a batch of the training step: the compiler lays it out.
    return (down, across) if rows % down == columns % across == 0 else (1, 1)


def flatten_tokens(x: jax.Array) -> jax.Array:
    """[B, T, ...] as [B·T, ...], a device's tokens next to each other ("tokens" of the rules).

    The order is that of the rows unless the mesh splits columns: then block by block.
    """
    rows, columns, *rest = x.shape
    down, across = _blocks(rows, columns)
    if across == 1:
        return x.reshape(-1, *rest)
    x = x.reshape(down, rows // down, across, columns // across, *rest).swapaxes(1, 2)
    return _lead(x.reshape(-1, *rest), "tokens")


def unflatten_tokens(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """The inverse of `flatten_tokens`."""
    down, across = _blocks(rows, columns)
    rest = x.shape[1:]
    if across > 1:
        x = x.reshape(down, across, rows // down, columns // across, *rest).swapaxes(1, 2)
        return _lead(x.reshape(rows, columns, *rest), "batch", "columns")
    return x.reshape(rows, columns, *rest)


def _lead(x: jax.Array, *logical_axes: str) -> jax.Array:
    """Pins the first dimensions; the others stay the compiler's."""
    mesh = mesh_here()
    spec = spec_of(logical_axes, mesh, "compute")
    free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - len(spec))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec, *free))


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Pins an activation's sharding inside jit, where a mesh is set (`jax.set_mesh`).

    By the view that is current (`viewed`). Mesh axes that do not divide a dimension leave it alone.
    """
    mesh = mesh_here()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(logical_axes, mesh, current_view(), x.shape))
