"""The mixture of experts against a dense form that runs every expert on every token."""

import dataclasses
import itertools
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax.models.config import DecoderConfig
from dppo_jax.models.decoder import Model
from dppo_jax.models.grouped import (
    gradient_by_expert,
    gradient_in_turn,
    grouped_product,
    product_in_batches,
)
from dppo_jax.models.moe import Load, Routing, expert_mlps, route
from dppo_jax.objectives import dppo_binary_tv
from dppo_jax.optimizer import adamw
from dppo_jax.records import Batch, Rollout
from dppo_jax.update import init_state, make_update

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
    gates, chosen, *_ = route(x["y"], x["router"], EACH, normalised)
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
    _, chosen, *_ = route(x["y"], x["router"], EACH, True)
    assert (np.asarray(chosen) == [2, 3, 4]).all()
    np.testing.assert_allclose(sparse(x, True), dense(x, True), rtol=2e-5, atol=2e-5)


def test_routing_is_in_float32_whatever_the_activations():
    x = inputs()
    half = x["y"].astype(jnp.bfloat16)
    gates, chosen, *_ = route(half, x["router"], EACH, True)
    exact, same, *_ = route(half.astype(jnp.float32), x["router"], EACH, True)
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


def test_load_by_hand():
    """Two real tokens and one that is none, over three experts; then a second, even layer."""
    probability = jnp.array([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [0.0, 0.0, 1.0]])
    native = jnp.array([[0, 1], [0, 2], [2, 1]])
    one = Routing(native * 0.0, native, native, probability).load(jnp.array([True, True, False]))
    np.testing.assert_allclose(one.chosen, [2, 1, 1])
    np.testing.assert_allclose(one.probability, [1.1, 0.4, 0.5], rtol=1e-6)
    both = jax.tree.map(
        lambda a, b: jnp.stack([a, jnp.asarray(b)]),
        one,
        Load(jnp.full(3, 4 / 3), jnp.full(3, 2 / 3), 2.0),
    )
    shares = np.array([10 / 3, 7 / 3, 7 / 3]) / 4
    means = np.array([1.1 + 2 / 3, 0.4 + 2 / 3, 0.5 + 2 / 3]) / 4
    np.testing.assert_allclose(both.loss(), 3 * np.sum(shares * means), rtol=1e-6)
    np.testing.assert_allclose(both.highest(), 2 / (4 / 3), rtol=1e-6)


def test_load_balancing_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    qwen = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 12, EXPERTS)).astype(np.float32)
    real = rng.random(12) < 0.7
    theirs = qwen.load_balancing_loss_func(
        tuple(map(torch.tensor, logits)), EXPERTS, EACH, torch.tensor(real.reshape(3, 4))
    )
    layers = [
        route(jnp.asarray(each), jnp.eye(EXPERTS), EACH, True).load(jnp.asarray(real))
        for each in logits
    ]
    load = jax.tree.map(lambda *each: jnp.stack(each), *layers)
    np.testing.assert_allclose(load.loss(), theirs.item(), rtol=1e-6)


def test_the_update_balances_the_load():
    """Without advantages only the load's term moves the router: its loss falls, by its gradient."""
    config = DecoderConfig(
        vocab_size=9, width=8, layers=1, heads=1, kv_heads=1, head_size=4, mlp_width=4,
        experts=6, experts_per_token=2, normalised_gates=True, load_balancing=1.0,
    )  # fmt: skip
    model, optimizer = Model(config), adamw(learning_rate=0.02)
    tokens = jax.random.randint(jax.random.key(1), (8, 5), 0, 9)
    shape, real = tokens.shape, jnp.ones(tokens.shape, bool)
    none = jnp.zeros(shape)
    rollout = Rollout(
        prompt_tokens=tokens[:, :3], prompt_mask=real[:, :3], response_tokens=tokens,
        response_mask=real, logp_rollout=none, topk_ids=jnp.zeros((*shape, 1), jnp.int32),
        topk_logp_rollout=jnp.zeros((*shape, 1)), entropy_rollout=none,
        finish_reason=jnp.zeros(8, jnp.int32),
    )  # fmt: skip
    update = make_update(model, dppo_binary_tv(), optimizer, temperature=1.0, microbatches=2)
    state = init_state(
        jax.tree.map(lambda leaf: 3 * leaf, model.init(jax.random.key(0))), optimizer
    )
    seen = []
    for _ in range(20):
        state, metrics = update(state, Batch(rollout, none))
        seen.append(
            [float(m.sum / m.count) for m in (metrics["moe/aux_loss"], metrics["loss/total"])]
        )
        assert metrics["moe/max_load"].value >= 1
    losses, totals = np.transpose(seen)
    np.testing.assert_allclose(losses, totals, rtol=1e-5)
    assert losses[0] > 2.1 and losses[-1] < 0.5 * losses[0] + 0.5 * 2.0  # 2 is even
    with pytest.raises(ValueError, match="load_balancing=1.0 is for models with experts"):
        dataclasses.replace(config, experts=0)


@pytest.mark.parametrize("sizes", [(40, 0, 61, 20), (0, 0, 0, 130), (0, 0, 0, 0)])
def test_products_of_experts_in_blocks(sizes):
    """A CPU's, which run into the next expert's rows, and a GPU's, which are padded; experts of
    several blocks and of none; bfloat16 too."""
    rows, ends = 140, np.cumsum([0, *sizes])
    x = jax.random.normal(jax.random.key(0), (rows, 6)).at[ends[-1] :].set(jnp.nan)
    weight = jax.random.normal(jax.random.key(1), (len(sizes), 6, 5))
    d_out = jax.random.normal(jax.random.key(2), (rows, 5))
    product = partial(grouped_product, sizes=jnp.array(sizes, jnp.int32))
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.02)):
        given = [leaf.astype(dtype) for leaf in (x, weight, d_out)]

        @jax.jit
        def of(x, weight, d_out):
            out, back = jax.vjp(product, x, weight)
            on_gpu = (
                product_in_batches(x, weight, product.keywords["sizes"]),
                product_in_batches(d_out, weight, product.keywords["sizes"], turned=True),
                gradient_in_turn(x, d_out, product.keywords["sizes"]),
            )
            return (out, *back(d_out)), on_gpu

        each = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), of(*given))
        x_, w_, d_ = (np.asarray(leaf, np.float32) for leaf in given)
        for found, (e, start, end) in itertools.product(
            each, zip(range(len(sizes)), ends[:-1], ends[1:], strict=True)
        ):
            mine = slice(start, end)
            for ours, theirs in (
                (found[0][mine], x_[mine] @ w_[e]),
                (found[1][mine], d_[mine] @ w_[e].T),
                (found[2][e], x_[mine].T @ d_[mine]),
            ):
                largest = max(1.0, np.max(np.abs(theirs), initial=0.0))
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * largest)


def test_on_a_gpu_nothing_is_as_large_as_rows_times_experts():
    """Of a layer as it is lowered for CUDA, forward and backward: no product of XLA's own for
    experts, which it makes of masked copies, and no array beyond padded rows and the gradient."""
    rows, width, mlp, experts = 4096, 256, 64, 32
    x, d_out = (jax.ShapeDtypeStruct((rows, n), jnp.bfloat16) for n in (width, mlp))
    weight = jax.ShapeDtypeStruct((experts, width, mlp), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)

    def both(x, weight, sizes, d_out):
        out, back = jax.vjp(lambda x, w: grouped_product(x, w, sizes), x, weight)
        return out, *back(d_out)

    lowered = jax.jit(both).trace(x, weight, sizes, d_out).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "ragged_dot" not in text and text.count("dot_general") == 6
    shapes = re.findall(r"tensor<((?:\d+x)+)(bf16|f32|i32)>", text)
    largest = max(math.prod(map(int, dims.rstrip("x").split("x"))) for dims, _ in shapes)
    assert experts * width * mlp < largest == 2 * rows * width


@pytest.mark.parametrize("rows", [128, 150])
def test_the_gradient_of_experts_by_a_tpus_kernel(rows):
    """An expert without rows, and rows without an expert, which may hold anything."""
    sizes = jnp.array([40, 0, 61, 20], jnp.int32)
    x, d_out = (jax.random.normal(jax.random.key(i), (rows, n)) for i, n in enumerate((16, 24)))
    x = x.at[121:].set(jnp.nan)
    ours = gradient_by_expert(x, d_out, sizes, interpret=True)
    ends = np.cumsum([0, *sizes])
    for expert, (start, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        np.testing.assert_allclose(ours[expert], x[start:end].T @ d_out[start:end], atol=1e-4)
