"""A model's weights as decoding reads them: a layer at a time, in each step of a loop."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dppo_jax.models.block import MATRICES, Block
from dppo_jax.models.decoder import Decoder, Model, Params
from dppo_jax.models.products import PANEL, in_panels

LARGEST = 2**18  # numbers of a matrix in panels


class Weights(NamedTuple):
    """A copy of a model's parameters, for decoding."""

    outside: Params  # of the layers
    layers: list[Any]


def _cut(decoder: Decoder) -> list[Any]:
    _, stacked = nnx.split(decoder.blocks)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(decoder.config.layers)]


def _panelled(layer: Any) -> Any:
    """A layer with its small matrices in panels; of large ones there would be many to compile."""

    def cut(path, param: nnx.Param) -> nnx.Variable:
        weight = param[...]
        matrix = path[0].key in MATRICES and isinstance(weight, jax.Array) and weight.ndim == 2
        fits = matrix and PANEL < weight.shape[1] and weight.size <= LARGEST
        return param.replace(in_panels(weight)) if fits else param

    def is_param(node) -> bool:
        return isinstance(node, nnx.Variable)

    return jax.tree_util.tree_map_with_path(cut, layer, is_leaf=is_param)


def bound(model: Model, params: Params, weights: Weights | None) -> tuple[Decoder, list[Block]]:
    """The decoder and its blocks, of these weights; None: of the parameters, cut here, a copy.

    To be asked before a loop, which then reads weights and copies none.
    """
    decoder = model.bind(params | weights.outside if weights else params)
    graphdef, _ = nnx.split(decoder.blocks)
    layers = weights.layers if weights else _cut(decoder)
    return decoder, [nnx.merge(graphdef, layer) for layer in layers]


@functools.partial(jax.jit, static_argnames=("model", "panels"))
def copied(params: Params, *, model: Model, panels: bool) -> Weights:
    """A copy of the parameters, each layer's by itself, with `panels` in those."""
    layers = _cut(model.bind(params))
    outside = {
        name: jax.tree.map(jnp.copy, part) for name, part in params.items() if name != "blocks"
    }
    return Weights(outside, [_panelled(layer) for layer in layers] if panels else layers)


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


def for_decoding(params: Params, model: Model) -> Weights | None:
    """The `weights` to decode with: on CPUs a copy made once, which all devices share, its layers
    in `Panels` where no mesh splits them; else None.

    Accelerators, whose memory is dear, cut the layers in each call.
    """
    if jax.default_backend() != "cpu":
        return None
    panels = all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
    return one_copy(copied(params, model=model, panels=panels))
