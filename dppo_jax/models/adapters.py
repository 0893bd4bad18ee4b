"""Low-rank adapters beside a layer's matrices: what a recipe says of them, and their product."""

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dppo_jax.sharding import constrain

# The matrices that may have an adapter; those of experts have one for each expert.
ADAPTABLE = ("q", "k", "v", "o", "gate", "up", "down", "unembedding")
A, B = "_lora_a", "_lora_b"  # what an adapter's two matrices are called after theirs


@dataclass(frozen=True)
class LoraConfig:
    """Adapters: y = x·W + s·(x·A)·B with A [in, rank], B [rank, out]; W is frozen.

    LoRA (arXiv 2106.09685) eq. 3, s = alpha / rank; with `rslora` alpha / √rank (arXiv 2312.03732).
    `targets` are regular expressions, each over the whole of a name in `ADAPTABLE`. A starts
    uniform within ±1/√in as in PEFT, B at zero, so that the policy starts as the base.
    `dropout` is of the adapters' input, in the update only. The update then scores another policy
    than the one that sampled: it is mismatch, which the trust region takes for movement. So 0.
    `start` is a folder of PEFT's from which the adapters start (`lora.from_peft`).
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str | tuple[str, ...] = "q|k|v|o|gate|up|down"
    dropout: float = 0.0
    rslora: bool = False
    start: str | None = None

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: an adapter's rank is at least 1")
        if not math.isfinite(self.alpha) or self.alpha <= 0:
            raise ValueError(f"alpha={self.alpha} must be a positive number")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is not within [0, 1)")
        for pattern in self.patterns:
            try:
                found = any(re.fullmatch(pattern, name) for name in ADAPTABLE)
            except re.error as error:
                raise ValueError(
                    f"targets: {pattern!r} is no regular expression: {error}"
                ) from error
            if not found:
                raise ValueError(
                    f"targets: {pattern!r} matches nothing; the names are {', '.join(ADAPTABLE)}"
                )

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def names(self) -> tuple[str, ...]:
        """The matrices that get an adapter, in the order of `ADAPTABLE`."""
        return tuple(
            name for name in ADAPTABLE if any(re.fullmatch(p, name) for p in self.patterns)
        )


class Adapter:
    """The adapter of one matrix as arrays in use; `scale` and dropout's key are its own."""

    def __init__(self, a: Array, b: Array, config: LoraConfig, key: Array | None):
        self.a, self.b, self._config, self._key = a, b, config, key

    def __call__(self, x: Float[Array, "*N I"]) -> Float[Array, "*N O"]:
        """s·(x·A)·B: never a matrix of W's shape."""
        x = self.dropped(x)
        return ((x @ self.a.astype(x.dtype)) @ self.b.astype(x.dtype)) * self._config.scale

    def factors(self) -> tuple[Array, Array]:
        """A and s·B."""
        return self.a, self.b * self._config.scale

    def merged(self) -> Float[Array, "*E I O"]:
        """s·A·B, what to add to W, float32."""
        return low_rank(self.a, self.b, self._config.scale)

    def dropped(self, x: Float[Array, "*N I"]) -> Float[Array, "*N I"]:
        """Inputs that dropout spares, divided by their share; all of them without a key."""
        if self._key is None:
            return x
        kept = 1.0 - self._config.dropout
        return jnp.where(jax.random.bernoulli(self._key, kept, x.shape), x / kept, 0)


def low_rank(
    a: Float[Array, "*E I r"], b: Float[Array, "*E r O"], scale: float
) -> Float[Array, "*E I O"]:
    """scale·A·B in float32."""
    return scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def add_adapter(
    module: nnx.Module,
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    lora: LoraConfig,
    rngs: nnx.Rngs,
):
    """Puts A and B of the matrix `name` [*experts, in, out] into its module, split as it is."""
    *experts, into, out = shape
    if lora.rank > min(into, out):
        raise ValueError(
            f"rank={lora.rank} is more than {name} can have, which is {into} x {out}: "
            f"set a rank of at most {min(into, out)}, or leave {name} out of targets"
        )
    *outer, into_axis, out_axis = axes
    bound = into**-0.5
    a = jax.random.uniform(rngs.params(), (*experts, into, lora.rank), jnp.float32, -bound, bound)
    b = jnp.zeros((*experts, lora.rank, out), jnp.float32)
    setattr(module, name + A, nnx.Param(a, axes=(*outer, into_axis, None)))
    setattr(module, name + B, nnx.Param(b, axes=(*outer, None, out_axis)))


def adapter_of(module: Any, name: str) -> Adapter | None:
    """The adapter of matrix `name` of a Block or Decoder, where there is one."""
    if not hasattr(module, name + A):
        return None
    a, b = (
        constrain(p[...], *p.axes) for p in (getattr(module, name + A), getattr(module, name + B))
    )
    key = getattr(module, "dropout_key", None)
    if key is not None:
        key = jax.random.fold_in(key[...], ADAPTABLE.index(name))
    return Adapter(a, b, module.lora, key)
