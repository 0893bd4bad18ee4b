"""The matrix product, whose weight or its gradient a CPU has in another order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax.models.products import PANEL, in_panels, product


@pytest.mark.parametrize(("inside", "outside"), [(7, 3), (3, 7), (4, 4)])
def test_values_and_gradients_are_those_of_the_plain_product(inside, outside):
    x, weight = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(5, inside), (inside, outside)])
    )
    ours = jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(product(x, w))), (0, 1))(x, weight)
    plain = jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(x @ w)), (0, 1))(x, weight)
    for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_precision_and_batching_are_kept():
    x = jnp.ones((3, 8, 6), jnp.bfloat16)
    weight = jnp.ones((6, 2), jnp.bfloat16)
    gradient = jax.grad(lambda w: jax.vmap(lambda x: product(x, w))(x).sum().astype(jnp.float32))
    assert gradient(weight).dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient(weight), 24)


@pytest.mark.parametrize("outside", [1, PANEL, PANEL + 1, 3 * PANEL - 5])
def test_panels_are_the_matrix(outside):
    x, weight = jnp.arange(10.0).reshape(2, 5), jnp.arange(5.0 * outside).reshape(5, outside)
    panels = in_panels(weight)
    widths = [part.shape[1] for part in panels.parts]
    assert sum(widths) == outside and max(widths) <= PANEL and set(widths[:-1]) <= {PANEL}
    np.testing.assert_array_equal(product(x, panels), x @ weight)  # whole numbers: exact
    assert product(x.astype(jnp.bfloat16), panels.astype(jnp.bfloat16)).dtype == jnp.bfloat16
