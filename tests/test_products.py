"""The matrix product whose weight's gradient is taken in another order on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax.models.products import product


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
