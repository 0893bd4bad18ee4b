"""Processes: which prompts are this one's, and host-local rows to global arrays and back."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding


def to_global_rows(rows: Any, sharding: NamedSharding) -> Any:
    """This process's rows of a batch (a pytree of host arrays) as arrays of the whole batch."""
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), rows
    )


def to_local_rows(arrays: Any, sharding: NamedSharding) -> Any:
    """The inverse of `to_global_rows`: the rows that this process put in, on the host."""
    if jax.process_count() == 1:
        return jax.device_get(arrays)
    assert isinstance(sharding.mesh, Mesh), "arrays of a run live on real devices"
    local = multihost_utils.global_array_to_host_local_array(arrays, sharding.mesh, sharding.spec)
    return jax.device_get(local)


def gather_rows(rows: np.ndarray) -> np.ndarray:
    """Every process's host rows, in the order of the processes; each may have another number."""
    if jax.process_count() == 1:
        return rows
    counts = np.asarray(multihost_utils.process_allgather(np.array(len(rows))))
    padded = np.zeros((int(counts.max()), *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    every = np.asarray(multihost_utils.process_allgather(padded))
    return np.concatenate([part[:count] for part, count in zip(every, counts, strict=True)])


def is_writer() -> bool:
    """True in the one process that writes metrics and prints."""
    return jax.process_index() == 0
