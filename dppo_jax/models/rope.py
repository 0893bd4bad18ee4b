"""Rotary position embeddings, and the ways in which checkpoints stretch them to longer contexts.

A scaling turns the frequencies θ^(-2i/d) of plain rope into those in force, and has an `amplitude`
of cos and sin. A recipe binds one (`@rope.Yarn()`), and `config.json` maps to one.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Rope = tuple[Array, Array]  # cos, sin
Frequencies = np.ndarray  # [head_size / 2], radians a position


@dataclass(frozen=True)
class Linear:
    """f / factor: position interpolation (Chen et al., arXiv 2306.15595, eq. 4)."""

    factor: float
    amplitude = 1.0

    def frequencies(self, base: Frequencies, theta: float) -> Frequencies:
        return base / np.float32(self.factor)


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1's: long waves slowed by `factor`, short ones kept, a ramp between.

    With turns t = original_length · f / 2π in the original context and
    s = clip((t - low) / (high - low), 0, 1): f·(s + (1 - s)/factor).
    Source: apply_scaling in meta-llama/llama-models, models/llama3/model.py.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int
    amplitude = 1.0

    def frequencies(self, base: Frequencies, theta: float) -> Frequencies:
        low, high = self.low_frequency_factor, self.high_frequency_factor
        turns = self.original_length * base / (2 * np.pi)
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return (base * (kept + (1.0 - kept) / self.factor)).astype(np.float32)


@dataclass(frozen=True)
class Yarn:
    """NTK by parts (Peng et al., arXiv 2309.00071, section 3.2), and eq. 22's amplitude.

    The ramp runs over the dimensions that turn `beta_fast` to `beta_slow` times in the original
    context, its ends rounded outwards where `truncate`: f·(1 - ramp) + f/factor·ramp.
    `amplitude` is 0.1·ln(factor) + 1 unless given.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    @property
    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def frequencies(self, base: Frequencies, theta: float) -> Frequencies:
        size = 2 * len(base)

        def dimension(turns: float) -> float:  # the one that turns this often
            return (
                size
                * math.log(self.original_length / (turns * 2 * math.pi))
                / (2 * math.log(theta))
            )

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        width = high - low or 0.001
        ramp = np.clip((np.arange(len(base), dtype=np.float32) - low) / width, 0.0, 1.0)
        return (base * (1.0 - ramp) + base / self.factor * ramp).astype(np.float32)


RopeScaling = Linear | Llama3 | Yarn


def rotary_table(
    length: int, head_size: int, theta: float, scaling: RopeScaling | None = None
) -> Rope:
    """cos and sin [length, 1, head_size/2] of each position's rotation (arXiv 2104.09864).

    A constant of the program: XLA's CPU backend would compute them anew in every layer.
    """
    frequency = np.float32(theta) ** (-np.arange(0, head_size, 2, dtype=np.float32) / head_size)
    amplitude = np.float32(1.0)
    if scaling is not None:
        frequency = scaling.frequencies(frequency, theta)
        amplitude = np.float32(scaling.amplitude)
    angle = np.arange(length, dtype=np.float32)[:, None, None] * frequency
    return jnp.asarray(np.cos(angle) * amplitude), jnp.asarray(np.sin(angle) * amplitude)


def rotate(x: Float[Array, "*N H d"], rope) -> Float[Array, "*N H d"]:
    """Rotates the pairs (i, i + d/2), the half-split order of Hugging Face checkpoints."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
