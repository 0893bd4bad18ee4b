"""The mixture of experts against a dense form that runs every expert on every token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax.models.config import DecoderConfig
from dppo_jax.models.moe import expert_mlps, route

TOKENS, WIDTH, EXPERTS, EACH, MLP = 23, 10, 7, 3, 6


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    shapes = dict(
        y=(TOKENS, WIDTH),
        router=(WIDTH, EXPERTS),
        gate=(EXPERTS, WIDTH, MLP),
        up=(EXPERTS, WIDTH, MLP),
        down=(EXPERTS, MLP, WIDTH),
    )
    return {name: jnp.asarray(0.5 * rng.normal(size=s), jnp.float32) for name, s in shapes.items()}


def sparse(x, normalised):
    gates, chosen, _ = route(x["y"], x["router"], EACH, normalised)
    return expert_mlps(x["y"], gates, chosen, x["gate"], x["up"], x["down"], jax.nn.silu)


def dense(x, normalised):
    p = jax.nn.softmax(x["y"] @ x["router"])
    kept = jnp.where(p >= jnp.sort(p)[:, -EACH, None], p, 0.0)
    if normalised:
        kept /= kept.sum(-1, keepdims=True)
    opened = jax.nn.silu(jnp.einsum("nd,edf->nef", x["y"], x["gate"]))
    hidden = opened * jnp.einsum("nd,edf->nef", x["y"], x["up"])
    return jnp.einsum("ne,nef,efd->nd", kept, hidden, x["down"])


@pytest.mark.parametrize("normalised", [True, False])
def test_values_and_gradients_are_those_of_the_dense_form(normalised):
    def of(form):
        def loss(x):
            out = form(x, normalised)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs())

    for ours, theirs in zip(*map(jax.tree.leaves, (of(sparse), of(dense))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def test_no_token_is_dropped_however_uneven_the_choice():
    """A router that sends every token to the same experts, and leaves others without any."""
    x = inputs()
    x["y"] = jnp.abs(x["y"])
    x["router"] = jnp.zeros((WIDTH, EXPERTS)).at[:, 2:5].add(jnp.array([3.0, 2.0, 1.0]))
    _, chosen, _ = route(x["y"], x["router"], EACH, True)
    assert (np.asarray(chosen) == [2, 3, 4]).all()
    np.testing.assert_allclose(sparse(x, True), dense(x, True), rtol=2e-5, atol=2e-5)


def test_routing_is_in_float32_whatever_the_activations():
    x = inputs()
    half = x["y"].astype(jnp.bfloat16)
    gates, chosen, _ = route(half, x["router"], EACH, True)
    exact, same, _ = route(half.astype(jnp.float32), x["router"], EACH, True)
    assert gates.dtype == jnp.float32
    np.testing.assert_array_equal(chosen, same)
    np.testing.assert_array_equal(gates, exact)
    out = expert_mlps(half, gates, chosen, x["gate"], x["up"], x["down"], jax.nn.silu)
    assert out.dtype == jnp.bfloat16


def test_more_experts_a_token_than_there_are():
    config = DecoderConfig(
        vocab_size=9, width=4, layers=1, heads=1, kv_heads=1, head_size=4, mlp_width=4
    )
    with pytest.raises(ValueError, match="experts_per_token=3 is not within 1..2"):
        dataclasses.replace(config, experts=2, experts_per_token=3)
