"""Arrays that are not there: shapes, types and shardings."""

from typing import Any

import jax

from dppo_jax.elsewhere import bytes_of_a_shard


def bytes_of(tree: Any) -> float:
    """Bytes a device of the ShapeDtypeStructs in a pytree, all with shardings."""
    return sum(
        bytes_of_a_shard(leaf)
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.ShapeDtypeStruct)
    )


def laid_out(tree: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs with these shardings: one for all, or a pytree of them."""
    if isinstance(shardings, jax.sharding.Sharding):
        only = shardings
        shardings = jax.tree.map(lambda _: only, tree)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )
