"""Attention over segments against a float64 softmax over each slot's keys, one slot at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax.sampling.paged_attention import (
    answers_of,
    attended,
    attended_segments,
    combined,
    of_slots,
    room_bias,
)
from dppo_jax.sampling.paged_cache import View
from dppo_jax.sampling.segments import NOBODY, Segments

HEADS, QUERIES, SIZE, CHUNK, COLUMNS = 2, 3, 5, 4, 6
# Slots 0 and 2 share the tokens 0..4; slot 1 has 8 of its own, slot 2 has 2, slot 3 none at all.
SHARED = Segments(
    pages=jnp.zeros((2, 1), jnp.int32),
    slots=jnp.array([[0, 2], [NOBODY, NOBODY]]),
    first=jnp.array([0, 0]),
    tokens=jnp.array([5, 0]),
)
OWN = Segments(
    pages=jnp.zeros((4, 1), jnp.int32),
    slots=jnp.array([[1], [2], [1], [NOBODY]]),
    first=jnp.array([0, 5, 6, 0]),
    tokens=jnp.array([6, 2, 2, 0]),
)
LENGTH = np.array([5, 8, 7, 0])
STEP = 2  # the chunk's columns 0, 1 and 2 are there


def random_view(rng, rows, columns):
    k, v = rng.normal(size=(2, rows, HEADS, columns, SIZE)).astype(np.float32)
    return View(3 * k, v, None, None)


def of_slot(slot, views, room):
    """Its keys and values [h, t, d], and their positions."""
    keys, values, places = [], [], []
    for view, segments in zip(views, (SHARED, OWN), strict=True):
        for row in np.argwhere((np.asarray(segments.slots) == slot).any(axis=1))[:, 0]:
            count = int(segments.tokens[row])
            keys.append(view.k[row, :, :count])
            values.append(view.v[row, :, :count])
            places.append(int(segments.first[row]) + np.arange(count))
    keys.append(room.k[slot, :, : STEP + 1])
    values.append(room.v[slot, :, : STEP + 1])
    places.append(LENGTH[slot] + np.arange(STEP + 1))
    return np.concatenate(keys, 1), np.concatenate(values, 1), np.concatenate(places)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 2, 5])
def test_segments_together_are_all_keys(window, soft_cap):
    rng = np.random.default_rng(0)
    views = [random_view(rng, len(one.first), COLUMNS) for one in (SHARED, OWN)]
    room = random_view(rng, len(LENGTH), CHUNK)
    q = rng.normal(size=(len(LENGTH), HEADS, QUERIES, SIZE)).astype(np.float32)

    @jax.jit
    def found(q, room, views):
        now = jnp.asarray(LENGTH) + STEP
        bias = room_bias(CHUNK, jnp.int32(STEP), window)[None, None]
        shared, own = (
            attended_segments(q, view, one, now, soft_cap, window)
            for view, one in zip(views, (SHARED, OWN), strict=True)
        )
        mine = [attended(q, room, bias, soft_cap), of_slots(shared, answers_of(SHARED, len(q)))]
        return combined(mine, [(own, OWN.slots.reshape(-1))])

    got = found(jnp.asarray(q), *jax.tree.map(jnp.asarray, (room, views)))
    for slot, queries in enumerate(q.astype(np.float64)):
        k, v, places = of_slot(slot, views, room)
        z = np.einsum("hrd,htd->hrt", queries, k)
        z = z if soft_cap is None else soft_cap * np.tanh(z / soft_cap)
        if window is not None:
            z = np.where(LENGTH[slot] + STEP - places < window, z, -np.inf)
        weights = np.exp(z - z.max(axis=-1, keepdims=True))
        expected = np.einsum("hrt,htd->hrd", weights / weights.sum(-1, keepdims=True), v)
        np.testing.assert_allclose(got[slot], expected, atol=2e-6)


def test_whose_answers_by_hand():
    """Slot 0 is the first of the first segment, slot 2 its second; nobody else shares."""
    assert SHARED.shared and not OWN.shared
    np.testing.assert_array_equal(answers_of(SHARED, 4), [0, NOBODY, 1, NOBODY])
