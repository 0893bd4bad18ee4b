"""The kernels that ship with JAX against XLA's form, and the choice among them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax.models import decoder, fused_attention
from dppo_jax.models.attention import NEGATIVE
from dppo_jax.models.config import DecoderConfig
from dppo_jax.models.decoder import Model, response_states
from dppo_jax.models.fused_attention import Choice, Columns, choose, described, row_attention
from dppo_jax.models.fused_attention import _by_mask as by_mask
from dppo_jax.models.fused_attention import _by_response as by_response

CONFIG = DecoderConfig(
    vocab_size=37, width=8, layers=2, heads=4, kv_heads=2, head_size=8, mlp_width=8
)
COLUMNS = Columns(prompt=6, samples=3, fed=4)


def test_what_a_column_sees_by_hand():
    """A prompt of 2 and two responses of 2; then each with a window of 2."""
    columns, at = Columns(2, 2, 2), np.arange(6)
    seen = columns.sees(at[:, None], at[None, :]).astype(int)
    assert seen.tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]
    near = columns.sees(at[:, None], at[None, :], 2).astype(int)
    assert near.tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


def inputs(heads=4, kv_heads=2, size=8, length=COLUMNS.total):
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, length, n, size)), jnp.float32)
        for n in (heads, kv_heads, kv_heads)
    )
    segments = np.ones((2, length), np.int32)
    segments[0, :2] = 0  # left padding
    segments[1, -2:] = 0  # right padding
    return q, k, v, jnp.asarray(segments)


def plain(q, k, v, segments, columns, scale, soft_cap=None, window=None):
    """All scores at once, row by row and head by head."""
    at = np.arange(columns.total)
    seen = columns.sees(at[:, None], at[None, :], window)
    seen = seen & (segments[:, :, None] == segments[:, None, :])
    k, v = (jnp.repeat(t, q.shape[2] // t.shape[2], axis=2) for t in (k, v))
    scores = jnp.einsum("pshd,pthd->phst", q, k) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, NEGATIVE), axis=-1)
    return jnp.einsum("phst,pthd->pshd", weights, v).reshape(*q.shape[:2], -1)


def both(form, q, k, v, segments):
    """Values and gradients at the real tokens."""

    def loss(q, k, v):
        out = jnp.where(segments[..., None] > 0, form(q, k, v, segments), 0.0)
        return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)


def assert_same(ours, theirs):
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("columns", "soft_cap", "window"),
    [(COLUMNS, 1.5, 3), (Columns(COLUMNS.total), None, None)],
    ids=["shared prompt, soft cap and window", "one sequence"],
)
def test_splash_gives_the_plain_values_and_gradients(monkeypatch, columns, soft_cap, window):
    monkeypatch.setattr(fused_attention, "INTERPRET", True)
    scale, options = 0.4, dict(soft_cap=soft_cap, window=window)

    def splash(*arrays):
        return row_attention("splash", *arrays, columns, scale=scale, **options)

    assert_same(
        both(splash, *inputs()),
        both(lambda *arrays: plain(*arrays, columns, scale, **options), *inputs()),
    )


@pytest.mark.parametrize("columns", [COLUMNS, Columns(7)])
def test_the_mask_that_cudnn_gets(columns):
    """JAX's own operations under it: cuDNN itself needs a GPU."""

    def masked(q, k, v, segments):
        out = by_mask(q, k, v, segments, columns, 0.4, 3, "xla")
        return out.reshape(*out.shape[:2], -1)

    arrays = inputs(length=columns.total)
    assert_same(
        both(masked, *arrays),
        both(lambda *arrays: plain(*arrays, columns, 0.4, window=3), *arrays),
    )


@pytest.mark.parametrize(
    ("columns", "window"), [(COLUMNS, None), (COLUMNS, 3), (Columns(7, 2, 4), None)]
)
def test_responses_by_themselves_for_cudnn(columns, window):
    """Values and gradients by JAX's own operations: a prompt for each of its responses."""

    def apart(*arrays):
        out = by_response(columns, 0.4, window, "xla", *arrays)
        return out.reshape(*out.shape[:2], -1)

    arrays = inputs(length=columns.total)
    assert_same(
        both(apart, *arrays),
        both(lambda *arrays: plain(*arrays, columns, 0.4, window=window), *arrays),
    )


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_a_decoder_with_local_and_global_layers(monkeypatch, kernel):
    """Inside the scan over layers, where the window is traced, against XLA's form; what cuDNN is
    asked for is done by JAX's own operations."""
    config = dataclasses.replace(CONFIG, window=3, local_layers=(True, False))
    params = jax.jit(Model(config).init)(jax.random.key(0))
    rng = np.random.default_rng(1)
    prompt_mask = jnp.asarray(np.arange(5) >= np.array([[0], [3]]))
    response_mask = jnp.asarray(np.arange(4) < np.array([[4], [2], [1], [3]]))
    tokens = [jnp.asarray(rng.integers(37, size=m.shape)) for m in (prompt_mask, response_mask)]
    rows = (tokens[0], prompt_mask, tokens[1], response_mask)

    def states(name):
        model = Model(dataclasses.replace(config, attention=name))

        def masked(params):
            found, _, _ = response_states(model.bind(params), *rows)
            return jnp.where(response_mask[..., None], found, 0.0)

        return jax.jit(masked)(params)

    theirs, attend = states("xla"), jax.nn.dot_product_attention
    monkeypatch.setattr(fused_attention, "INTERPRET", True)
    monkeypatch.setattr(decoder, "choose", lambda _: Choice(kernel))
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *given, implementation, **o: attend(*given, **o)
    )
    assert_same(states("auto"), theirs)


@pytest.mark.parametrize(
    ("platform", "changes", "expected"),
    [
        ("cpu", {}, Choice("xla")),
        ("tpu", {}, Choice("splash")),
        ("tpu", {"attention": "xla"}, Choice("xla")),
        ("gpu", {"dtype": "bfloat16"}, Choice("cudnn")),
        (
            "gpu",
            {},
            Choice("xla", "cudnn attention computes in bfloat16, and this model in float32"),
        ),
        (
            "gpu",
            {"dtype": "bfloat16", "attention_soft_cap": 50.0},
            Choice("xla", "cudnn attention has no soft-cap, and this model needs one"),
        ),
        (
            "gpu",
            {"dtype": "bfloat16", "head_size": 256},
            Choice(
                "xla",
                "cudnn attention takes head sizes that are multiples of 8 up to 128, not 256",
            ),
        ),
    ],
)
def test_the_choice_and_its_reason(monkeypatch, platform, changes, expected):
    target = fused_attention.tiles.Target(platform, "", True)
    monkeypatch.setattr(fused_attention.tiles, "target", lambda: target)
    assert choose(dataclasses.replace(CONFIG, **changes)) == expected
    said = described(dataclasses.replace(CONFIG, **changes))
    assert said == (f"xla: {expected.reason}" if expected.reason else expected.name)


def test_a_forced_name_that_cannot():
    with pytest.raises(ValueError, match='attention="splash" needs a TPU, and this .* for cpu'):
        choose(dataclasses.replace(CONFIG, attention="splash"))
