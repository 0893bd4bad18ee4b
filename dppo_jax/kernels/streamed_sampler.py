"""The sampler's head over chunks of the vocabulary, for vocabularies too large to hold B x V.

One pass over the unembedding: while a chunk's logits are alive they give the running sums m, s, t
of `xla`, a token drawn within the chunk, and candidates for the K most likely. Nothing is kept of
them but numbers a row.

Drawing: a chunk is a group of `drawing.inverse_cdf`. Each group's token is drawn while its logits
are alive, with the row's two numbers for that, and kept with the group's sum; after the pass the
row's third number says whose token it is. So both forms draw the same token from the same numbers.

Candidates: a chunk's columns fall into bins in turn, and each bin keeps its 4 or 6 largest logits,
by comparisons alone, where a sort of the chunk would cost a TPU more than the matrix product. The
largest logit that no bin kept is remembered too: where the K-th candidate exceeds it, the K are
exactly the most likely. `exact` says so for each row, and where one row fails, its batch takes a
second pass that sorts (`lax.cond`). Where likely tokens are spread at random the chance of that is
1e-4 a row at K = 64, 512 bins of 4, and less for smaller K.

Filters: top-k, top-p and min-p are a threshold, which the candidates and the running sums give
where it exceeds every logit that no bin kept; the draw is then among candidates, and `complete`
tells the rows that must be drawn plainly. With replay at most the K most likely are kept, which are
at hand.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dppo_jax.kernels.drawing import (
    Drawn,
    Numbers,
    group_columns,
    pick,
    place_in_list,
    within_group,
)
from dppo_jax.kernels.filters import Filters, RowFilters, threshold
from dppo_jax.kernels.xla import (
    LEAST_LOG_P,
    Transform,
    chunk_at,
    contract,
    logits_of,
    over_chunks,
)

BINS = 512


class _Groups(NamedTuple):
    """A token of each group, drawn within it; with temperature 0 its most likely one."""

    token: Int[Array, "B G"]
    logit: Float[Array, "B G"]
    m: Float[Array, "B G"]  # the largest logit up to the group
    mass: Float[Array, "B G"]  # Σ e^((z-m)/T) of the group


class _State(NamedTuple):
    m: Float[Array, " B"]  # max z
    s: Float[Array, " B"]  # Σ e^((z-m)/T)
    t: Float[Array, " B"]  # Σ (z-m)/T e^((z-m)/T)
    groups: _Groups
    best: "_Candidates"


class Streamed(NamedTuple):
    drawn: Drawn
    exact: Bool[Array, " B"]  # the candidates held the K most likely; `drawn` has them either way
    complete: Bool[Array, " B"]  # and all that the filters keep; where not, `drawn` is not usable


class _Candidates(NamedTuple):
    """The largest logits of each bin, largest first, and their columns."""

    logit: tuple[Float[Array, "B bins"], ...]  # depth of them
    column: tuple[Int[Array, "B bins"], ...]
    dropped: Float[Array, "B bins"]  # the largest that is not among them

    @classmethod
    def none(cls, batch: int, bins: int, depth: int) -> "_Candidates":
        logit = jnp.full((batch, bins), -jnp.inf, jnp.float32)
        return cls((logit,) * depth, (jnp.zeros((batch, bins), jnp.int32),) * depth, logit)

    def with_logits(self, z: Float[Array, "B C"], start: int | Array) -> "_Candidates":
        """After a chunk whose first column is `start`; of equals, the earlier column stays."""
        bins = self.logit[0].shape[1]
        logits, columns, dropped = list(self.logit), list(self.column), self.dropped
        for first in range(0, z.shape[1], bins):
            here = z[:, first : first + bins]
            short = bins - here.shape[1]
            value = jnp.pad(here, ((0, 0), (0, short)), constant_values=-jnp.inf)
            column = jnp.broadcast_to(start + first + jnp.arange(bins), value.shape)
            for rank in range(len(logits)):
                larger = value > logits[rank]
                logits[rank], value = (
                    jnp.where(larger, value, logits[rank]),
                    jnp.where(larger, logits[rank], value),
                )
                columns[rank], column = (
                    jnp.where(larger, column, columns[rank]),
                    jnp.where(larger, columns[rank], column),
                )
            dropped = jnp.maximum(dropped, value)
        return _Candidates(tuple(logits), tuple(columns), dropped)

    def top(self, k: int) -> tuple[Float[Array, "B k"], Int[Array, "B k"], Bool[Array, " B"]]:
        """(logits, columns, exact) of the k largest; of equals, the earlier column first."""
        logit, column = largest(*self.all(), k)
        return logit, column, logit[:, -1] > jnp.max(self.dropped, axis=1)

    def all(self) -> tuple[Float[Array, "B N"], Int[Array, "B N"]]:
        return jnp.concatenate(self.logit, 1), jnp.concatenate(self.column, 1)


def largest(
    logit: Float[Array, "B N"], column: Int[Array, "B N"], k: int
) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """The k largest, largest first, of equals the earlier column, as `lax.top_k` of whole rows."""
    falling, column = lax.sort((-logit, column), num_keys=2)
    return -falling[:, :k], column[:, :k]


def streamed(
    hidden: Float[Array, "B D"],
    unembedding: Float[Array, "V D"],
    numbers: Numbers,
    *,
    temperature: float | Float[Array, " B"],
    top_k_capture: int,
    filters: Filters | RowFilters = Filters(),  # noqa: B008  frozen
    soft_cap: float | None = None,
    replay: bool = False,
    raw_logp: bool = False,
    bins: int | None = None,
) -> Streamed:
    """`drawing.draw`, and in which rows it could be done; `raw_logp` as `rows.draw_rows`.

    The whole vocabulary lies on this device.

    Of equals at the K-th place, replay with top-k and top-p counts the mass of those within the K.
    """
    greedy = temperature == 0
    divisor = jnp.where(greedy, 1.0, jnp.asarray(temperature, jnp.float32))
    transform = Transform(1.0, soft_cap)
    batch, vocabulary = len(hidden), len(unembedding)
    columns = group_columns(vocabulary)
    depth = 4 if top_k_capture <= 64 else 6

    def logits(index) -> tuple[Array, int | Array]:
        chunk = chunk_at(unembedding, index, columns)
        z = logits_of(contract(hidden, chunk.rows, 1, 1, jnp.float32), transform)
        return (z if chunk.fresh is None else jnp.where(chunk.fresh, z, -jnp.inf)), chunk.start

    def below(z: Array, m: Float[Array, " B"]) -> Array:  # z of a row or of its columns
        # The difference first: quotients by a low temperature have no digits left for it.
        by_row = (-1,) + (1,) * (z.ndim - 1)
        return (z - m.reshape(by_row)) / jnp.broadcast_to(divisor, m.shape).reshape(by_row)

    def drawn_within(z, e) -> Array:
        return within_group(e, numbers)

    def most_likely(z, e) -> Array:
        return jnp.argmax(z, axis=1).astype(jnp.int32)

    def step(index, state: _State) -> _State:
        z, start = logits(index)
        m = jnp.maximum(state.m, z.max(axis=1))
        relative = below(z, m)
        e = jnp.exp(relative)
        change = jnp.maximum(below(state.m, m), LEAST_LOG_P)
        scale = jnp.exp(change)
        here = e.sum(axis=1)
        u = jnp.maximum(relative, LEAST_LOG_P)
        t = scale * (state.t + change * state.s) + (u * jnp.exp(u)).sum(axis=1)
        at = _by_row(greedy, most_likely, drawn_within)(z, e)
        logit = jnp.take_along_axis(z, at[:, None], axis=1)[:, 0]
        found = _Groups(start + at, logit, m, here)
        groups = jax.tree.map(lambda all_, one: all_.at[:, index].set(one), state.groups, found)
        return _State(m, scale * state.s + here, t, groups, state.best.with_logits(z, start))

    zero = jnp.zeros((batch,), jnp.float32)
    none = jnp.zeros((batch, -(-vocabulary // columns)), jnp.float32)
    state = _State(
        zero + jnp.finfo(jnp.float32).min,
        zero,
        zero,
        _Groups(none.astype(jnp.int32), none, none, none),
        _Candidates.none(batch, bins or BINS, depth),
    )
    state = over_chunks(step, state, vocabulary, columns)

    def sorted_again() -> tuple[Array, Array]:
        def merge(index, best):
            z, start = logits(index)
            column = jnp.broadcast_to(start + jnp.arange(columns), z.shape)
            # columns that an earlier chunk had come last, so that none is listed twice
            known = jnp.where(column >= index * columns, column, vocabulary)
            return largest(
                jnp.concatenate([best[0], z], axis=1),
                jnp.concatenate([best[1], known], axis=1),
                top_k_capture,
            )

        none = jnp.full((batch, top_k_capture), -jnp.inf, jnp.float32)
        best = none, jnp.full(none.shape, vocabulary, jnp.int32)
        return over_chunks(merge, best, vocabulary, columns)

    groups = state.groups
    of_all = groups.mass * jnp.exp(below(groups.m, state.m))
    group = _by_row(
        greedy, lambda: jnp.argmax(groups.logit, axis=1), lambda: pick(of_all, numbers.group)
    )()
    drawn_token, drawn_logit = (
        jnp.take_along_axis(leaf, group[:, None], axis=1)[:, 0]
        for leaf in (groups.token, groups.logit)
    )
    logit, column, exact = state.best.top(top_k_capture)
    logit, column = lax.cond(jnp.all(exact), lambda: (logit, column), sorted_again)
    log_s = jnp.log(state.s)
    logp = below(drawn_logit, state.m) - log_s
    top = below(logit, state.m)
    whole = Drawn(drawn_token, logp, column, top - log_s[:, None], log_s - state.t / state.s)
    if raw_logp:
        whole = whole._replace(raw_logp=logp)
    if replay:
        whole = whole._replace(kept_count=jnp.zeros((batch,), jnp.int32))
    everywhere = jnp.ones((batch,), bool)
    if isinstance(filters, Filters) and not filters.on:
        return Streamed(whole, exact, everywhere)

    def truncated() -> tuple[Drawn, Array]:
        listed, ids = (logit, column) if replay else state.best.all()
        relative = below(listed, state.m)
        beyond = jnp.maximum(state.s - jnp.exp(relative).sum(axis=1), 0.0)
        least = threshold(relative, filters, beyond)
        inside = relative >= least[:, None]
        e = jnp.where(inside, jnp.exp(relative), 0.0)
        s = e.sum(axis=1)
        log_kept = jnp.log(s)

        def drawn_from_list() -> tuple[Array, Array]:
            listed_ids, p, z = lax.sort((ids, e, relative), num_keys=1)
            rows, at = jnp.arange(batch), place_in_list(p, listed_ids, numbers, vocabulary)
            return listed_ids[rows, at], z[rows, at]

        first = column[:, 0], top[:, 0]
        token, z = _by_row(greedy, lambda: first, drawn_from_list)()
        if replay:
            complete = everywhere & (filters.top_k <= top_k_capture)
        else:
            dropped = below(jnp.max(state.best.dropped, axis=1), state.m)
            complete = (least > dropped) & (filters.top_k < listed.shape[1])
        recorded = top >= least[:, None]
        topk_logp = jnp.where(recorded, top - log_kept[:, None], -jnp.inf)
        kept = jnp.sum(recorded, axis=1, dtype=jnp.int32)
        within = jnp.where(inside, e * relative, 0.0).sum(axis=1)
        drawn = Drawn(
            token,
            z - log_kept,
            column,
            topk_logp,
            log_kept - within / s,
            raw_logp=z - log_s if raw_logp else None,
            kept_count=kept if replay else None,
        )
        return drawn, complete

    if isinstance(filters, Filters):
        drawn, complete = truncated()
        return Streamed(drawn, exact, complete)

    def by_rows() -> tuple[Drawn, Array]:
        drawn, complete = truncated()
        return rows_of(filters.on, drawn, whole), complete | ~filters.on

    drawn, complete = lax.cond(jnp.any(filters.on), by_rows, lambda: (whole, everywhere))
    return Streamed(drawn, exact, complete)


def rows_of(where: Bool[Array, " B"], these: Drawn, those: Drawn) -> Drawn:
    """`these` in the rows that say so, `those` in the others."""

    def choose(this, that):
        return jnp.where(where.reshape(-1, *(1,) * (this.ndim - 1)), this, that)

    return jax.tree.map(choose, these, those)


def _by_row(where: bool | Bool[Array, " B"], this: Callable, that: Callable) -> Callable:
    """`this` or `that`; where it differs by row, both, and each row's own."""
    if not isinstance(where, Array):
        return this if where else that

    def choose(*arguments):
        both = this(*arguments), that(*arguments)
        return jax.tree.map(lambda a, b: jnp.where(where, a, b), *both)

    return choose
