"""A pre-norm decoder in Flax NNX, its layers stacked and scanned; `config` makes the family.

Split it once with `nnx.split`; `Model` does, and `full_forward` and `response_states` are then pure
functions of the parameters. `sampling` walks the same `Block`s one token at a
time with a cache.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dppo_jax.kernels import tiles
from dppo_jax.models.adapters import LoraConfig, adapter_of, add_adapter
from dppo_jax.models.attention import EVERYTHING, Prefix, attention, soft_capped
from dppo_jax.models.block import Block, norm_scale, normed, parameter
from dppo_jax.models.config import DecoderConfig
from dppo_jax.models.fsdp import looked_up
from dppo_jax.models.fused_attention import Columns, choose, row_attention
from dppo_jax.models.moe import Experts, Load
from dppo_jax.models.ring import split_attention
from dppo_jax.models.rope import Rope, rotary_table
from dppo_jax.sharding import constrain, flatten_tokens, sequence_shards, unflatten_tokens

Params = dict[str, Any]
Window = int | Array | None  # one for all layers, or the layer's own inside a scan
# q, k, v [P, N, heads, d], the layer's window -> [P, N, heads * d]
Attend = Callable[[Array, Array, Array, Window], Array]


class Decoder(nnx.Module):
    """Embedding, `layers` stacked blocks (leading axis of each of their parameters), norm, head."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, lora: LoraConfig | None = None):
        c = config
        self.config, self.lora = config, lora
        scale = c.width**-0.5
        self.embedding = parameter(rngs, (c.vocab_size, c.width), scale, ("vocab", "embed"))
        if not c.tied_embeddings:
            self.unembedding = parameter(rngs, (c.vocab_size, c.width), scale, ("vocab", "embed"))
        self.final_norm = norm_scale(c, c.width)

        @nnx.split_rngs(splits=c.layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs):
            return Block(c, rngs, lora)

        self.blocks = stack(rngs)
        if lora and "unembedding" in lora.names:
            shape, axes = (c.width, c.vocab_size), ("embed", "vocab")
            add_adapter(self, "unembedding", shape, axes, lora, rngs)

    def embed(self, tokens: Int[Array, "*N"]) -> Float[Array, "*N D"]:
        c = self.config
        table = self.embedding[...].astype(jnp.float32)
        x = looked_up(tokens, table, self.embedding.axes).astype(c.dtype)
        return x * jnp.asarray(c.width**0.5, c.dtype) if c.scaled_embeddings else x

    def unembedding_matrix(self) -> Float[Array, "V D"]:
        return self.stored_unembedding().astype(self.config.dtype)

    def stored_unembedding(self) -> Float[Array, "V D"]:
        """In the parameters' precision, for those who round it themselves.

        With its adapter, if any, merged: the head takes one matrix. Its input has no dropout.
        """
        tied = self.config.tied_embeddings
        stored = (self.embedding if tied else self.unembedding)[...]
        adapter = adapter_of(self, "unembedding")
        return stored if adapter is None else stored + adapter.merged().T

    def normed(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        return normed(self.config, x, self.final_norm)

    def logits(self, hidden: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
        """float32, under the final soft-cap; training never makes them (`kernels.head`)."""
        matrix = self.unembedding_matrix()
        z = jnp.dot(hidden, matrix.T, preferred_element_type=jnp.float32)
        return soft_capped(z, self.config.final_soft_cap)


def positions_of(mask: Bool[Array, "*B S"]) -> Int[Array, "*B S"]:
    """Each token's position among the real tokens of its row; 0 at left padding."""
    return jnp.maximum(jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1, 0)


def rope_tables(config: DecoderConfig, length: int) -> list[Rope]:
    """Rotations [length, 1, d/2]: the first is of global layers, the last of local ones."""
    c = config
    tables = [rotary_table(length, c.head_size, c.rope_theta, c.rope_scaling)]
    if c.local_rope_theta is not None:
        tables.append(rotary_table(length, c.head_size, c.local_rope_theta))
    return tables


class _Kind(NamedTuple):
    """What tells a local layer from a global one inside the scan."""

    window: Int[Array, " layers"]
    local: Bool[Array, " layers"]


def _kinds(config: DecoderConfig) -> _Kind | None:
    """The layers' kinds where they differ; None, and no cost, where one window serves all."""
    windows = config.windows
    if len(set(windows)) == 1:
        return None
    return _Kind(
        jnp.array([EVERYTHING if w is None else w for w in windows], jnp.int32),
        jnp.array([w is not None for w in windows]),
    )


def run_layers(
    decoder: Decoder,
    tokens: Int[Array, "P N"],
    positions: Int[Array, "P N"],
    attend: Attend,
    replayed: Int[Array, "P N layers k"] | None = None,
    real: Bool[Array, "P N"] | None = None,
    longest: int | None = None,
):
    """Hidden states [P, N, D] after the final norm, keys, values [layers, P, N, Hkv, d], the
    experts that the routers choose [P, N, layers, k] (`replayed` ones take their place), and their
    load by the `real` tokens. Positions are below `longest`, or a row's columns."""
    c = decoder.config
    tables = rope_tables(c, longest or tokens.shape[1])
    flat = flatten_tokens(positions)
    ropes = [(cos[flat], sin[flat]) for cos, sin in tables]
    graphdef, stacked = nnx.split(decoder.blocks)
    kinds = _kinds(c)
    counted = None if real is None else flatten_tokens(real)
    if replayed is not None:
        replayed = jnp.moveaxis(flatten_tokens(replayed), 1, 0)

    def layer(x, xs):
        params, kind, experts = xs
        block = nnx.merge(graphdef, params)
        window: Window
        if kind is None:
            window, rope = c.windows[0], ropes[0 if c.windows[0] is None else -1]
        else:
            window = kind.window
            rope = jax.tree.map(lambda *of: jnp.where(kind.local, of[-1], of[0]), *ropes)
        q, k, v = block.queries_keys_values(x, rope)
        q, k, v = (unflatten_tokens(t, *tokens.shape) for t in (q, k, v))
        attended = flatten_tokens(attend(q, k, v, window))
        x, native, load = block.finish_routed(x, attended, experts, counted)
        return constrain(x, "tokens", "width"), ((k, v), native, load)

    if c.remat:
        layer = jax.checkpoint(layer, policy=getattr(jax.checkpoint_policies, c.remat_policy))
    x = constrain(decoder.embed(flatten_tokens(tokens)), "tokens", "width")
    # XLA's CPU backend copies every stacked residual of a rolled loop: a few layers unroll there.
    unroll = c.layers if c.layers <= 8 and tiles.target().platform == "cpu" else 1
    each = (stacked, kinds, replayed)
    x, (keys_values, native, load) = jax.lax.scan(layer, x, each, unroll=unroll)
    if native is not None:
        native = unflatten_tokens(jnp.moveaxis(native, 0, 1), *tokens.shape)
    return unflatten_tokens(decoder.normed(x), *tokens.shape), keys_values, native, load


def _attention(config: DecoderConfig, q, k, v, mask, window, prefix=None, segments=None):
    return attention(
        q, k, v, mask, prefix, segments,
        scale=config.attention_scale, soft_cap=config.attention_soft_cap, window=window,
    )  # fmt: skip


def _by_kernel(config: DecoderConfig, q, k, v, segments, columns: Columns, window: Window):
    """The rows' attention by a kernel, or None where XLA's operations are the choice."""
    name = choose(config).name
    if name == "xla":
        return None
    c, ids = config, segments.astype(jnp.int32)
    return row_attention(
        name, q, k, v, ids, columns, scale=c.attention_scale, soft_cap=c.attention_soft_cap,
        window=window, windows=c.windows,
    )  # fmt: skip


def row_attend(config: DecoderConfig, segments: Int[Array, "P N"]) -> Attend:
    """Each token of a row to those before it in its own segment; segment 0 is padding."""

    def attend(q, k, v, window):
        # Whole rows for whoever attends, where the mesh splits columns.
        q, k, v = (
            constrain(t, "batch", None, axis, None)
            for t, axis in ((q, "heads"), (k, "kv_heads"), (v, "kv_heads"))
        )
        attended = _by_kernel(config, q, k, v, segments, Columns(segments.shape[1]), window)
        if attended is not None:
            return attended
        q, k, v, own = (t[:, None] for t in (q, k, v, segments))
        return _attention(config, q, k, v, own > 0, window, segments=own)[:, 0]

    return attend


def full_forward(decoder: Decoder, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]):
    """Left-padded sequences at once: hidden [B, S, D], and keys, values [layers, B, S, Hkv, d]."""
    return routed_forward(decoder, tokens, mask)[:2]


def routed_forward(decoder: Decoder, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]):
    """`full_forward`, and each token's experts [B, S, layers, k]; None where there are none."""

    attend = row_attend(decoder.config, mask.astype(jnp.int32))
    return run_layers(decoder, tokens, positions_of(mask), attend)[:3]


def response_states(
    decoder: Decoder,
    prompt_tokens: Int[Array, "P L"],
    prompt_mask: Bool[Array, "P L"],
    response_tokens: Int[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    replayed: Experts | None = None,
) -> tuple[Float[Array, "B T D"], Experts | None, Load | None]:
    """The hidden state that predicts each response token, the experts that the routers choose, and
    their load by the tokens that are fed.

    Row p*G + g answers prompt p. `replayed` experts take the chosen ones' place. A prompt's tokens
    go through the layers once for its G responses, each of which attends to them. A row of
    activations is a prompt followed by its responses, so that rows stay whole on the devices that
    hold them. A response's last token is predicted and predicts nothing.
    """
    if sequence_shards() > 1:
        return _split_response_states(
            decoder, prompt_tokens, prompt_mask, response_tokens, response_mask, replayed
        )
    (prompts, length), (batch, new) = prompt_tokens.shape, response_tokens.shape
    samples, fed = batch // prompts, new - 1
    lengths = positions_of(prompt_mask)[:, -1:, None] + 1
    fed_mask = response_mask[:, :-1].reshape(prompts, samples, fed)
    fed_tokens = response_tokens[:, :-1].reshape(prompts, samples * fed)
    fed_positions = (lengths + positions_of(fed_mask)).reshape(prompts, -1)
    whole_mask = jnp.concatenate([prompt_mask, fed_mask.reshape(prompts, samples * fed)], axis=1)
    columns = Columns(length, samples, fed)

    def attend(q, k, v, window):
        attended = _by_kernel(decoder.config, q, k, v, whole_mask, columns, window)
        if attended is not None:
            return attended
        # The transpose of a split is a concatenation, that of slices a sum of padded arrays.
        asked, theirs = zip(*(jnp.split(t, [length], axis=1) for t in (q, k, v)), strict=True)
        asked_q, asked_k, asked_v = (t[:, None] for t in asked)
        own = _attention(decoder.config, asked_q, asked_k, asked_v, prompt_mask[:, None], window)
        if not fed:  # responses of one token at most
            return own[:, 0]
        prefix = Prefix(asked[1], asked[2], prompt_mask)
        q, k, v = (t.reshape(prompts, samples, fed, *t.shape[2:]) for t in theirs)
        theirs = _attention(decoder.config, q, k, v, fed_mask, window, prefix)
        return jnp.concatenate([own[:, 0], theirs.reshape(prompts, samples * fed, -1)], axis=1)

    experts = None
    if replayed is not None:
        theirs = replayed.response[:, :-1]
        theirs = theirs.reshape(prompts, samples * fed, *theirs.shape[2:])
        experts = jnp.concatenate([replayed.prompt, theirs], axis=1)
    tokens = jnp.concatenate([prompt_tokens, fed_tokens], axis=1)
    positions = jnp.concatenate([positions_of(prompt_mask), fed_positions], axis=1)
    hidden, _, native, load = run_layers(
        decoder, tokens, positions, attend, experts, whole_mask, length + new
    )
    first = jnp.repeat(hidden[:, length - 1], samples, axis=0)
    later = hidden[:, length:].reshape(batch, fed, hidden.shape[-1])
    states = jnp.concatenate([first[:, None], later], axis=1)
    if native is None:
        return states, None, None
    own = native[:, length:].reshape(batch, fed, *native.shape[2:])
    chosen = Experts(native[:, :length], jnp.pad(own, ((0, 0), (0, 1), (0, 0), (0, 0))))
    return states, chosen.only(prompt_mask, response_mask), load


def _split_response_states(
    decoder: Decoder,
    prompt_tokens: Int[Array, "P L"],
    prompt_mask: Bool[Array, "P L"],
    response_tokens: Int[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    replayed: Experts | None,
) -> tuple[Float[Array, "B T D"], Experts | None, Load | None]:
    """`response_states` on a mesh whose axis `sequence` splits L and T, which it divides.

    A response is fed from the prompt's last token on, so that each of its T columns predicts its
    own token and no hidden state has to move to another device.
    """
    (prompts, length), (batch, new) = prompt_tokens.shape, response_tokens.shape
    shards, samples = sequence_shards(), batch // prompts

    def rows(asked, answers):  # [P, L], [P, G, T] -> [P, N]: a device's piece of every sequence
        more = asked.shape[2:]
        asked = asked.reshape(prompts, shards, -1, *more)
        answers = answers.reshape(prompts, samples, shards, -1, *more).swapaxes(1, 2)
        whole = jnp.concatenate([asked, answers.reshape(prompts, shards, -1, *more)], axis=2)
        whole = whole.reshape(prompts, -1, *more)
        return constrain(whole, "batch", "columns", *(None for _ in more))

    def apart(x):  # [P, N, ...] -> [P, L, ...], [B, T, ...]: the inverse of `rows`
        more, cut = x.shape[2:], length // shards
        pieces = x.reshape(prompts, shards, -1, *more)
        asked = pieces[:, :, :cut].reshape(prompts, length, *more)
        answers = pieces[:, :, cut:].reshape(prompts, shards, samples, -1, *more).swapaxes(1, 2)
        return asked, answers.reshape(batch, new, *more)

    def shifted(first, later):  # [P, ...], [B, T, ...] -> [P, G, T, ...]
        more = first.shape[1:]
        first = jnp.broadcast_to(first[:, None, None], (prompts, samples, 1, *more))
        later = later.reshape(prompts, samples, new, *more)
        return jnp.concatenate([first, later[:, :, :-1]], axis=2)

    fed_mask = shifted(jnp.ones(prompts, bool), response_mask)
    last = positions_of(prompt_mask)[:, -1:, None]
    c = decoder.config

    def attend(q, k, v, window):
        return split_attention(
            q, k, v, prompt_mask, fed_mask,
            scale=c.attention_scale, soft_cap=c.attention_soft_cap, window=window,
        )  # fmt: skip

    experts = None
    if replayed is not None:
        experts = rows(replayed.prompt, shifted(replayed.prompt[:, -1], replayed.response))
    hidden, _, native, load = run_layers(
        decoder,
        rows(prompt_tokens, shifted(prompt_tokens[:, -1], response_tokens)),
        rows(positions_of(prompt_mask), last + positions_of(fed_mask)),
        attend,
        experts,
        rows(prompt_mask, fed_mask.at[:, :, 0].set(False)),  # the prompt's last counts once
        length + new,
    )
    states = constrain(apart(hidden)[1], "batch", "columns", None)
    if native is None:
        return states, None, None
    asked, fed = apart(native)  # column t was fed response token t - 1
    chosen = Experts(asked, jnp.roll(fed, -1, axis=1))
    return states, chosen.only(prompt_mask, response_mask), load


class Model:
    """A decoder split once: a static graph, and pure functions from a dict of parameters."""

    dropout = False  # whether the update wants a key in `policy`

    def __init__(self, config: DecoderConfig):
        self.config = config
        abstract = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))
        self._graphdef, self._abstract = nnx.split(abstract)

    def in_dtype(self, dtype: str) -> "Model":
        """The same function of the same parameters, computed in `dtype`."""
        return Model(dataclasses.replace(self.config, dtype=dtype))

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

    def policy(self, params: Params, frozen: Params | None = None, key: Any = None) -> Params:
        """What `bind` takes, of the trained parameters and of those that stay (`LoraModel`)."""
        return params

    def copied(self, policy: Params) -> Params:
        """A policy that is there when an update has donated its trained parameters."""
        return jax.tree.map(jnp.copy, policy)

    @property
    def logical_axes(self) -> Params:
        """The parameters' tree with a tuple of logical axis names for each."""
        return axes_of(self._abstract)

    policy_axes = logical_axes  # of a `policy`


def axes_of(state: Any) -> Params:
    """The logical axis names of each parameter of a split module."""

    def named(param):
        stacked = param.get_value().ndim - len(param.axes)
        return ("layers",) * stacked + param.axes

    is_param = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    return nnx.to_pure_dict(jax.tree.map(named, state, is_leaf=is_param))
