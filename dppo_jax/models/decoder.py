"""A pre-norm decoder (the Llama and Qwen form) in Flax NNX, its layers stacked and scanned.

Split it once with `nnx.split`; `Model` does, and `full_forward` and `response_states` are then pure
functions of the parameters. `sampling` walks the same `Block`s one token at a
time with a cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dppo_jax.models.attention import Prefix, attention
from dppo_jax.sharding import constrain

Params = dict[str, Any]
Rope = tuple[Array, Array]  # cos, sin
Attend = Callable[[Array, Array, Array], Array]  # q, k, v [P, N, heads, d] -> [P, N, heads * d]


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder. Sharding is chosen elsewhere, by the names in `Block`."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_width: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tied_embeddings: bool = True
    qk_norm: bool = False
    qkv_bias: bool = False
    dtype: str = "float32"  # of activations and matrix products; parameters stay float32
    remat: bool = False  # recompute each layer in the backward pass

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}: "
                "each key-value head serves the same number of query heads"
            )
        if self.head_size % 2:
            raise ValueError(f"head_size={self.head_size} must be even: rope rotates pairs")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r}: use 'float32' or 'bfloat16'")


def _param(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float, axes: tuple[str | None, ...]):
    """A normal-initialised parameter; `axes` name its dimensions for the sharding rules."""
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


def _constant(value: float, size: int, axis: str | None):
    return nnx.Param(jnp.full((size,), value, jnp.float32), axes=(axis,))


def _gathered(param: nnx.Param) -> Array:
    """A parameter for use: whole along `embed`, which only its storage splits (FSDP)."""
    axes = (None if axis == "embed" else axis for axis in param.axes)
    return constrain(param[...], *axes)


def rms_norm(x: Float[Array, "*N D"], scale: Float[Array, " D"], eps: float):
    """x / rms(x) · scale, statistics in float32 (Zhang & Sennrich, arXiv 1910.07467)."""
    wide = x.astype(jnp.float32)
    normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normal * scale).astype(x.dtype)


def rotary_table(length: int, head_size: int, theta: float) -> Rope:
    """cos and sin [length, 1, head_size/2] of each position's rotation (arXiv 2104.09864).

    A constant of the program: XLA's CPU backend would compute them anew in every layer.
    """
    frequency = np.float32(theta) ** (-np.arange(0, head_size, 2, dtype=np.float32) / head_size)
    angle = np.arange(length, dtype=np.float32)[:, None, None] * frequency
    return jnp.asarray(np.cos(angle)), jnp.asarray(np.sin(angle))


def rotate(x: Float[Array, "*N H d"], rope) -> Float[Array, "*N H d"]:
    """Rotates the pairs (i, i + d/2), the half-split order of Hugging Face checkpoints."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class Block(nnx.Module):
    """One layer, on flat activations [tokens, width]; whoever calls it does the attention."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        c = config
        into, out = c.width**-0.5, (2 * c.layers) ** -0.5
        queries, keys = c.heads * c.head_size, c.kv_heads * c.head_size
        self.config = config
        self.attention_norm = _constant(1.0, c.width, None)
        self.q = _param(rngs, (c.width, queries), into, ("embed", "heads"))
        self.k = _param(rngs, (c.width, keys), into, ("embed", "kv_heads"))
        self.v = _param(rngs, (c.width, keys), into, ("embed", "kv_heads"))
        self.o = _param(rngs, (queries, c.width), queries**-0.5 * out, ("heads", "embed"))
        self.mlp_norm = _constant(1.0, c.width, None)
        self.gate = _param(rngs, (c.width, c.mlp_width), into, ("embed", "mlp"))
        self.up = _param(rngs, (c.width, c.mlp_width), into, ("embed", "mlp"))
        self.down = _param(rngs, (c.mlp_width, c.width), c.mlp_width**-0.5 * out, ("mlp", "embed"))
        if c.qkv_bias:
            self.q_bias = _constant(0.0, queries, "heads")
            self.k_bias = _constant(0.0, keys, "kv_heads")
            self.v_bias = _constant(0.0, keys, "kv_heads")
        if c.qk_norm:
            self.q_norm = _constant(1.0, c.head_size, None)
            self.k_norm = _constant(1.0, c.head_size, None)

    def queries_keys_values(self, x: Float[Array, "N D"], rope):
        """q [N, heads, d], and k, v [N, kv_heads, d], rotated to their positions."""
        c = self.config
        y = rms_norm(x, self.attention_norm[...], c.norm_eps)
        q, k, v = (y @ _gathered(w).astype(y.dtype) for w in (self.q, self.k, self.v))
        if c.qkv_bias:
            q, k, v = (
                t + b[...].astype(t.dtype)
                for t, b in ((q, self.q_bias), (k, self.k_bias), (v, self.v_bias))
            )
        q, k, v = (t.reshape(len(x), -1, c.head_size) for t in (q, k, v))
        if c.qk_norm:
            q = rms_norm(q, self.q_norm[...], c.norm_eps)
            k = rms_norm(k, self.k_norm[...], c.norm_eps)
        return rotate(q, rope), rotate(k, rope), v

    def finish(self, x: Float[Array, "N D"], attended: Float[Array, "N HD"]):
        """The residual stream after the attention's projection and the MLP."""
        x = x + attended @ _gathered(self.o).astype(x.dtype)
        y = rms_norm(x, self.mlp_norm[...], self.config.norm_eps)
        gate, up = (y @ _gathered(w).astype(y.dtype) for w in (self.gate, self.up))
        return x + (jax.nn.silu(gate) * up) @ _gathered(self.down).astype(x.dtype)


class Decoder(nnx.Module):
    """Embedding, `layers` stacked blocks (leading axis of each of their parameters), norm, head."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        c = config
        self.config = config
        scale = c.width**-0.5
        self.embedding = _param(rngs, (c.vocab_size, c.width), scale, ("vocab", "embed"))
        if not c.tied_embeddings:
            self.unembedding = _param(rngs, (c.vocab_size, c.width), scale, ("vocab", "embed"))
        self.final_norm = _constant(1.0, c.width, None)

        @nnx.split_rngs(splits=c.layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs):
            return Block(c, rngs)

        self.blocks = stack(rngs)

    def embed(self, tokens: Int[Array, "*N"]) -> Float[Array, "*N D"]:
        return _gathered(self.embedding)[tokens].astype(self.config.dtype)

    def unembedding_matrix(self) -> Float[Array, "V D"]:
        c = self.config
        matrix = self.embedding if c.tied_embeddings else self.unembedding
        return matrix[...].astype(c.dtype)

    def normed(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        return rms_norm(x, self.final_norm[...], self.config.norm_eps)


def positions_of(mask: Bool[Array, "*B S"]) -> Int[Array, "*B S"]:
    """Each token's position among the real tokens of its row; 0 at left padding."""
    return jnp.maximum(jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1, 0)


def _run_layers(
    decoder: Decoder, tokens: Int[Array, "P N"], positions: Int[Array, "P N"], attend: Attend
):
    """Hidden states [P, N, D] after the final norm, and keys, values [layers, P, N, Hkv, d]."""
    c = decoder.config
    # No position exceeds the columns of a row.
    cos, sin = rotary_table(tokens.shape[1], c.head_size, c.rope_theta)
    rope = cos[positions.reshape(-1)], sin[positions.reshape(-1)]
    graphdef, stacked = nnx.split(decoder.blocks)

    def layer(x, params):
        block = nnx.merge(graphdef, params)
        q, k, v = block.queries_keys_values(x, rope)
        q, k, v = (t.reshape(*tokens.shape, *t.shape[1:]) for t in (q, k, v))
        x = block.finish(x, attend(q, k, v).reshape(len(x), -1))
        return constrain(x, "batch", None), (k, v)

    if c.remat:
        layer = jax.checkpoint(layer)
    x = constrain(decoder.embed(tokens.reshape(-1)), "batch", None)
    # XLA's CPU backend copies every stacked residual of a rolled loop; a few layers unroll.
    x, keys_values = jax.lax.scan(layer, x, stacked, unroll=c.layers if c.layers <= 8 else 1)
    return decoder.normed(x).reshape(*tokens.shape, c.width), keys_values


def full_forward(decoder: Decoder, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]):
    """Left-padded sequences at once: hidden [B, S, D], and keys, values [layers, B, S, Hkv, d]."""

    def attend(q, k, v):
        q, k, v = (t[:, None] for t in (q, k, v))
        return attention(q, k, v, mask[:, None])

    return _run_layers(decoder, tokens, positions_of(mask), attend)


def response_states(
    decoder: Decoder,
    prompt_tokens: Int[Array, "P L"],
    prompt_mask: Bool[Array, "P L"],
    response_tokens: Int[Array, "B T"],
    response_mask: Bool[Array, "B T"],
) -> Float[Array, "B T D"]:
    """The hidden state that predicts each response token; row p*G + g answers prompt p.

    A prompt's tokens go through the layers once for its G responses, each of which attends to
    them. A row of activations is a prompt followed by its responses, so that rows stay whole on
    the devices that hold them. A response's last token is predicted and predicts nothing.
    """
    (prompts, length), (batch, new) = prompt_tokens.shape, response_tokens.shape
    samples, fed = batch // prompts, new - 1
    lengths = positions_of(prompt_mask)[:, -1:, None] + 1
    fed_mask = response_mask[:, :-1].reshape(prompts, samples, fed)
    fed_tokens = response_tokens[:, :-1].reshape(prompts, samples * fed)
    fed_positions = (lengths + positions_of(fed_mask)).reshape(prompts, -1)

    def attend(q, k, v):
        def responses(t):
            return t[:, length:].reshape(prompts, samples, fed, *t.shape[2:])

        asked_q, asked_k, asked_v = (t[:, None, :length] for t in (q, k, v))
        own = attention(asked_q, asked_k, asked_v, prompt_mask[:, None])
        prefix = Prefix(k[:, :length], v[:, :length], prompt_mask)
        q, k, v = (responses(t) for t in (q, k, v))
        theirs = attention(q, k, v, fed_mask, prefix)
        return jnp.concatenate([own[:, 0], theirs.reshape(prompts, samples * fed, -1)], axis=1)

    hidden, _ = _run_layers(
        decoder,
        jnp.concatenate([prompt_tokens, fed_tokens], axis=1),
        jnp.concatenate([positions_of(prompt_mask), fed_positions], axis=1),
        attend,
    )
    first = jnp.repeat(hidden[:, length - 1], samples, axis=0)
    return jnp.concatenate([first[:, None], hidden[:, length:].reshape(batch, fed, -1)], axis=1)


class Model:
    """A decoder split once: a static graph, and pure functions from a dict of parameters."""

    def __init__(self, config: DecoderConfig):
        self.config = config
        abstract = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))
        self._graphdef, self._abstract = nnx.split(abstract)

    def init(self, key: Array) -> Params:
        """Fresh float32 parameters; jit with out_shardings to have them born sharded."""
        return nnx.to_pure_dict(nnx.state(Decoder(self.config, nnx.Rngs(params=key))))

    def bind(self, params: Params) -> Decoder:
        """The module that these parameters make."""
        state = jax.tree.map(lambda leaf: leaf, self._abstract)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graphdef, state)

    @property
    def abstract_params(self) -> Params:
        """Shapes and dtypes of the parameters."""
        return nnx.to_pure_dict(self._abstract)

    @property
    def logical_axes(self) -> Params:
        """The parameters' tree with a tuple of logical axis names for each."""

        def axes_of(param):
            stacked = param.get_value().ndim - len(param.axes)
            return ("layers",) * stacked + param.axes

        is_param = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
        return nnx.to_pure_dict(jax.tree.map(axes_of, self._abstract, is_leaf=is_param))
