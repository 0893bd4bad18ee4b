"""The head against the plain form in float64, its memory, and what it skips."""

import inspect
import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_jax.kernels import xla as xla_body
from dppo_jax.kernels.head import HeadOutput, head
from dppo_jax.kernels.reference import reference

LARGE_VOCABULARY = 151936


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of at most 128 columns, so that small vocabularies need several."""
    monkeypatch.setattr(xla_body, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(xla_body, "LEAST_COLUMNS", 128)


def draw(seed, tokens, width, vocabulary, stored, dtype="float32", scale=3.0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(tokens, width))
    unembedding = rng.normal(size=(vocabulary, width)) * scale / width**0.5
    ids = rng.integers(0, vocabulary, size=(tokens, stored))
    # Chunk borders and a repeat are where an index error would hide.
    borders = np.array([0, 127, 128, 255, 256, vocabulary - 1])
    at = rng.integers(0, stored, size=tokens)
    ids[np.arange(tokens), at] = np.minimum(rng.choice(borders, size=tokens), vocabulary - 1)
    ids[:, -1] = ids[:, 0]
    return jnp.asarray(hidden, dtype), jnp.asarray(unembedding, dtype), jnp.asarray(ids, "int32")


def weighted(out, weights):
    """A scalar with the chosen cotangents; None leaves an output out."""
    return sum(jnp.sum(w * o) for w, o in zip(weights, out, strict=True) if w is not None)


@partial(jax.jit, static_argnames=("temperature", "soft_cap"))
def _reference(x, w, ids, weights, temperature, soft_cap):
    def loss(x, w):
        out = reference(x, w, ids, temperature, soft_cap)
        return weighted(out, weights), out

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, w)


def reference64(hidden, unembedding, ids, weights, temperature=1.0, soft_cap=None):
    """Outputs and both gradients of `weighted` in float64 from the same rounded inputs."""
    with jax.enable_x64(True):
        x, w, weights = jax.tree.map(
            lambda a: np.asarray(a, np.float64), (hidden, unembedding, list(weights))
        )
        (_, out), grads = _reference(x, w, np.asarray(ids), weights, temperature, soft_cap)
        return [np.asarray(a) for a in out], [np.asarray(g) for g in grads]


def ours(hidden, unembedding, ids, weights, **options):
    def loss(x, w):
        out = head(x, w, ids, **options)
        return weighted(out, weights), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(hidden, unembedding)
    return out, grads


def cotangents(seed, tokens, stored):
    rng = np.random.default_rng(seed)
    shapes = ((tokens,), (tokens, stored), (tokens,))
    return [jnp.asarray(rng.normal(size=shape), "float32") for shape in shapes]


def assert_close(got, want, relative):
    """Largest error within `relative` of the largest magnitude (a gradient has zeros)."""
    got = np.asarray(got, np.float64)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, rtol=0, atol=relative * (np.abs(want).max() + 1e-6))


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 40),
    width=st.integers(1, 24),
    vocabulary=st.integers(1, 700),
    stored=st.sampled_from([1, 2, 21]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    temperature=st.sampled_from([1.0, 0.7, 2.5]),
    soft_cap=st.sampled_from([None, 5.0, 30.0]),
)
def test_values_and_gradients_are_those_of_float64(
    seed, tokens, width, vocabulary, stored, dtype, temperature, soft_cap
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla_body, "CHUNK_LOGITS", 1)
        patch.setattr(xla_body, "LEAST_COLUMNS", 128)
        args = draw(seed, tokens, width, vocabulary, stored, dtype)
        weights = cotangents(seed, tokens, stored)
        options = dict(temperature=temperature, soft_cap=soft_cap)
        out, grads = ours(*args, weights, **options)
    want, want_grads = reference64(*args, weights, **options)
    for got, expected in zip(out, want, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
    for got, expected, arg in zip(grads, want_grads, args, strict=False):
        assert got.dtype == arg.dtype
        assert_close(got, expected, 5e-5 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("alive", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_each_cotangent_alone_and_in_pairs(alive, chunked, request):
    if chunked:
        request.getfixturevalue("small_chunks")
    args = draw(7, 19, 12, 300, 5)
    weights = [g if i in alive else None for i, g in enumerate(cotangents(7, 19, 5))]
    _, grads = ours(*args, weights, temperature=1.3, soft_cap=8.0)
    _, want = reference64(*args, weights, 1.3, 8.0)
    for got, expected in zip(grads, want, strict=True):
        assert_close(got, expected, 2e-5)


@pytest.mark.parametrize("chunked", [False, True])
def test_float64_stays_float64(chunked, request):
    if chunked:
        request.getfixturevalue("small_chunks")
    args = draw(3, 9, 6, 300, 3)
    weights = cotangents(3, 9, 3)
    want, want_grads = reference64(*args, weights, 0.9, 6.0)
    with jax.enable_x64(True):
        x, w = (jnp.asarray(np.asarray(a, np.float64)) for a in args[:2])
        out, grads = ours(x, w, args[2], weights, temperature=0.9, soft_cap=6.0)
        for got, expected in zip((*out, *grads), (*want, *want_grads), strict=True):
            assert got.dtype == jnp.float64
            np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-11)


def rows(logits):
    """Inputs whose logits are exactly the given rows: the unembedding is the identity."""
    logits = jnp.asarray(logits, jnp.float32)
    return logits, jnp.eye(logits.shape[1], dtype=jnp.float32)


@pytest.mark.parametrize("chunked", [False, True])
def test_extreme_rows(chunked, request):
    if chunked:
        request.getfixturevalue("small_chunks")
    count = 300
    rng = np.random.default_rng(0)
    logits = np.stack([
        np.full(count, 1e4),
        np.full(count, -1e4),
        rng.choice([-1e4, 1e4], size=count),
        np.where(np.arange(count) == 299, 1e4, -1e4),  # one-hot, in the last chunk
        np.where(np.arange(count) == 0, 1e4, -1e4),
        np.zeros(count),
    ])  # fmt: skip
    ids = jnp.asarray(np.stack([np.arange(6), np.full(6, 299)], axis=1), "int32")
    weights = cotangents(0, 6, 2)
    args = (*rows(logits), ids)
    out, grads = ours(*args, weights)
    want, want_grads = reference64(*args, weights)
    for got, expected in zip((*out, *grads), (*want, *want_grads), strict=True):
        assert_close(got, expected, 1e-6)
    np.testing.assert_allclose(out.entropy, want[2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunked", [False, True])
def test_minus_infinity_logits_have_probability_zero(chunked, request):
    if chunked:
        request.getfixturevalue("small_chunks")
    column = np.where(np.arange(400) < 150, -np.inf, np.linspace(-1, 1, 400))  # a whole chunk
    out = head(jnp.ones((1, 1)), jnp.asarray(column[:, None], "float32"), jnp.array([[399, 0]]))
    p = np.exp(column - np.log(np.exp(column).sum()))[150:]
    np.testing.assert_allclose(out.lse, np.log(np.exp(column).sum())[None], rtol=1e-6)
    np.testing.assert_allclose(out.entropy, -(p * np.log(p)).sum()[None], rtol=1e-6)
    np.testing.assert_array_equal(out.logit_at, [[1.0, -np.inf]])


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32"])
def test_ids_outside_the_vocabulary_are_nan_and_have_no_gradient(dtype, chunked, request):
    if chunked:
        request.getfixturevalue("small_chunks")
    vocabulary = 300 if dtype.endswith("32") else 100
    hidden, unembedding, _ = draw(0, 3, 4, vocabulary, 1)
    beyond = {"int8": -1, "uint8": 100, "int32": -1, "uint32": 2**32 - 1}[dtype]
    wrong = np.array([[44, 3], [beyond, 5], [7, beyond]])
    if dtype == "int32":
        wrong[1, 0] = vocabulary
    ids = jnp.asarray(wrong.astype(dtype))
    logit_at = np.asarray(head(hidden, unembedding, ids).logit_at)
    np.testing.assert_array_equal(
        np.isnan(logit_at), [[False, False], [True, False], [False, True]]
    )

    def masked(x):
        out = head(x, unembedding, ids)
        return jnp.sum(jnp.where(jnp.isnan(out.logit_at), 0, out.logit_at))

    expected = np.asarray(unembedding)
    np.testing.assert_allclose(
        jax.grad(masked)(hidden),
        [expected[wrong[0, 0]] + expected[3], expected[5], expected[7]],
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip


def test_a_frequent_token_keeps_its_small_bfloat16_gradients(small_chunks):
    """Every row samples id 5: its gradient row is a sum of N terms, accumulated in float32."""
    hidden = jnp.full((4096, 2), 1.0, "bfloat16")
    unembedding = jnp.zeros((300, 2), "bfloat16")
    ids = jnp.full((4096, 1), 5, "int32")
    grad = jax.grad(lambda w: head(hidden, w, ids).logit_at.sum())(unembedding)
    np.testing.assert_array_equal(np.asarray(grad[5], np.float32), [4096.0, 4096.0])


def temporaries(loss, tokens, width, dtype):
    shape = jax.ShapeDtypeStruct
    compiled = loss.lower(
        shape((tokens, width), dtype),
        shape((LARGE_VOCABULARY, width), dtype),
        shape((tokens, 21), "int32"),
    ).compile()
    return compiled.memory_analysis().temp_size_in_bytes, compiled.as_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_array_of_tokens_by_vocabulary_is_compiled(dtype):
    tokens, width = 2048, 64

    def loss(x, w, ids):
        out = head(x, w, ids)
        return jnp.sum(out.logit_at - out.lse[:, None]) + jnp.sum(out.entropy)

    # The backward's workspace: a chunk's products and their cotangent, and one copy of each in
    # the products' own layout; W's gradient may be a temporary before it is the result.
    chunk = 4 * tokens * xla_body.chunk_columns(tokens, LARGE_VOCABULARY)
    weights = 4 * LARGE_VOCABULARY * width
    for function, bound in ((loss, 3 * chunk), (jax.grad(loss, (0, 1)), 4 * chunk + weights)):
        size, text = temporaries(jax.jit(function), tokens, width, dtype)
        assert size < bound < 4 * tokens * LARGE_VOCABULARY / 2
        assert not re.search(rf"\[{tokens},{LARGE_VOCABULARY}\]", text)
        assert not re.search(rf"\[{LARGE_VOCABULARY},{tokens}\]", text)


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def test_zero_cotangents_cost_nothing():
    """In one chunk the cost analysis counts every operation, so equal counts mean no work left."""
    hidden, unembedding, ids = draw(0, 64, 32, 512, 21)

    def logp(x, w):
        out = head(x, w, ids)
        return jnp.sum(out.logit_at[:, 0] - out.lse), out.entropy

    def with_entropy(x, w):
        value, entropy = logp(x, w)
        return value + jnp.sum(entropy), entropy

    def stored(x, w):
        out = head(x, w, ids, stored_gradient=False)
        return jnp.sum(out.logit_at - out.lse[:, None]), out.entropy

    def jaxpr(function, wanted=(0, 1)):
        return str(jax.make_jaxpr(jax.grad(function, wanted, has_aux=True))(hidden, unembedding))

    def products(function, wanted):
        return jaxpr(function, wanted).count("dot_general")

    assert "scatter" in jaxpr(logp)  # slicing hides the zeros of the stored columns
    assert "scatter" not in jaxpr(stored)
    gradient = jax.grad(logp, (0, 1), has_aux=True)
    with_entropy_gradient = jax.grad(with_entropy, (0, 1), has_aux=True)
    dense = hidden.shape[0] * unembedding.shape[0]
    saved = flops(with_entropy_gradient, hidden, unembedding) - flops(gradient, hidden, unembedding)
    assert saved >= 3 * dense
    assert products(logp, (0, 1)) - products(logp, (0,)) == 1
    assert products(logp, (0, 1)) - products(logp, (1,)) == 1


def test_the_shapes_are_named_when_tracing():
    plain = inspect.unwrap(head)  # below the test run's own type checks
    x, w, ids = jnp.ones((4, 8)), jnp.ones((10, 8)), jnp.zeros((4, 2), "int32")
    cases = [
        ((x[0], w, ids), {}, ValueError, r"hidden \(8,\)"),
        ((x, w[:, :5], ids), {}, ValueError, r"widths.*\(10, 5\)"),
        ((x, w, ids[:3]), {}, ValueError, r"token counts.*\(3, 2\)"),
        ((x, w, ids[:, :0]), {}, ValueError, r"ids \(4, 0\)"),
        ((x, w, ids.astype("float32")), {}, TypeError, "integer ids; got float32"),
        ((x.astype("float16"), w, ids), {}, TypeError, "got float16"),
        ((x, w, ids), {"temperature": 0.0}, ValueError, "temperature.*got 0.0"),
        ((x, w, ids), {"soft_cap": -1.0}, ValueError, "soft_cap.*got -1.0"),
        ((x, w, ids), {"body": "cuda"}, ValueError, "'cuda'; known: pallas_tpu, reference, xla"),
    ]
    for args, options, error, message in cases:
        with pytest.raises(error, match=message):
            jax.eval_shape(lambda *a, o=options: plain(*a, **o), *args)


def test_the_reference_body_is_the_same_function():
    args = draw(1, 5, 4, 50, 3)
    got = head(*args, temperature=0.8, soft_cap=4.0)
    want = head(*args, temperature=0.8, soft_cap=4.0, body="reference")
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_no_tokens():
    out = head(jnp.ones((0, 8)), jnp.ones((10, 8)), jnp.zeros((0, 3), "int32"))
    assert isinstance(out, HeadOutput)
    assert out.lse.shape == (0,) and out.logit_at.shape == (0, 3)


SHARDED = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from dppo_jax.kernels import xla
from dppo_jax.kernels.head import head
from test_head import cotangents, draw, weighted
xla.CHUNK_LOGITS, xla.LEAST_COLUMNS = 1, 128
args, weights = draw(5, 32, 16, 520, 5), cotangents(5, 32, 5)
def loss(x, w, ids):
    return weighted(head(x, w, ids, soft_cap=9.0), weights)
step = jax.jit(jax.value_and_grad(loss, (0, 1)))
want = jax.tree.leaves(step(*args))
mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
for spec in (P(None, "data"), P("model"), P("model", "data"), P(("data", "model"))):
    specs = (P("data"), spec, P("data"))
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(args, specs)]
    for a, b in zip(want, jax.tree.leaves(step(*placed))):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-5, atol=2e-5)
print("same")
"""


@pytest.mark.multidevice
def test_sharded_inputs_give_the_same_values():
    here = os.path.dirname(os.path.abspath(__file__))
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([os.path.dirname(here), here]),
    }
    run = [sys.executable, "-c", SHARDED]
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "same", done.stderr
