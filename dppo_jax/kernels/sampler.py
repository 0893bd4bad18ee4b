"""The sampler's head: hidden states to the next token and what is recorded of its distribution."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dppo_jax.kernels import tiles
from dppo_jax.kernels.drawing import Drawn, draw
from dppo_jax.kernels.filters import Filters
from dppo_jax.kernels.rows import RowSampling, draw_rows
from dppo_jax.kernels.streamed_sampler import streamed

# From here the copies of B x V that `draw` makes take as long as reading the matrix on a TPU.
STREAM_FROM = 32768


def sample(
    hidden: Float[Array, "B D"],
    unembedding: Float[Array, "V D"],
    key: Array,
    *,
    temperature: float,
    top_k_capture: int,
    filters: Filters = Filters(),  # noqa: B008  frozen
    soft_cap: float | None = None,
    replay: bool = False,
    form: Literal["plain", "streamed"] | None = None,
) -> Drawn:
    """A token a row from softmax(z), z = soft_cap * tanh(x.w / soft_cap) / temperature.

    Logits are accumulated in float32. What is recorded is exact in either form; temperature 0,
    filters and `replay` as in `drawing.draw`. Forms: "plain" has all B x V logits, several times;
    "streamed" never, and knows no filters. None chooses: streamed for a large vocabulary on a
    device of its own that is a TPU, plain elsewhere. The forms draw different tokens from one key.

    Raises:
      ValueError: filters in the streamed form, an unknown form.
    """
    if form is None:
        target = tiles.target()
        large = len(unembedding) >= STREAM_FROM and target.platform == "tpu" and target.one_device
        form = "streamed" if large and not filters.on else "plain"
    if form == "streamed":
        if filters.on:
            raise ValueError(f"the streamed form knows no filters, got {filters}: use form='plain'")
        drawn, _ = streamed(
            hidden,
            unembedding,
            key,
            temperature=temperature,
            top_k_capture=top_k_capture,
            soft_cap=soft_cap,
        )
        return drawn
    if form != "plain":
        raise ValueError(f"unknown form {form!r} of the sampler's head; known: plain, streamed")
    logits = _logits(hidden, unembedding, soft_cap)
    return draw(logits, key, temperature, top_k_capture, filters, replay=replay)


def sample_rows(
    hidden: Float[Array, "B D"],
    unembedding: Float[Array, "V D"],
    rows: RowSampling,
    position: Int[Array, " B"],
    history: Int[Array, "B H"] | None,
    *,
    top_k_capture: int,
    soft_cap: float | None = None,
    raw_logp: bool = False,
    replay: bool = False,
) -> Drawn:
    """`sample` with each row's own parameters; `rows.draw_rows` says what they do."""
    logits = _logits(hidden, unembedding, soft_cap)
    return draw_rows(
        logits, rows, position, history, top_k_capture, raw_logp=raw_logp, replay=replay
    )


def _logits(
    hidden: Float[Array, "B D"], unembedding: Float[Array, "V D"], soft_cap: float | None
) -> Float[Array, "B V"]:
    logits = jnp.dot(hidden, unembedding.T, preferred_element_type=jnp.float32)
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
