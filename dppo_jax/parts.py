"""A minibatch taken part by part: which rows are in a part, and what all of them give together."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dppo_jax import packing
from dppo_jax.packing import Budget
from dppo_jax.sharding import constrain


def prompts_of(rows: Any) -> int:
    """How many prompts the leaves of `rows` are of."""
    return min(len(leaf) for leaf in jax.tree.leaves(rows))


def microbatch(rows: Any, index: int | Int[Array, ""], parts: int) -> Any:
    """Part `index` of `parts`: the prompts index, index + parts, ... with all of their samples.

    Leaves lead with P prompts, or with P*G sequences, prompt by prompt. Strided parts keep every
    part's rows spread over the devices that hold them.
    """
    prompts = prompts_of(rows)

    def part(leaf):
        strided = leaf.reshape(prompts // parts, parts, len(leaf) // prompts, *leaf.shape[1:])
        taken = jax.lax.dynamic_index_in_dim(strided, index, axis=1, keepdims=False)
        return constrain(taken.reshape(-1, *leaf.shape[1:]), "batch")

    return jax.tree.map(part, rows)


def over_microbatches(of_part: Callable[[Any], Any], rows: Any, parts: int) -> Any:
    """What `of_part` says of each sequence of its part, [P*G, ...], in the order of the whole."""
    prompts = prompts_of(rows)
    stacked = jax.lax.map(lambda i: of_part(microbatch(rows, i, parts)), jnp.arange(parts))

    def whole(leaf):
        by_prompt = leaf.reshape(parts, prompts // parts, -1, *leaf.shape[2:])
        return constrain(jnp.swapaxes(by_prompt, 0, 1).reshape(-1, *leaf.shape[2:]), "batch")

    return jax.tree.map(whole, stacked)


def over_packed(
    of_part: Callable[[Any], Any], rows: Any, of: packing.Plan, budget: Budget, sequences: int
) -> Any:
    """`over_microbatches` of the packed microbatches of a plan."""

    def part(index):
        return of_part(packing.take(rows, of, index, budget))

    def add(index, so_far):
        chosen = jnp.where(of.sequences[index] < 0, sequences, of.sequences[index])
        place = lambda whole, some: whole.at[chosen].set(some, mode="drop")  # noqa: E731
        return jax.tree.map(place, so_far, part(index))

    room = jax.tree.map(
        lambda leaf: jnp.zeros((sequences, *leaf.shape[1:]), leaf.dtype), jax.eval_shape(part, 0)
    )
    return jax.lax.fori_loop(0, of.count, add, room)
