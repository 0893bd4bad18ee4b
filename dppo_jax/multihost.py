"""Rows and processes: which prompts are this one's, host-local rows to global arrays and back."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dppo_jax.sharding import batch_sharding


@dataclass(frozen=True)
class RowShare:
    """This process's part of every batch: part `index` of `count`, rows in the mesh's order.

    Where a mesh axis that splits no rows (tensor) spans hosts, several processes hold the same
    part. They load the same prompts; the first of them, `leaders[index]`, speaks for the part.
    """

    index: int
    count: int
    leaders: tuple[int, ...]

    @property
    def leads(self) -> bool:
        return self.leaders[self.index] == jax.process_index()


def row_share(mesh: Mesh) -> RowShare:
    """What this process holds of the rows of a mesh; ValueError where parts would overlap."""
    of = row_parts(mesh)
    count = max(of.values()) + 1
    leaders = tuple(min(p for p in of if of[p] == part) for part in range(count))
    return RowShare(of[jax.process_index()], count, leaders)


def row_parts(mesh: Mesh) -> dict[int, int]:
    """Which part of its rows each process of a mesh holds; ValueError where parts would overlap."""
    where: Any = batch_sharding(mesh).devices_indices_map((mesh.size,))
    places: dict[int, set[int]] = {}
    for device, (rows,) in where.items():
        places.setdefault(device.process_index, set()).add(rows.start or 0)
    parts = sorted({tuple(sorted(each)) for each in places.values()})
    if sum(map(len, parts)) != len(set().union(*parts)) or len({len(part) for part in parts}) > 1:
        raise ValueError(
            f"mesh {dict(mesh.shape)}: {len(places)} hosts would hold overlapping parts of"
            " a batch; let each host's devices be a whole block of the mesh"
        )
    return {process: parts.index(tuple(sorted(each))) for process, each in places.items()}


def to_global_rows(rows: Any, sharding: NamedSharding) -> Any:
    """This process's rows of a batch (a pytree of host arrays) as arrays of the whole batch."""
    if jax.process_count() == 1:
        return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), sharding), rows)
    assert isinstance(sharding.mesh, Mesh), "arrays of a run live on real devices"
    count = row_share(sharding.mesh).count

    def make(leaf: Any) -> jax.Array:
        local = np.asarray(leaf)
        shape = (len(local) * count, *local.shape[1:])
        indices: Any = sharding.addressable_devices_indices_map(shape)
        starts = sorted({index[0].start or 0 for index in indices.values()})
        size = len(local) // len(starts)

        def shard(index: Any) -> np.ndarray:
            at = starts.index(index[0].start or 0) * size
            return local[at : at + size]

        return jax.make_array_from_callback(shape, sharding, shard)

    return jax.tree.map(make, rows)


def to_local_rows(arrays: Any, sharding: NamedSharding) -> Any:
    """The inverse of `to_global_rows`: the rows that this process put in, on the host."""
    if jax.process_count() == 1:
        return jax.device_get(arrays)

    def fetch(array: jax.Array) -> np.ndarray:
        if not array.sharding.is_equivalent_to(sharding, array.ndim):
            array = jax.device_put(array, sharding)
        shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
        return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

    return jax.tree.map(fetch, arrays)


def split_rows(rows: Any, sharding: NamedSharding) -> Any:
    """Rows that every process has, all of them (a pytree of host arrays), as global arrays."""
    return jax.tree.map(
        lambda leaf: jax.make_array_from_callback(leaf.shape, sharding, lambda at: leaf[at]),
        jax.tree.map(np.asarray, rows),
    )


def of_all_processes(tree: Any) -> Any:
    """The tree with arrays of this process's own, the same in every process, as global ones."""
    if jax.process_count() == 1:
        return tree
    shardings = [leaf.sharding for leaf in jax.tree.leaves(tree)]
    mesh = next(each.mesh for each in shardings if isinstance(each, NamedSharding))
    whole = NamedSharding(mesh, PartitionSpec())

    def make(leaf: jax.Array) -> jax.Array:
        if not leaf.is_fully_addressable:
            return leaf
        return jax.make_array_from_callback(leaf.shape, whole, lambda at: np.asarray(leaf)[at])

    return jax.tree.map(make, tree)


def gather_rows(rows: np.ndarray) -> np.ndarray:
    """Every process's host rows, in the order of the processes; each may have another number."""
    if jax.process_count() == 1:
        return rows
    counts = _gathered(np.array(len(rows)))
    padded = np.zeros((int(counts.max()), *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    every = _gathered(padded)
    return np.concatenate([part[:count] for part, count in zip(every, counts, strict=True)])


def gather_parts(rows: np.ndarray, share: RowShare) -> np.ndarray:
    """The rows of every part [count, rows, ...] as its leader has them; all of one shape."""
    if jax.process_count() == 1:
        return rows[None]
    return _gathered(rows)[list(share.leaders)]


@functools.cache
def _speakers() -> tuple[Mesh, Any]:
    """The last device of each process, and the program that tells each of them all.

    It trains, whatever others do: nothing that is agreed waits for a rollout (`elsewhere.divide`).
    """
    last = {device.process_index: device for device in jax.devices()}
    mesh = Mesh(np.array([last[process] for process in sorted(last)]), ("process",))
    return mesh, jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _gathered(array: np.ndarray) -> np.ndarray:
    """Every process's array [processes, ...], as bytes: JAX would make 32 bits of 64."""
    octets = np.ascontiguousarray(array).reshape(1, *array.shape, 1).view(np.uint8)
    mesh, tell = _speakers()
    with jax.set_mesh(mesh):
        own = jax.device_put(octets, mesh.local_devices[0])
        each = NamedSharding(mesh, PartitionSpec("process"))
        shape = (mesh.size, *octets.shape[1:])
        every = tell(jax.make_array_from_single_device_arrays(shape, each, [own]))
    return np.asarray(every.addressable_data(0)).view(array.dtype)[..., 0]


def any_process(here: bool) -> bool:
    """True in every process where it is true in one; all must ask together."""
    return here if jax.process_count() == 1 else bool(_gathered(np.array(here)).any())


def is_writer() -> bool:
    """True in the one process that writes metrics and prints."""
    return jax.process_index() == 0


def own_file(path: Path) -> Path:
    """This process's file where each writes one: name.jsonl, name-1.jsonl, name-2.jsonl, ..."""
    process = jax.process_index()
    return path.with_stem(f"{path.stem}-{process}") if process else path


def everywhere(array: jax.Array) -> np.ndarray:
    """A global array as a whole, the same on the host of every process."""
    if jax.process_count() == 1:
        return jax.device_get(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
