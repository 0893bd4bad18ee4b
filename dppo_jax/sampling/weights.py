"""A model's weights as decoding reads them: a layer at a time, in each step of a loop."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dppo_jax.kernels import panels
from dppo_jax.kernels.panels import Panels
from dppo_jax.models.block import MATRICES, Block
from dppo_jax.models.decoder import Decoder, Model, Params
from dppo_jax.sharding import constrain

Cut = Callable[[Array], Array | Panels]


class Weights(NamedTuple):
    """A copy of what a model reads for each token."""

    layers: list[Any]
    unembedding: Panels | None  # None: it is read from `outside`
    outside: Params  # all parameters but the layers'; empty beside an unembedding in panels


def _layers(decoder: Decoder) -> list[Any]:
    _, stacked = nnx.split(decoder.blocks)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(decoder.config.layers)]


def _each_matrix(cut: Cut, layer: Any) -> Any:
    def of(path, param: nnx.Param) -> nnx.Variable:
        weight = param[...]
        matrix = path[0].key in MATRICES and isinstance(weight, jax.Array) and weight.ndim == 2
        return param.replace(cut(weight)) if matrix else param

    def is_param(node) -> bool:
        return isinstance(node, nnx.Variable)

    return jax.tree_util.tree_map_with_path(of, layer, is_leaf=is_param)


def bound(model: Model, params: Params, weights: Weights | None) -> tuple[Decoder, list[Block]]:
    """The decoder and its blocks, of these weights; None: of the parameters, cut here, a copy.

    To be asked before a loop, which then reads weights and copies none.
    """
    decoder = model.bind(params | weights.outside if weights else params)
    graphdef, _ = nnx.split(decoder.blocks)
    layers = weights.layers if weights else _layers(decoder)
    return decoder, [nnx.merge(graphdef, layer) for layer in layers]


def unembedding_of(decoder: Decoder, weights: Weights | None) -> Float[Array, "V D"] | Panels:
    """What the sampler's head multiplies with."""
    if weights and weights.unembedding is not None:
        return weights.unembedding.astype(decoder.config.dtype)
    return constrain(decoder.unembedding_matrix(), "vocab", None)


@functools.partial(jax.jit, static_argnames=("model", "cut"))
def copied(params: Params, *, model: Model, cut: Cut | None) -> Weights:
    """A copy of the parameters, each layer's by itself, its matrices cut into panels."""
    decoder = model.bind(params)
    layers = _layers(decoder)
    if cut is not None:
        layers = [_each_matrix(cut, layer) for layer in layers]
    if cut is panels.together:  # apart gains nothing there
        unembedding = cut(decoder.stored_unembedding().T)
        if isinstance(unembedding, Panels):
            return Weights(layers, unembedding, {})
    outside = {name: part for name, part in params.items() if name != "blocks"}
    return Weights(layers, None, jax.tree.map(jnp.copy, outside))


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


def for_decoding(params: Params, model: Model, sequences: int) -> Weights | None:
    """The `weights` to decode so many sequences with: on CPUs a copy made once, which all devices
    share, in `Panels` where each device has it whole; else None.

    Accelerators, whose memory is dear, cut the layers in each call.
    """
    if jax.default_backend() != "cpu":
        return None
    placed = [leaf.sharding for leaf in jax.tree.leaves(params)]
    cut: Cut | None = None
    if all(sharding.is_fully_replicated for sharding in placed):
        few = sequences <= panels.FEW * placed[0].num_devices
        cut = panels.together if few else panels.apart
    return one_copy(copied(params, model=model, cut=cut))
