"""Parameters from and to the tensors of a Hugging Face folder: the names as data, then the moves.

Ours are stacked over layers, and matrices are [in, out]; theirs are one tensor a layer (and
expert), and matrices are [out, in].
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dppo_jax.models.decoder import Model, Params
from dppo_jax.models.hf_files import Stored, stored_tensors, write_tensors

OUTSIDE = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "unembedding": "lm_head.weight",
}
LAYER = "model.layers.{}."
IN_LAYER = {
    "attention_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
# Gemma 2 and 3 call the norm after the attention by the name of Llama's before the MLP.
WITH_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
    "post_mlp_norm": "post_feedforward_layernorm.weight",
}
WITH_EXPERTS = {
    "router": "mlp.gate.weight",
    "gate": "mlp.experts.{}.gate_proj.weight",
    "up": "mlp.experts.{}.up_proj.weight",
    "down": "mlp.experts.{}.down_proj.weight",
}
# Buffers that old checkpoints hold beside their parameters.
NO_PARAMETERS = (".rotary_emb.inv_freq",)


class Leaf(NamedTuple):
    """One of our parameters, and the tensors that it is stacked from."""

    path: tuple[str, ...]
    shape: tuple[int, ...]  # of one of those tensors, as stored
    transposed: bool
    names: dict[str, tuple[int, ...]]  # theirs -> the index into our leading axes


def leaves_of(model: Model) -> list[Leaf]:
    """Every parameter of the model with the names of its tensors, in the order of the tree."""
    c = model.config
    names = (
        IN_LAYER | (WITH_POST_NORMS if c.post_norms else {}) | (WITH_EXPERTS if c.experts else {})
    )
    leaves = []
    for path, leaf in jax.tree.leaves_with_path(model.abstract_params):
        keys = tuple(str(key.key) for key in path)
        if keys[0] != "blocks":
            leaves.append(Leaf(keys, leaf.shape, False, {OUTSIDE[keys[0]]: ()}))
            continue
        name = LAYER + names[keys[1]]
        stacked = name.count("{}")
        indices = itertools.product(*map(range, leaf.shape[:stacked]))
        shape = leaf.shape[stacked:]
        transposed = len(shape) == 2
        leaves.append(
            Leaf(
                keys,
                shape[::-1] if transposed else shape,
                transposed,
                {name.format(*index): index for index in indices},
            )
        )
    return leaves


def check_tensors(found: dict[str, Stored], leaves: list[Leaf], tied: bool, folder: Path) -> None:
    """Raises ValueError naming the first tensor that is missing, of another shape, or too many."""
    expected = {name: leaf.shape for leaf in leaves for name in leaf.names}
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"{folder} lacks the tensor {name}, which its config.json calls for")
        if found[name].shape != shape:
            raise ValueError(
                f"{folder}: {name} has shape {found[name].shape}; its config.json makes it {shape}"
            )
    for name in found:
        if name in expected or name.endswith(NO_PARAMETERS):
            continue
        if tied and name == OUTSIDE["unembedding"]:
            if _same(found[name], found[OUTSIDE["embedding"]]):
                continue
            raise ValueError(
                f"{folder}: {name} differs from the embedding although config.json ties the two"
            )
        raise ValueError(
            f"{folder} holds the tensor {name}, which its config.json has no place for"
        )


def _same(one: Stored, other: Stored) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    ours, theirs = one.view(), other.view()
    return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def read_params(
    folder: str | Path, model: Model, shardings: Any, *, beside: Sequence[str] = ()
) -> Params:
    """The folder's weights as float32 parameters, each born in its shards.

    Tensor by tensor: a process reads the slices that its devices hold from the mapped file and
    moves them to the devices as they are stored; the device transposes and widens them into the
    parameter. Beside the parameters, memory holds one tensor. `shardings` is the tree of
    `model.abstract_params`; tensors called as in `beside` are somebody else's. Raises ValueError,
    in one line, before anything is read, or at the first tensor with a NaN or infinity.
    """
    folder = Path(folder).expanduser()
    stored, leaves = stored_tensors(folder), leaves_of(model)
    found = {name: tensor for name, tensor in stored.items() if name not in beside}
    check_tensors(found, leaves, model.config.tied_embeddings, folder)
    params: Params = {}
    for leaf in leaves:
        where, like = shardings, model.abstract_params
        into = params
        for key in leaf.path:
            where, like = where[key], like[key]
        for key in leaf.path[:-1]:
            into = into.setdefault(key, {})
        shape = like.shape  # type: ignore[attr-defined]
        into[leaf.path[-1]] = _read_leaf(leaf, found, shape, where, folder)
    return params


def _read_leaf(
    leaf: Leaf, found: dict[str, Stored], shape: tuple[int, ...], sharding: Any, folder: Path
) -> jax.Array:
    stacked = len(shape) - len(leaf.shape)
    axes = [*sharding.spec, *(None,) * (len(shape) - len(sharding.spec))][stacked:]
    piece = NamedSharding(sharding.mesh, PartitionSpec(*(axes[::-1] if leaf.transposed else axes)))

    def tensor(name: str) -> jax.Array:
        view = found[name].view()
        return jax.make_array_from_callback(leaf.shape, piece, lambda index: view[index])

    def checked(finite: jax.Array) -> None:
        if not finite:
            raise ValueError(f"{folder}: {name} holds NaN or infinity: download or export it again")

    if not stacked:
        (name,) = leaf.names
        whole, finite = _widened(tensor(name), sharding)
        checked(finite)
        return whole
    whole = jnp.zeros(shape, jnp.float32, device=sharding)
    for name, index in leaf.names.items():
        place = np.array(index, np.int32)
        whole, finite = _placed(whole, tensor(name), place, leaf.transposed)
        # It also waits: transfers run ahead of the copies that free them.
        checked(finite)
    return whole


@functools.partial(jax.jit, static_argnames="sharding")
def _widened(tensor: jax.Array, sharding: NamedSharding) -> tuple[jax.Array, jax.Array]:
    """The parameter, and whether it is finite."""
    whole = jax.lax.with_sharding_constraint(tensor.astype(jnp.float32), sharding)
    return whole, jnp.isfinite(tensor).all()


@functools.partial(jax.jit, static_argnames="transposed", donate_argnums=0)
def _placed(
    whole: jax.Array, tensor: jax.Array, index: jax.Array, transposed: bool
) -> tuple[jax.Array, jax.Array]:
    """`whole` with the tensor at `index` of its leading axes, and whether that is finite."""
    finite = jnp.isfinite(tensor).all()
    tensor = (tensor.T if transposed else tensor).astype(whole.dtype)
    at = [*index, *(0,) * tensor.ndim]
    tensor = tensor.reshape((1,) * len(index) + tensor.shape)
    return jax.lax.dynamic_update_slice(whole, tensor, at), finite


def write_params(folder: Path, model: Model, params: Params, dtype: str, **limits: int) -> None:
    """Writes the parameters as the safetensors files of a Hugging Face folder.

    `dtype` is float32, bfloat16 or float16; `limits` are those of `hf_files.write_tensors`.
    """
    leaves = leaves_of(model)
    shapes = {name: leaf.shape for leaf in leaves for name in leaf.names}

    def tensors() -> Iterator[np.ndarray]:
        for leaf in leaves:
            value = params
            for key in leaf.path:
                value = value[key]
            for index in leaf.names.values():
                yield np.asarray(_stored_form(value, np.array(index, np.int32), leaf, dtype))

    write_tensors(folder, shapes, tensors(), dtype, **limits)


def _stored_form(value: Any, index: np.ndarray, leaf: Leaf, dtype: str) -> jax.Array:
    return _taken(value, index, len(index), leaf.transposed, dtype)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _taken(value, index, stacked: int, transposed: bool, dtype: str) -> jax.Array:
    for axis in range(stacked):
        value = jax.lax.dynamic_index_in_dim(value, index[axis], 0, keepdims=False)
    return (value.T if transposed else value).astype(dtype)
