"""The matrix product, whose weight or its gradient a CPU has in another order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax.kernels import panels
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


@pytest.mark.parametrize("rows", [1, panels.FEW, panels.FEW + 1])
@pytest.mark.parametrize(
    ("cut", "outside"),
    [
        (panels.apart, panels.COLUMNS + 1),
        (panels.apart, 3 * panels.COLUMNS - 5),
        (panels.together, 2 * panels.COLUMNS),
        (panels.together, 5 * panels.COLUMNS),
    ],
)
def test_panels_are_the_matrix(cut, outside, rows):
    x, weight = jnp.arange(5.0 * rows).reshape(rows, 5), jnp.arange(5.0 * outside).reshape(5, -1)
    cut_up = cut(weight)
    widths = [part.shape[-1] for part in cut_up.parts]
    assert sum(widths) == outside == cut_up.columns and max(widths) <= panels.COLUMNS
    assert set(widths[:-1]) <= {panels.COLUMNS}
    np.testing.assert_array_equal(product(x, cut_up), x @ weight)  # whole numbers: exact
    half = x.astype(jnp.bfloat16), cut_up.astype(jnp.bfloat16)
    assert product(*half).dtype == jnp.bfloat16
    summed = panels.product(*half, jnp.float32)
    plain = jnp.dot(half[0], weight.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    assert summed.dtype == jnp.float32
    np.testing.assert_allclose(summed, plain, rtol=1e-5)


def test_what_is_no_panels_stays_as_it_is():
    narrow, uneven = jnp.ones((5, panels.COLUMNS)), jnp.ones((5, 3 * panels.COLUMNS // 2))
    large = jnp.ones((panels.LARGEST // panels.COLUMNS, 2 * panels.COLUMNS))
    assert panels.apart(narrow) is panels.together(narrow) is narrow
    assert panels.together(uneven) is uneven and len(panels.apart(uneven).parts) == 2
    assert panels.apart(large) is large and panels.together(large) is not large
