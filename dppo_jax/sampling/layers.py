"""A model's weights as decoding reads them: a layer at a time, in each step of a loop."""

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx

from dppo_jax.models.block import Block
from dppo_jax.models.decoder import Decoder, Model, Params

Layers = list[Any]  # the weights of each layer


def _cut(decoder: Decoder) -> Layers:
    _, stacked = nnx.split(decoder.blocks)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(decoder.config.layers)]


def blocks_of(decoder: Decoder, layers: Layers | None) -> list[Block]:
    """The decoder's blocks, of these weights; None: cut here, a copy, of the stacked ones.

    To be asked before a loop, which then reads weights and copies none.
    """
    graphdef, _ = nnx.split(decoder.blocks)
    return [nnx.merge(graphdef, layer) for layer in layers or _cut(decoder)]


@functools.partial(jax.jit, static_argnames="model")
def cut_layers(params: Params, *, model: Model) -> Layers:
    """A copy of each layer's weights."""
    return _cut(model.bind(params))


def one_copy(tree: Any) -> Any:
    """The same arrays, where devices of this process that hold equal parts hold them in one memory.

    For arrays of CPU devices, which share their memory and its caches: decoding reads all weights
    for every token. The arrays must not be donated.
    """

    def shared(x: jax.Array) -> jax.Array:
        first: dict[str, np.ndarray] = {}
        parts = [
            jax.device_put(
                first.setdefault(str(shard.index), np.asarray(shard.data)),
                shard.device,
                may_alias=True,
            )
            for shard in x.addressable_shards
        ]
        return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)

    return jax.tree.map(shared, tree)


def for_decoding(params: Params, model: Model) -> Layers | None:
    """The `layers` to decode with: on CPUs cut once and in one copy, else None.

    Accelerators, whose memory is dear, cut them in each call.
    """
    if jax.default_backend() != "cpu":
        return None
    return one_copy(cut_layers(params, model=model))
