"""A decoder with adapters as pure functions: only the adapters are trained, the base stays.

    train.train.lora = @lora.LoraConfig()

Its parameters are {"base": of the plain `Model`, "adapters": what a gradient step changes}. They
are never merged while a run lasts: sampling, scoring and update compute the same x·W + s·(x·A)·B,
so that the sampler needs no second copy of the base and its policy is the trainer's.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from dppo_jax.models.adapters import A, B, LoraConfig, low_rank
from dppo_jax.models.config import DecoderConfig
from dppo_jax.models.decoder import Decoder, Model, Params, axes_of

__all__ = ["LoraConfig", "LoraModel", "merged"]


class LoraModel(Model):
    """`Model` whose `bind` takes base and adapters, or the base alone: the adapters are off then.

    `init`, `abstract_params` and `logical_axes` are the base's.
    """

    def __init__(self, config: DecoderConfig, lora: LoraConfig):
        super().__init__(config)
        of_experts = {"gate", "up", "down"} & set(lora.names)
        if config.experts and of_experts and lora.dropout:
            raise ValueError(
                f"dropout={lora.dropout}: adapters of experts have none; set 0, or leave "
                f"{', '.join(sorted(of_experts))} out of targets"
            )
        self.lora, self.dropout = lora, lora.dropout > 0
        abstract = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0), lora))
        self._adapted_graphdef, self._adapted = nnx.split(abstract)

    def in_dtype(self, dtype: str) -> "LoraModel":
        return LoraModel(dataclasses.replace(self.config, dtype=dtype), self.lora)

    def policy(self, params: Params, frozen: Params | None = None, key: Any = None) -> Params:
        """What `bind` takes: the adapters `params` over the base `frozen`; `key` is dropout's."""
        whole = {"base": frozen, "adapters": params}
        return whole if key is None else whole | {"dropout": key}

    def copied(self, policy: Params) -> Params:
        if "adapters" not in policy:
            return super().copied(policy)
        return policy | {"adapters": super().copied(policy["adapters"])}

    def bind(self, params: Params) -> Decoder:
        if "adapters" not in params:
            return super().bind(params)
        base, adapters = params["base"], params["adapters"]
        joined = base | adapters | {"blocks": base["blocks"] | adapters.get("blocks", {})}
        state = jax.tree.map(lambda leaf: leaf, self._adapted)
        nnx.replace_by_pure_dict(state, joined)
        decoder = nnx.merge(self._adapted_graphdef, state)
        if "dropout" in params:
            keys = jax.random.split(params["dropout"], self.config.layers)
            decoder.blocks.dropout_key = nnx.Param(keys)
        return decoder

    def init_adapters(self, key: Array) -> Params:
        """Fresh float32 adapters, which change nothing yet."""
        return _adapters_in(nnx.state(Decoder(self.config, nnx.Rngs(params=key), self.lora)))

    @property
    def abstract_adapters(self) -> Params:
        """Shapes and dtypes of the adapters."""
        return _adapters_in(self._adapted)

    @property
    def adapter_axes(self) -> Params:
        """The adapters' tree with a tuple of logical axis names for each."""
        return _only_adapters(axes_of(self._adapted))

    @property
    def policy_axes(self) -> Params:
        return self.policy(self.adapter_axes, self.logical_axes)


def merged(model: LoraModel, params: Params) -> Params:
    """The base's parameters with W + s·A·B in the place of each adapted W, one after another."""
    base, adapters = params["base"], params["adapters"]
    out = {**base, "blocks": dict(base["blocks"])}
    for tree, into in ((adapters, out), (adapters.get("blocks", {}), out["blocks"])):
        for name in [key.removesuffix(A) for key in tree if key.endswith(A)]:
            factors = tree[name + A], tree[name + B]
            if name != "unembedding":
                into[name] = _plus(into[name], *factors, model.lora.scale, False)
                continue
            if model.config.tied_embeddings:
                raise ValueError(
                    "the unembedding's adapter cannot be merged into a model that ties it to the "
                    "embedding: leave unembedding out of targets, or keep the adapter apart"
                )
            into[name] = _plus(into[name], *factors, model.lora.scale, True)
    return out


@jax.jit
def _sum(w, delta):
    return (w.astype(jnp.float32) + delta).astype(w.dtype)


def _plus(w, a, b, scale: float, transposed: bool):
    delta = low_rank(a, b, scale)
    return _sum(w, jnp.swapaxes(delta, -1, -2) if transposed else delta)


def _adapters_in(state: Any) -> Params:
    return _only_adapters(nnx.to_pure_dict(state))


def _only_adapters(tree: Params) -> Params:
    """The part of a decoder's parameters that adapters are."""
    kept = {name: leaf for name, leaf in tree.items() if name.endswith((A, B))}
    blocks = {name: leaf for name, leaf in tree["blocks"].items() if name.endswith((A, B))}
    return kept | ({"blocks": blocks} if blocks else {})
