"""Rows that are drawn each in its own way: a batch shared by requests that know nothing of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from dppo_jax.kernels.columns import Columns
from dppo_jax.kernels.drawing import Drawn, Numbers, draw, numbers
from dppo_jax.kernels.filters import RowFilters


class RowSampling(NamedTuple):
    """How each row is drawn, as plain numbers that the host may write row by row."""

    seed: UInt32[Array, "B 2"]  # of the request: 64 bits, high word first
    sample: Int[Array, " B"]  # which of the request's samples
    temperature: Float[Array, " B"]  # 0: the most likely token
    top_k: Int[Array, " B"]  # 0: all tokens
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]  # 1: none
    bias_ids: Int[Array, "B J"]  # an id outside [0, V) is no token; J may be 0
    bias: Float[Array, "B J"]  # added to their logits

    @property
    def filters(self) -> RowFilters:
        return RowFilters(self.top_k, self.top_p, self.min_p)

    @property
    def plain(self) -> Bool[Array, " B"]:
        """Rows that are drawn from softmax(logits / temperature), the policy that is scored."""
        return ~(self.filters.on | self.changed)

    @property
    def changed(self) -> Bool[Array, " B"]:
        """Rows whose logits are changed before anything is drawn."""
        return (self.repetition_penalty != 1) | jnp.any(self.bias != 0, axis=1)


def row_keys(rows: RowSampling, position: Int[Array, " B"]) -> Array:
    """Keys [B], each a function of its request's seed, the sample and the token's position alone.

    fold_in(fold_in(key(seed), sample), position), always threefry: what else is in the batch, and
    which generator the process has set, change nothing.
    """

    def key_of(seed, sample, position):
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.fold_in(jax.random.fold_in(key, sample), position)

    return jax.vmap(key_of)(rows.seed, rows.sample, position)


def row_numbers(rows: RowSampling, position: Int[Array, " B"], steps: int) -> Numbers:
    """What the next `steps` tokens of each row are drawn with, a step after the other."""

    def of_step(step):
        return numbers(row_keys(rows, position + step), len(position))

    return jax.vmap(of_step)(jnp.arange(steps))


def changed_logits(
    logits: Float[Array, "B C"],
    rows: RowSampling,
    history: Int[Array, "B H"] | None,
    columns: Columns | None = None,
) -> Float[Array, "B C"]:
    """Logits with the rows' bias added, then those of tokens in `history` made less likely.

    The penalty divides positive logits and multiplies negative ones (CTRL, arXiv 1909.05858,
    section 4.1), once however often the token is there. Order as vLLM's: bias, then penalty.
    """
    columns = columns or Columns(logits.shape[1])
    index = jnp.arange(len(logits))[:, None]

    def inside(ids):  # JAX counts negative ids from the end, and drops those beyond it
        return columns.place(ids, logits.shape[1])

    if rows.bias_ids.shape[1]:
        logits = logits.at[index, inside(rows.bias_ids)].add(rows.bias, mode="drop")
    if history is None:
        return logits
    penalty = rows.repetition_penalty[:, None]

    def penalised():
        ids = inside(history)
        z = logits.at[index, ids].get(mode="fill", fill_value=0.0)
        less = jnp.where(z > 0, z / penalty, z * penalty)
        return logits.at[index, ids].set(less, mode="drop")  # repeats of an id set the same

    return lax.cond(columns.any(penalty[:, 0] != 1), penalised, lambda: logits)


def draw_rows(
    logits: Float[Array, "B C"],
    rows: RowSampling,
    position: Int[Array, " B"],
    history: Int[Array, "B H"] | None,
    top_k_capture: int,
    *,
    raw_logp: bool = False,
    replay: bool = False,
    columns: Columns | None = None,
    ahead: Numbers | None = None,
) -> Drawn:
    """A token a row from softmax(changed_logits / temperature) within its filters.

    Recorded is the distribution drawn from, as `drawing.draw` does; with `raw_logp` beside it the
    token's log-probability under softmax(logits / temperature), the policy that training scores:
    no bias, penalty or filter. A batch of `plain` rows pays for none of them. `replay` as there.

    Args:
      position: of the token in its response, 0 the first.
      history: ids of the row's prompt and response so far, in any order; ids outside [0, V) are
        room not used. None where no row has a repetition penalty: then none is applied.
      ahead: of `row_numbers` at this position, where they were made before.
    """
    rows = jax.tree.map(jnp.asarray, rows)
    columns = columns or Columns(logits.shape[1])
    own = ahead or numbers(row_keys(rows, position), len(logits))
    logits = logits.astype(jnp.float32)

    def plain() -> Drawn:
        drawn = draw(logits, own, rows.temperature, top_k_capture, columns=columns)
        return drawn._replace(
            raw_logp=drawn.logp if raw_logp else None,
            kept_count=jnp.zeros_like(drawn.token) if replay else None,
        )

    def changed() -> Drawn:
        z = changed_logits(logits, rows, history, columns)
        drawn = draw(
            z, own, rows.temperature, top_k_capture, rows.filters, replay=replay, columns=columns
        )
        if not raw_logp:
            return drawn
        raw = logits / jnp.where(rows.temperature == 0, 1.0, rows.temperature)[:, None]
        at = columns.value_at(raw, drawn.token)
        return drawn._replace(raw_logp=at - columns.log_sum_exp(raw))

    return lax.cond(~columns.any(~rows.plain), plain, changed)
