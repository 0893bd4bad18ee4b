"""Attention by the kernels that ship with JAX, and which of them a program takes.

A row is a prompt followed by the responses that share it, as `decoder.response_states` lays it out;
a sequence alone is a row without responses. Which columns see which is static, what is padding, or
another sequence of a packed row, is in the segment ids.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float, Int

from dppo_jax.kernels import tiles
from dppo_jax.models.config import DecoderConfig
from dppo_jax.sharding import mesh_here, spec_of

INTERPRET = False  # tests: splash on a CPU
LANES = 128  # rows are padded to whole tiles
LARGEST_BLOCK = 512


@dataclass(frozen=True)
class Columns:
    """What stands where in a row: `prompt` columns, then `samples` responses of `fed` columns."""

    prompt: int
    samples: int = 0
    fed: int = 0

    @property
    def total(self) -> int:
        return self.prompt + self.samples * self.fed

    def sees(self, query: Any, key: Any, window: Any = None) -> Any:
        """Whether the query's column sees the key's; both are indices, of NumPy or JAX.

        What comes before it of its own sequence, the prompt included; with a `window` that many
        columns, its own the last. Columns after the row's end are one more response.
        """
        fed = max(self.fed, 1)
        (whose_q, at_q), (whose_k, at_k) = (
            ((i - self.prompt) // fed, i - (i >= self.prompt) * ((i - self.prompt) // fed) * fed)
            for i in (query, key)
        )
        seen = ((key < self.prompt) | (whose_q == whose_k)) & (at_k <= at_q)
        return seen if window is None else seen & (at_q - at_k < window)


Attend = Callable[..., Float[Array, "P N H d"]]  # of queries, keys, values and segments
Name = Literal["xla", "splash", "cudnn"]
BEST: dict[str, Name] = {
    "tpu": "splash",
    "gpu": "cudnn",
    "cuda": "cudnn",
}  # by platform, else XLA's


class Choice(NamedTuple):
    """An implementation, and what keeps this program from a better one."""

    name: Name
    reason: str | None = None


def choose(config: DecoderConfig) -> Choice:
    """The implementation of `config.attention` on the platform that is being traced for.

    "auto": splash attention on a TPU, cuDNN's on a GPU, XLA's operations elsewhere and where the
    kernel cannot do what the model asks. ValueError where a name is forced that cannot.
    """
    platform = tiles.target().platform
    if config.attention == "auto":
        best = BEST.get(platform, "xla")
        why = why_not(best, config, platform)
        return Choice("xla", f"{best} attention {why}") if why else Choice(best)
    why = why_not(config.attention, config, platform)
    if why:
        raise ValueError(f'attention="{config.attention}" {why}: use "auto" or "xla"')
    return Choice(config.attention)


def described(config: DecoderConfig) -> str:
    """The choice in words, for people."""
    name, reason = choose(config)
    return f"{name}: {reason}" if reason else name


def why_not(name: Name, config: DecoderConfig, platform: str) -> str | None:
    """What keeps this implementation from this model on this platform, in words."""
    if name == "splash" and platform != "tpu" and not INTERPRET:
        return f"needs a TPU, and this program is for {platform}"
    if name == "cudnn":
        if platform not in ("gpu", "cuda"):
            return f"needs an NVIDIA GPU, and this program is for {platform}"
        if config.dtype != "bfloat16":
            return f"computes in bfloat16, and this model in {config.dtype}"
        if config.attention_soft_cap is not None:
            return "has no soft-cap, and this model needs one"
        if config.head_size % 8 or config.head_size > 128:
            return f"takes head sizes that are multiples of 8 up to 128, not {config.head_size}"
    return None


def row_attention(
    name: Literal["splash", "cudnn"],
    q: Float[Array, "P N H d"],
    k: Float[Array, "P N Hkv d"],
    v: Float[Array, "P N Hkv d"],
    segments: Int[Array, "P N"],
    columns: Columns,
    *,
    scale: float,
    soft_cap: float | None = None,
    window: int | Int[Array, ""] | None = None,
    windows: tuple[int | None, ...] = (),
) -> Float[Array, "P N Hd"]:
    """softmax(soft_capped(q·k·scale))·v over the columns that each sees and that share its segment.

    A traced `window` is one of `windows`, where None is told by a number beyond every row.
    """

    def form(window: int | None) -> Attend:
        if name == "cudnn":
            return by_shard(functools.partial(_by_response, columns, scale, window, "cudnn"))
        return by_shard(functools.partial(_splash_rows, columns, soft_cap, scale, window))

    if name == "cudnn" and not columns.samples:  # where a row may hold several sequences
        out = _by_mask(q, k, v, segments, columns, scale, window, "cudnn")
    elif isinstance(window, jax.Array):
        local = max(w for w in windows if w is not None)
        out = jax.lax.cond(window <= local, form(local), form(None), q, k, v, segments)
    else:
        out = form(window)(q, k, v, segments)
    return out.reshape(*out.shape[:2], -1)


def _by_mask(q, k, v, segments, columns: Columns, scale, window, implementation):
    """`jax.nn.dot_product_attention` under an N x N mask a row."""
    q, k, v, segments = map(_even, (q, k, v, segments))
    at = jnp.arange(q.shape[1])
    mask = columns.sees(at[:, None], at[None, :], window)
    mask &= segments[:, None, :, None] == segments[:, None, None, :]
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=scale, implementation=implementation
    )
    return out[:, : columns.total]


def _even(x):
    """With one more column if need be: JAX 0.10.2 has no gradient of cuDNN's for odd numbers."""
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), *((0, 0),) * (x.ndim - 2)))


def _by_response(columns: Columns, scale, window, implementation, q, k, v, segments):
    """Each response behind its prompt as a sequence of its own: causal, so that no mask is held.

    A row's mask has all its responses' columns against each other, most of them for nothing. A
    prompt has its padding on the left: moved behind the response no token sees it.
    """
    length, samples = columns.prompt, columns.samples
    padding = jnp.repeat(length - jnp.sum(segments[:, :length] > 0, axis=1), samples)

    def apart(x):  # [P, N, ...] -> [P·G, L + F, ...]
        own = x[:, length:].reshape(len(x), samples, columns.fed, *x.shape[2:])
        asked = jnp.broadcast_to(x[:, None, :length], (*own.shape[:2], length, *x.shape[2:]))
        whole = jnp.concatenate([asked, own], axis=2)
        return _rolled(_even(whole.reshape(-1, *whole.shape[2:])), padding)

    out = jax.nn.dot_product_attention(
        *map(apart, (q, k, v)),
        is_causal=True,
        scale=scale,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    out = _rolled(out, -padding)[:, : length + columns.fed]
    out = out.reshape(len(q), samples, -1, *out.shape[2:])
    theirs = out[:, :, length:].reshape(len(q), -1, *out.shape[3:])
    return jnp.concatenate([out[:, 0, :length], theirs], axis=1)


@jax.custom_vjp
def _rolled(x, by):
    """Every row with its columns moved to the left, around its end; `by` is a row's own.

    Its gradient is moved back, where XLA's would be a sum into places.
    """
    at = (jnp.arange(x.shape[1]) + by[:, None]) % x.shape[1]
    return jax.vmap(lambda row, at: row[at])(x, at)


_rolled.defvjp(lambda x, by: (_rolled(x, by), by), lambda by, d_out: (_rolled(d_out, -by), None))


class _RowMask(splash.Mask):
    """`Columns.sees` of a row padded to `length`, block by block."""

    def __init__(self, columns: Columns, length: int, window: int | None):
        self._key = (columns, length, window)

    @property
    def shape(self) -> tuple[int, int]:
        return self._key[1], self._key[1]

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        columns, length, window = self._key
        query, key = (np.arange(length)[part] for part in index)
        return columns.sees(query[:, None], key[None, :], window)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _RowMask) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def by_shard(local: Attend) -> Attend:
    """Attention of whole rows, each device its own rows and heads."""

    def attend(q, k, v, segments):
        mesh = mesh_here()
        if mesh.empty or mesh.size == 1:
            return local(q, k, v, segments)
        heads, keys, rows = (
            spec_of(("batch", None, axis, None)[: x.ndim], mesh, "compute", x.shape)
            for x, axis in ((q, "heads"), (k, "kv_heads"), (segments, None))
        )
        split = jax.shard_map(
            local, in_specs=(heads, keys, keys, rows), out_specs=heads, check_vma=False
        )
        return split(q, k, v, segments)

    return attend


def _splash_rows(columns, soft_cap, scale, window, q, k, v, segments):
    length = q.shape[1]
    unit = LANES if length <= 2 * LARGEST_BLOCK else LARGEST_BLOCK
    padded = -(-length // unit) * unit
    block = next(size for size in (LARGEST_BLOCK, 256, LANES) if padded % size == 0)
    room = ((0, 0), (0, padded - length))
    q, k, v = (jnp.pad(t, (*room, (0, 0), (0, 0))).swapaxes(1, 2) for t in (q * scale, k, v))
    segments = jnp.pad(segments, room)
    mask: splash.Mask = _RowMask(columns, padded, window)
    if not columns.samples:  # which the kernel computes where it needs them
        shape = (padded, padded)
        causal = window is None
        mask = splash.CausalMask(shape) if causal else splash.LocalMask(shape, (window - 1, 0), 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * q.shape[1]),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,  # a kernel of its own: the fused one keeps dq once a block of keys
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=soft_cap,
        interpret=INTERPRET,
    )
    out = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, splash.SegmentIds(ids, ids)))(
        q, k, v, segments
    )
    return out.swapaxes(1, 2)[:, :length]
