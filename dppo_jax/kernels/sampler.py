"""The sampler's head: hidden states to the next token and what is recorded of its distribution.

On a mesh each device has its rows of the batch and its columns of the vocabulary (`Layout`): it
multiplies, filters, draws and sorts those alone, and numbers a row cross the axis of the vocabulary
(`columns`), never a logit. The matrix is whole along D: gather it once, before the decoding loop.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dppo_jax.kernels import tiles
from dppo_jax.kernels.columns import Columns
from dppo_jax.kernels.drawing import Drawn, Numbers, draw, numbers
from dppo_jax.kernels.filters import Filters
from dppo_jax.kernels.panels import Panels, product
from dppo_jax.kernels.rows import RowSampling, draw_rows, row_keys
from dppo_jax.kernels.sharded import Layout, on_mesh
from dppo_jax.kernels.streamed_sampler import rows_of, streamed

# From here the copies of B x V that `draw` makes take as long as reading the matrix on a TPU.
STREAM_FROM = 32768

Form = Literal["plain", "streamed"]


def sample(
    hidden: Float[Array, "B D"],
    unembedding: Float[Array, "V D"] | Panels,
    key: Array | Numbers,
    *,
    temperature: float,
    top_k_capture: int,
    filters: Filters = Filters(),  # noqa: B008  frozen
    soft_cap: float | None = None,
    replay: bool = False,
    form: Form | None = None,
    layout: Layout | None = None,
) -> Drawn:
    """A token a row from softmax(z), z = soft_cap * tanh(x.w / soft_cap) / temperature.

    Logits are accumulated in float32. What is recorded is exact in either form; temperature 0,
    filters and `replay` as in `drawing.draw`. Forms: "plain" has all logits of a device's rows and
    columns, several times, and takes `Panels` of the matrix' transpose in its place; "streamed"
    never has them, but where filters without replay keep more than its candidates hold: it then
    draws those rows plainly. None chooses: streamed for a large vocabulary that a TPU has whole,
    plain elsewhere. `layout` lays rows and vocabulary out on the mesh that is set. One key, or its
    `drawing.numbers`, gives the same tokens in either form and on any mesh, but for rounding.

    Raises:
      ValueError: an unknown form, "streamed" where the vocabulary is split, or sizes that the mesh
        does not divide.
    """

    def local(hidden, unembedding, numbers: Numbers, columns: Columns) -> Drawn:
        def plain() -> Drawn:
            logits = _logits(hidden, unembedding, soft_cap)
            return draw(
                logits, numbers, temperature, top_k_capture, filters,
                replay=replay, columns=columns,
            )  # fmt: skip

        if _form(form, unembedding, columns) == "plain":
            return plain()
        out = streamed(
            hidden,
            unembedding,
            numbers,
            temperature=temperature,
            top_k_capture=top_k_capture,
            filters=filters,
            soft_cap=soft_cap,
            replay=replay,
        )
        if not filters.on or (replay and filters.top_k <= top_k_capture):
            return out.drawn  # always complete
        return _mended(out.drawn, ~out.complete, plain)

    own = key if isinstance(key, Numbers) else numbers(key, len(hidden))
    return _on(layout, local, hidden, unembedding, own)


def sample_rows(
    hidden: Float[Array, "B D"],
    unembedding: Float[Array, "V D"] | Panels,
    rows: RowSampling,
    position: Int[Array, " B"],
    history: Int[Array, "B H"] | None,
    *,
    top_k_capture: int,
    soft_cap: float | None = None,
    raw_logp: bool = False,
    replay: bool = False,
    ahead: Numbers | None = None,
    form: Form | None = None,
    layout: Layout | None = None,
) -> Drawn:
    """`sample` with each row's own parameters; `rows.draw_rows` says what they do.

    Streamed, rows with a bias or a penalty are drawn plainly.
    """

    def local(hidden, unembedding, own, columns: Columns) -> Drawn:
        rows, position, history, ahead = own

        def plain() -> Drawn:
            logits = _logits(hidden, unembedding, soft_cap)
            return draw_rows(
                logits, rows, position, history, top_k_capture,
                raw_logp=raw_logp, replay=replay, columns=columns, ahead=ahead,
            )  # fmt: skip

        if _form(form, unembedding, columns) == "plain":
            return plain()
        out = streamed(
            hidden,
            unembedding,
            ahead or numbers(row_keys(rows, position), len(hidden)),
            temperature=rows.temperature,
            top_k_capture=top_k_capture,
            filters=rows.filters,
            soft_cap=soft_cap,
            replay=replay,
            raw_logp=raw_logp,
        )
        return _mended(out.drawn, rows.changed | ~out.complete, plain)

    return _on(layout, local, hidden, unembedding, (rows, position, history, ahead))


def _on(layout: Layout | None, local: Callable, hidden, unembedding, by_row) -> Drawn:
    """local(hidden, unembedding, by_row, columns) on each device's part."""
    vocabulary = _columns(unembedding)
    if layout is None:
        return local(hidden, unembedding, by_row, Columns(vocabulary))
    layout.check(len(hidden), vocabulary, hidden.shape[1])
    axis, mesh = layout.vocabulary, jax.sharding.get_abstract_mesh().axis_names

    def here(hidden, unembedding, by_row):
        columns = Columns(vocabulary)
        if axis is not None:
            start = lax.axis_index(axis) * _columns(unembedding)
            columns = Columns(vocabulary, start, axis, mesh)
        return local(hidden, unembedding, by_row, columns)

    specs = (layout.rows, layout.matrix, layout.rows)
    return on_mesh(here, specs, layout.rows)(hidden, unembedding, by_row)


def _columns(unembedding: Float[Array, "C D"] | Panels) -> int:
    return unembedding.columns if isinstance(unembedding, Panels) else len(unembedding)


def _form(form: Form | None, unembedding: Float[Array, "C D"] | Panels, columns: Columns) -> Form:
    if form not in (None, "plain", "streamed"):
        raise ValueError(f"unknown form {form!r} of the sampler's head; known: plain, streamed")
    if form == "streamed" and columns.axis is not None:
        raise ValueError(
            f"the streamed form needs all of the vocabulary, which the mesh splits over "
            f"{columns.axis!r}: use form plain, or leave it to choose"
        )
    if form is not None:
        return form
    target = tiles.target()
    large = _columns(unembedding) >= STREAM_FROM and columns.axis is None
    return "streamed" if large and target.platform == "tpu" and target.one_device else "plain"


def _mended(drawn: Drawn, wrong: Bool[Array, " B"], plain: Callable[[], Drawn]) -> Drawn:
    """With rows that are wrong drawn plainly; the others keep theirs, whoever is beside them."""
    return lax.cond(jnp.any(wrong), lambda: rows_of(wrong, plain(), drawn), lambda: drawn)


def _logits(
    hidden: Float[Array, "B D"], unembedding: Float[Array, "C D"] | Panels, soft_cap: float | None
) -> Float[Array, "B C"]:
    if isinstance(unembedding, Panels):
        logits = product(hidden, unembedding, jnp.float32)
    else:
        logits = jnp.dot(hidden, unembedding.T, preferred_element_type=jnp.float32)
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
