"""Valid rows first, and a head that computes no others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_head import cotangents, draw, weighted

from dppo_jax.kernels import xla as xla_body
from dppo_jax.kernels.head import head
from dppo_jax.kernels.packing import packing
from dppo_jax.kernels.sharded import Layout


@settings(max_examples=15)
@given(
    mask=st.sampled_from([1, 7]).flatmap(lambda n: st.lists(st.booleans(), min_size=n, max_size=n))
)
def test_packing_is_a_stable_partition_and_unpacking_undoes_it(mask):
    mask = np.array(mask)
    rows = np.arange(1, 2 * mask.size + 1).reshape(-1, 2)
    found = packing(jnp.asarray(mask))
    packed = np.asarray(found.pack(jnp.asarray(rows)))
    assert int(found.valid) == mask.sum()
    np.testing.assert_array_equal(packed, np.concatenate([rows[mask], rows[~mask]]))
    back = found.unpack(jnp.asarray(packed))
    np.testing.assert_array_equal(back, np.where(mask[:, None], rows, 0))


def with_gradients(count, weights, x, w, ids, **options):
    def loss(x, w):
        out = head(x, w, ids, count=count, **options)
        return weighted(out, weights), out

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, w)


def test_rows_past_the_count_are_zero_and_have_no_gradient(monkeypatch):
    """21 rows in blocks of 8, the last of which overlaps its neighbour; unused rows hold NaN."""
    monkeypatch.setattr(xla_body, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(xla_body, "LEAST_COLUMNS", 128)
    monkeypatch.setattr(xla_body, "COUNTED_ROWS", 8)
    hidden, unembedding, ids = draw(3, 21, 6, 300, 4)
    weights = cotangents(4, 21, 4)
    run = jax.jit(lambda *args: with_gradients(*args, temperature=1.3, soft_cap=8.0))
    for count in (0, 1, 8, 13, 20, 21):
        spoiled = hidden.at[count:].set(jnp.nan)
        (_, out), grads = run(count, weights, spoiled, unembedding, ids)
        used = [w.at[count:].set(0) for w in weights]
        (_, want), want_grads = run(None, used, hidden, unembedding, ids)
        for got, expected in zip((*out, grads[0]), (*want, want_grads[0]), strict=True):
            np.testing.assert_allclose(got[:count], expected[:count], rtol=2e-5, atol=2e-5)
            np.testing.assert_array_equal(got[count:], 0)
        np.testing.assert_allclose(grads[1], want_grads[1], rtol=2e-5, atol=2e-5)


def test_the_work_ends_at_the_count(monkeypatch):
    """The loops' bounds come from the count, so that an unused block has no iteration."""
    monkeypatch.setattr(xla_body, "COUNTED_ROWS", 8)
    hidden, unembedding, ids = draw(3, 64, 6, 300, 4)
    weights = cotangents(4, 64, 4)

    def traced(count):
        run = jax.make_jaxpr(lambda *args: with_gradients(count, weights, *args))
        return str(run(hidden, unembedding, ids))

    assert "while" not in traced(None)
    assert traced(jnp.int32(3)).count("while[") == 2  # forward and backward


def test_a_count_and_a_layout_exclude_each_other():
    hidden, unembedding, ids = draw(3, 8, 6, 30, 2)
    layout = Layout(("data",), None, None)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="count of rows goes with no layout"):
        head(hidden, unembedding, ids, count=3, layout=layout)
