"""The decoder on packed rows, each token among those of its own sequence alone."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dppo_jax.models.config import DecoderConfig
from dppo_jax.models.decoder import Attend, Decoder, row_attend, run_layers
from dppo_jax.models.moe import Experts, Load
from dppo_jax.models.ring import split_row_attention
from dppo_jax.records import Packing
from dppo_jax.sharding import flatten_tokens, sequence_shards, unflatten_tokens


class Cells(NamedTuple):
    """Between a token of a sequence and its cell, of N = rows x columns; N or -1 is none.

    Cells and tokens are numbered as `sharding.flatten_tokens` lays them out.
    """

    fed: Int[Array, "B S"]  # of the tokens of prompt and response
    predicting: Int[Array, "B T"]  # the cell that predicts each response token
    token: Int[Array, " N"]  # what each cell predicts: an index into the flattened [B, T]


def cells_of(
    prompt_mask: Bool[Array, "B L"], response_mask: Bool[Array, "B T"], packing: Packing
) -> Cells:
    """The cells of sequences that begin where `packing` says, without their padding."""
    nowhere = packing.rows * packing.columns
    first = packing.row * packing.columns + packing.start
    # A response's last token is predicted and predicts nothing.
    fed = jnp.concatenate([prompt_mask, response_mask[:, 1:]], axis=1)
    cells = first[:, None] + jnp.cumsum(fed, axis=1) - 1
    number = unflatten_tokens(jnp.arange(nowhere), packing.rows, packing.columns).reshape(-1)

    def numbered(cells, used):
        return jnp.where(used, number[jnp.minimum(cells, nowhere - 1)], nowhere)

    lengths = jnp.sum(prompt_mask, axis=1)
    predicting = (first + lengths - 1)[:, None] + jnp.arange(response_mask.shape[1])
    predicting = numbered(predicting, response_mask)
    tokens = unflatten_tokens(jnp.arange(response_mask.size), *response_mask.shape)
    token = jnp.full(nowhere, -1).at[predicting].set(tokens, mode="drop")
    return Cells(numbered(cells, fed), predicting, token)


def split_row_attend(config: DecoderConfig, segments: Int[Array, "P N"]) -> Attend:
    """`row_attend` where the mesh splits columns."""

    def attend(q, k, v, window):
        return split_row_attention(
            q, k, v, segments,
            scale=config.attention_scale, soft_cap=config.attention_soft_cap, window=window,
        )  # fmt: skip

    return attend


def packed_states(
    decoder: Decoder,
    prompt_tokens: Int[Array, "B L"],
    prompt_mask: Bool[Array, "B L"],
    response_tokens: Int[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    packing: Packing,
    replayed: Experts | None = None,
) -> tuple[Float[Array, "N D"], Experts | None, Load | None]:
    """`response_states` of sequences with a prompt each, as the hidden states of the cells."""
    cells = cells_of(prompt_mask, response_mask, packing).fed
    shape = packing.rows, packing.columns

    def laid(values, empty):  # [B, S, ...] -> [rows, columns, ...]
        more = values.shape[2:]
        room = jnp.full((packing.rows * packing.columns, *more), empty, values.dtype)
        return unflatten_tokens(room.at[cells].set(values, mode="drop"), *shape)

    inside = cells < packing.rows * packing.columns
    place = jnp.cumsum(inside, axis=1) - 1
    segments = laid(jnp.broadcast_to(1 + jnp.arange(len(cells))[:, None], cells.shape), 0)
    experts = None
    if replayed is not None:
        experts = laid(jnp.concatenate([replayed.prompt, replayed.response[:, :-1]], axis=1), -1)
    c = decoder.config
    hidden, _, native, load = run_layers(
        decoder,
        laid(jnp.concatenate([prompt_tokens, response_tokens[:, :-1]], axis=1), 0),
        laid(place, 0),
        split_row_attend(c, segments) if sequence_shards() > 1 else row_attend(c, segments),
        experts,
        segments > 0,
    )
    flat = flatten_tokens(hidden)
    if native is None:
        return flat, None, None
    chosen = flatten_tokens(native)[jnp.minimum(cells, len(flat) - 1)]
    length = prompt_tokens.shape[1]
    response = jnp.pad(chosen[:, length:], ((0, 0), (0, 1), (0, 0), (0, 0)))
    return flat, Experts(chosen[:, :length], response).only(prompt_mask, response_mask), load
