"""The sampler's head: hidden states to the next token and what is recorded of its distribution."""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dppo_jax.kernels import tiles
from dppo_jax.kernels.drawing import Drawn, draw
from dppo_jax.kernels.filters import Filters
from dppo_jax.kernels.rows import RowSampling, draw_rows, row_keys
from dppo_jax.kernels.streamed_sampler import rows_of, streamed

# From here the copies of B x V that `draw` makes take as long as reading the matrix on a TPU.
STREAM_FROM = 32768

Form = Literal["plain", "streamed"]


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
    form: Form | None = None,
) -> Drawn:
    """A token a row from softmax(z), z = soft_cap * tanh(x.w / soft_cap) / temperature.

    Logits are accumulated in float32. What is recorded is exact in either form; temperature 0,
    filters and `replay` as in `drawing.draw`. Forms: "plain" has all B x V logits, several times;
    "streamed" never, but where filters without replay keep more than its candidates hold: it then
    draws those rows plainly. None chooses: streamed for a large vocabulary on a device of its own
    that is a TPU, plain elsewhere. The forms draw different tokens from one key.

    Raises:
      ValueError: an unknown form.
    """

    def plain() -> Drawn:
        logits = _logits(hidden, unembedding, soft_cap)
        return draw(logits, key, temperature, top_k_capture, filters, replay=replay)

    if _form(form, unembedding) == "plain":
        return plain()
    out = streamed(
        hidden,
        unembedding,
        key,
        temperature=temperature,
        top_k_capture=top_k_capture,
        filters=filters,
        soft_cap=soft_cap,
        replay=replay,
    )
    if not filters.on or (replay and filters.top_k <= top_k_capture):
        return out.drawn  # always complete
    return _mended(out.drawn, ~out.complete, plain)


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
    form: Form | None = None,
) -> Drawn:
    """`sample` with each row's own parameters; `rows.draw_rows` says what they do.

    Streamed, rows with a bias or a penalty are drawn plainly.
    """

    def plain() -> Drawn:
        logits = _logits(hidden, unembedding, soft_cap)
        return draw_rows(
            logits, rows, position, history, top_k_capture, raw_logp=raw_logp, replay=replay
        )

    if _form(form, unembedding) == "plain":
        return plain()
    out = streamed(
        hidden,
        unembedding,
        row_keys(rows, position),
        temperature=rows.temperature,
        top_k_capture=top_k_capture,
        filters=rows.filters,
        soft_cap=soft_cap,
        replay=replay,
        raw_logp=raw_logp,
    )
    return _mended(out.drawn, rows.changed | ~out.complete, plain)


def _form(form: Form | None, unembedding: Float[Array, "V D"]) -> Form:
    if form not in (None, "plain", "streamed"):
        raise ValueError(f"unknown form {form!r} of the sampler's head; known: plain, streamed")
    if form is not None:
        return form
    target = tiles.target()
    large = len(unembedding) >= STREAM_FROM and target.platform == "tpu" and target.one_device
    return "streamed" if large else "plain"


def _mended(drawn: Drawn, wrong: Bool[Array, " B"], plain: Callable[[], Drawn]) -> Drawn:
    """With rows that are wrong drawn plainly; the others keep theirs, whoever is beside them."""
    return lax.cond(jnp.any(wrong), lambda: rows_of(wrong, plain(), drawn), lambda: drawn)


def _logits(
    hidden: Float[Array, "B D"], unembedding: Float[Array, "V D"], soft_cap: float | None
) -> Float[Array, "B V"]:
    logits = jnp.dot(hidden, unembedding.T, preferred_element_type=jnp.float32)
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
