"""One layer of the decoder, on flat activations; whoever calls it does the attention."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from qwix import QArray, dequantize

from dppo_jax.kernels.panels import Panels
from dppo_jax.models.adapters import LoraConfig, adapter_of, add_adapter
from dppo_jax.models.config import DecoderConfig
from dppo_jax.models.expert_parallel import expert_mlps_on_mesh
from dppo_jax.models.fsdp import with_whole
from dppo_jax.models.moe import Load, route, stored_ids
from dppo_jax.models.products import product
from dppo_jax.models.rope import Rope, rotate
from dppo_jax.sharding import constrain

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")  # [..., in, out]; a layer's products

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float, axes: tuple[str | None, ...]):
    """A normal-initialised parameter; `axes` name its dimensions for the sharding rules."""
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


def constant(value: float, size: int, axis: str | None):
    return nnx.Param(jnp.full((size,), value, jnp.float32), axes=(axis,))


def norm_scale(config: DecoderConfig, size: int):
    """The weight of a norm that changes nothing yet."""
    return constant(0.0 if config.unit_offset_norms else 1.0, size, None)


def gathered(param: nnx.Param) -> Array:
    """A parameter for use: whole along `embed`, which only its storage splits (FSDP).

    In the decode view it stays split. An integer one (`rollout_policy.int8_weights`) is
    made floating point here, where it is used: compilers fuse that into the product that reads it.
    """
    value = param[...]
    if not isinstance(value, QArray):
        return constrain(value, *param.axes)
    scale_axes = (a if n > 1 else None for a, n in zip(param.axes, value.scale.shape, strict=True))
    return dequantize(
        QArray(constrain(value.qvalue, *param.axes), constrain(value.scale, *scale_axes))
    )


def in_use(
    function: Callable[[Array, Array], Array],
    x: Array,
    param: nnx.Param,
    dtype: jax.typing.DTypeLike,
) -> Array:
    """function(x, the parameter in `dtype` as `gathered` has it), token by token."""
    value = param[...]
    if isinstance(value, Panels):
        return function(x, value.astype(dtype))
    if isinstance(value, QArray):
        return function(x, gathered(param).astype(dtype))
    # What travels is rounded first, as are the gradients that are summed.
    return with_whole(function, x, value.astype(dtype), param.axes)


def rms_norm(x: Float[Array, "*N D"], scale: Float[Array, " D"], eps: float):
    """x / rms(x) · scale, statistics in float32 (Zhang & Sennrich, arXiv 1910.07467)."""
    wide = x.astype(jnp.float32)
    normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normal * scale).astype(x.dtype)


def normed(config: DecoderConfig, x: Float[Array, "*N D"], weight: nnx.Param):
    """`rms_norm` with the weight as the configuration means it: w, or 1 + w."""
    scale = weight[...].astype(jnp.float32)
    return rms_norm(x, 1.0 + scale if config.unit_offset_norms else scale, config.norm_eps)


class Block(nnx.Module):
    """One layer, on flat activations [tokens, width]; with adapters where `lora` says so."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, lora: LoraConfig | None = None):
        c = config
        into, out = c.width**-0.5, (2 * c.layers) ** -0.5
        queries, keys = c.heads * c.head_size, c.kv_heads * c.head_size
        self.config = config
        self.attention_norm = norm_scale(c, c.width)
        self.q = parameter(rngs, (c.width, queries), into, ("embed", "heads"))
        self.k = parameter(rngs, (c.width, keys), into, ("embed", "kv_heads"))
        self.v = parameter(rngs, (c.width, keys), into, ("embed", "kv_heads"))
        self.o = parameter(rngs, (queries, c.width), queries**-0.5 * out, ("heads", "embed"))
        self.mlp_norm = norm_scale(c, c.width)
        each, axis = ((c.experts,), ("experts",)) if c.experts else ((), ())
        self.gate = parameter(rngs, (*each, c.width, c.mlp_width), into, (*axis, "embed", "mlp"))
        self.up = parameter(rngs, (*each, c.width, c.mlp_width), into, (*axis, "embed", "mlp"))
        down = c.mlp_width**-0.5 * out
        self.down = parameter(rngs, (*each, c.mlp_width, c.width), down, (*axis, "mlp", "embed"))
        if c.experts:
            self.router = parameter(rngs, (c.width, c.experts), into, ("embed", None))
        if c.qkv_bias:
            self.q_bias = constant(0.0, queries, "heads")
            self.k_bias = constant(0.0, keys, "kv_heads")
            self.v_bias = constant(0.0, keys, "kv_heads")
        if c.qk_norm:
            self.q_norm = norm_scale(c, c.head_size)
            self.k_norm = norm_scale(c, c.head_size)
        if c.post_norms:
            self.post_attention_norm = norm_scale(c, c.width)
            self.post_mlp_norm = norm_scale(c, c.width)
        self.lora = lora
        if lora is not None:
            for name in (n for n in lora.names if n != "unembedding"):
                weight = getattr(self, name)
                add_adapter(self, name, weight.shape, weight.axes, lora, rngs)

    def _product(self, x: Float[Array, "N I"], name: str) -> Float[Array, "N O"]:
        """x times the named matrix, and what its adapter adds."""
        out = in_use(product, x, getattr(self, name), x.dtype)
        adapter = adapter_of(self, name)
        return out if adapter is None else out + adapter(x)

    def _of_experts(self, name: str, dtype: jax.typing.DTypeLike) -> Float[Array, "E I O"]:
        """The named matrices as they are stored, in the precision of their products."""
        weights = getattr(self, name)
        return gathered(weights) if isinstance(weights[...], QArray) else weights[...].astype(dtype)

    def queries_keys_values(self, x: Float[Array, "N D"], rope: Rope):
        """q [N, heads, d], and k, v [N, kv_heads, d], rotated to their positions."""
        c = self.config
        y = normed(c, x, self.attention_norm)
        # Twice, as products lie and as attention does: else compilers mix the two while decoding.
        q, k, v = (
            constrain(constrain(self._product(y, name), "tokens", axis), "queries", axis)
            for name, axis in (("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads"))
        )
        if c.qkv_bias:
            q, k, v = (
                t + b[...].astype(t.dtype)
                for t, b in ((q, self.q_bias), (k, self.k_bias), (v, self.v_bias))
            )
        q, k, v = (t.reshape(len(x), -1, c.head_size) for t in (q, k, v))
        if c.qk_norm:
            q, k = normed(c, q, self.q_norm), normed(c, k, self.k_norm)
        return rotate(q, rope), rotate(k, rope), v

    def finish(self, x: Float[Array, "N D"], attended: Float[Array, "N HD"]):
        """The residual stream after the attention's projection and the MLP."""
        return self.finish_routed(x, attended)[0]

    def finish_routed(
        self,
        x: Float[Array, "N D"],
        attended: Float[Array, "N HD"],
        replayed: Int[Array, "N k"] | None = None,
        real: Bool[Array, " N"] | None = None,
    ) -> tuple[Float[Array, "N D"], Int[Array, "N k"] | None, Load | None]:
        """`finish`, the experts that the router chooses (`replayed` ones take their place), and
        their load by the `real` tokens, where these are told."""
        c = self.config
        for rows in ("queries", "groups", "tokens"):  # or partitioners gather it whole
            attended = constrain(attended, rows, "heads")
        out = constrain(self._product(attended, "o").astype(x.dtype), "tokens", "width")
        if c.post_norms:
            out = normed(c, out, self.post_attention_norm)
        x = x + out
        out, routing = self._mlp(normed(c, x, self.mlp_norm), replayed)
        if c.post_norms:
            out = normed(c, out, self.post_mlp_norm)
        if routing is None:
            return x + out, None, None
        native = routing.native.astype(stored_ids(c.experts))
        return x + out, native, None if real is None else routing.load(real)

    def _mlp(self, y: Float[Array, "N D"], replayed: Int[Array, "N k"] | None):
        c = self.config
        activation = ACTIVATIONS[c.activation]
        if c.experts:
            router = gathered(self.router)
            routing = route(y, router, c.experts_per_token, c.normalised_gates, replayed)
            gate, up, down = (self._of_experts(n, y.dtype) for n in ("gate", "up", "down"))
            found = {name: adapter_of(self, name) for name in ("gate", "up", "down")}
            adapters = {name: each.factors() for name, each in found.items() if each}
            out = expert_mlps_on_mesh(
                y, routing.gates, routing.chosen, gate, up, down, activation, adapters
            )
            return out, routing
        gate, up = (constrain(self._product(y, name), "tokens", "mlp") for name in ("gate", "up"))
        # Both are kept for the backward pass, what is between them is not.
        gated = jax.checkpoint(lambda gate, up: activation(gate) * up)(gate, up)
        return constrain(self._product(gated, "down"), "tokens", "width"), None
