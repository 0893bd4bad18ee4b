"""Packed rows: several sequences side by side in a row of cells, in place of columns of padding.

A plan is made on the host from the sequences' lengths, and always has the same shapes: the number
of microbatches in use is a value, so that no step compiles anew.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dppo_jax.models.packed import Cells, cells_of
from dppo_jax.records import Batch, Mean, Metrics, Packing, Rollout
from dppo_jax.sharding import (
    batch_shards,
    constrain,
    flatten_tokens,
    sequence_shards,
    unflatten_tokens,
)

MOST_IN_A_ROW = 16  # sequences: what an objective sees of a microbatch has room for so many


@dataclass(frozen=True)
class Budget:
    """The cells of a microbatch: `rows` rows, each with room for the longest sequence."""

    rows: int
    columns: int

    @classmethod
    def of(cls, tokens: int, longest: int, shards: int = 1, across: int = 1) -> "Budget":
        """As many rows of `longest` cells as `tokens` allow, in multiples of `shards` and `across`,
        over which the mesh splits rows and columns."""
        columns = -(-longest // across) * across
        rows = tokens // columns // shards * shards
        if rows < 1:
            raise ValueError(
                f"tokens_per_microbatch={tokens} holds no {shards} rows of the longest prompt and "
                f"response, {columns} tokens: set at least {shards * columns}"
            )
        return cls(rows, columns)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """Which sequences go where: microbatch m has those of `sequences[m]`; -1 is none."""

    sequences: Int[Array, "M S"]
    row: Int[Array, "M S"]
    start: Int[Array, "M S"]  # the cell of its first token
    count: Int[Array, ""]  # microbatches in use


def budget_of(tokens: int, rollout: Rollout) -> Budget:
    """The budget of a rollout's columns on the mesh that is set."""
    longest = rollout.prompt_mask.shape[1] + rollout.response_mask.shape[1] - 1
    return Budget.of(tokens, longest, batch_shards(), sequence_shards())


def plan_of(rollout: Rollout, budget: Budget) -> Plan:
    """`plan` of a rollout's sequences, whose lengths are fetched."""
    return plan(np.asarray(jax.jit(cells_needed)(rollout)), budget)


def plan(lengths: Int[np.ndarray, " B"], budget: Budget) -> Plan:
    """The longest first, each into the first row that has room; rows fill microbatches in order.

    `lengths` are in cells, none above `budget.columns`.
    """
    free = np.full(len(lengths), budget.columns)
    held = np.zeros(len(lengths), int)
    row, start = np.zeros(len(lengths), int), np.zeros(len(lengths), int)
    for sequence in np.argsort(-lengths, kind="stable"):
        found = np.argmax((free >= lengths[sequence]) & (held < MOST_IN_A_ROW))
        row[sequence], start[sequence] = found, budget.columns - free[found]
        free[found] -= lengths[sequence]
        held[found] += 1
    used = int(np.sum(held > 0))
    microbatches, slots = -(-len(lengths) // budget.rows), budget.rows * MOST_IN_A_ROW
    slots = min(slots, len(lengths))
    sequences = np.full((microbatches, slots), -1, np.int32)
    rows, starts = np.zeros_like(sequences), np.zeros_like(sequences)
    for m in range(-(-used // budget.rows)):
        inside = np.flatnonzero(row // budget.rows == m)
        sequences[m, : len(inside)] = inside
        rows[m, : len(inside)] = row[inside] % budget.rows
        starts[m, : len(inside)] = start[inside]
    count = np.int32(-(-used // budget.rows))
    return Plan(*map(jnp.asarray, (sequences, rows, starts, count)))


def cells_needed(rollout: Rollout) -> Int[Array, " B"]:
    """Each sequence's tokens but the last, which predicts nothing; at least its prompt's."""
    samples = len(rollout.response_tokens) // len(rollout.prompt_tokens)
    asked = jnp.repeat(jnp.sum(rollout.prompt_mask, axis=1), samples)
    return constrain(asked + jnp.sum(rollout.response_mask[:, 1:], axis=1), None)


def take(rows: Any, of: Plan, index: int | Int[Array, ""], budget: Budget) -> Any:
    """The sequences of a microbatch, each with a prompt of its own, and where they stand.

    `rows` holds a Batch or a Rollout, and arrays that lead with P prompts or with P*G sequences.
    """
    sequences, row, start = (leaf[index] for leaf in (of.sequences, of.row, of.start))
    total = max(len(leaf) for leaf in jax.tree.leaves(rows))
    chosen = jnp.maximum(sequences, 0)

    def gathered(leaf):
        return constrain(leaf[chosen // (total // len(leaf))], "batch")

    def placed(rollout: Rollout) -> Rollout:
        real = (sequences >= 0)[:, None]

        def recorded(experts):
            return None if experts is None else jnp.where(real[..., None, None], experts, -1)

        fields = vars(rollout) | dict(
            prompt_mask=rollout.prompt_mask & real,
            response_mask=rollout.response_mask & real,
            prompt_experts=recorded(rollout.prompt_experts),
            experts=recorded(rollout.experts),
            packing=Packing(row, start, budget.rows, budget.columns),
        )
        return Rollout(**fields)

    def found(part):
        if isinstance(part, Rollout):
            return placed(part)
        if isinstance(part, Batch):
            return Batch(**vars(part) | {"rollout": placed(part.rollout)})
        return part

    records = (Batch, Rollout)
    taken = jax.tree.map(gathered, rows)
    return jax.tree.map(found, taken, is_leaf=lambda node: isinstance(node, records))


def cells(rollout: Rollout) -> Cells:
    assert rollout.packing is not None
    return cells_of(rollout.prompt_mask, rollout.response_mask, rollout.packing)


def flat(leaf: Array, rollout: Rollout) -> Array:
    """[B, T, ...] -> [N, ...], what the model's states predict; anything where that is nothing."""
    flat = flatten_tokens(leaf)
    return flat if rollout.packing is None else flat[jnp.maximum(cells(rollout).token, 0)]


def back(flat: Array, rollout: Rollout) -> Array:
    """[N, ...] -> [B, T, ...]."""
    if rollout.packing is None:
        return unflatten_tokens(flat, *rollout.response_tokens.shape)
    return flat[jnp.minimum(cells(rollout).predicting, len(flat) - 1)]


def padding(rollout: Rollout) -> Metrics:
    """`update/padding_fraction`: the share of the columns, or cells, that hold no token."""
    (asked, length), (answered, columns) = rollout.prompt_mask.shape, rollout.response_mask.shape
    cells = asked * length + answered * (columns - 1)
    if rollout.packing is not None:
        cells = rollout.packing.rows * rollout.packing.columns
    tokens = jnp.sum(rollout.prompt_mask) + jnp.sum(rollout.response_mask[:, 1:])
    empty = cells - tokens.astype(jnp.float32)
    return {"update/padding_fraction": Mean(empty, jnp.float32(cells))}
