"""Streamed divergences against the plain form in float64, their memory, and what they refuse."""

import inspect
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_jax import divergence
from dppo_jax.kernels import divergences as divergences_module
from dppo_jax.kernels import xla as xla_body
from dppo_jax.kernels.divergences import Policy, divergences
from dppo_jax.metrics import reduce_metrics
from dppo_jax.models.decoder import full_forward
from dppo_jax.records import Rollout
from dppo_jax.scoring import score, tightness

LARGE_VOCABULARY = 151936


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of at most 128 columns, so that small vocabularies need several."""
    monkeypatch.setattr(xla_body, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(divergences_module, "LEAST_COLUMNS", 128)


def plain64(mu, pi):
    """TV, KL(mu || pi) and KL(pi || mu) by their definitions, from all N x V probabilities."""

    def log_probs(policy):
        x, w = (np.asarray(a, np.float64) for a in policy[:2])
        z = x @ w.T
        if policy.soft_cap is not None:
            z = policy.soft_cap * np.tanh(z / policy.soft_cap)
        z = z / policy.temperature
        z = z - z.max(axis=1, keepdims=True)
        return z - np.log(np.exp(z).sum(axis=1, keepdims=True))

    def kl(log_a, log_b):
        a = np.exp(log_a)
        with np.errstate(invalid="ignore"):
            return np.where(a > 0, a * (log_a - log_b), 0.0).sum(axis=1)

    log_p, log_q = log_probs(mu), log_probs(pi)
    tv = 0.5 * np.abs(np.exp(log_p) - np.exp(log_q)).sum(axis=1)
    return tv, kl(log_p, log_q), kl(log_q, log_p)


def policy(rng, tokens, width, vocabulary, dtype, temperature=1.0, soft_cap=None):
    hidden = rng.normal(size=(tokens, width))
    unembedding = rng.normal(size=(vocabulary, width)) * 3 / width**0.5
    return Policy(
        jnp.asarray(hidden, dtype), jnp.asarray(unembedding, dtype), temperature, soft_cap
    )


def jitted(mu, pi):
    """`divergences`, compiled as one program (call by call, XLA compiles every operation)."""

    def of(*arrays):
        return divergences(Policy(*arrays[:2], *mu[2:]), Policy(*arrays[2:], *pi[2:]))

    return jax.jit(of)(*mu[:2], *pi[:2])


def moved(rng, of, distance):
    """A policy near another: every weight off by a relative `distance`."""

    def near(x):
        return (x * (1 + distance * rng.normal(size=x.shape))).astype(x.dtype)

    return of._replace(hidden=near(of.hidden), unembedding=near(of.unembedding))


@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 40),
    widths=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    vocabulary=st.integers(1, 700),
    dtypes=st.sampled_from([("float32", "float32"), ("bfloat16", "bfloat16"),
                            ("bfloat16", "float32")]),
    temperatures=st.sampled_from([(1.0, 1.0), (0.7, 1.0), (0.7, 0.7)]),
    soft_caps=st.sampled_from([(None, None), (5.0, None), (30.0, 8.0)]),
)  # fmt: skip
def test_values_are_those_of_float64(
    seed, tokens, widths, vocabulary, dtypes, temperatures, soft_caps
):
    rng = np.random.default_rng(seed)
    mu, pi = (
        policy(rng, tokens, *args, temperature, cap)
        for *args, temperature, cap in zip(
            widths, (vocabulary,) * 2, dtypes, temperatures, soft_caps, strict=True
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla_body, "CHUNK_LOGITS", 1)
        patch.setattr(divergences_module, "LEAST_COLUMNS", 128)
        out = jitted(mu, pi)
    for got, expected in zip(out, plain64(mu, pi), strict=True):
        assert got.dtype == jnp.float32 and got.shape == (tokens,)
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
def test_near_policies_keep_their_digits(small_chunks, distance):
    """KL falls with the square of the distance: at 1e-3 it is 3e-5, beside log-sum-exps of 7."""
    rng = np.random.default_rng(0)
    mu = policy(rng, 50, 16, 500, "float32")
    pi = moved(rng, mu, distance)
    out, want = jitted(mu, pi), plain64(mu, pi)
    assert want[1].max() < 50 * distance**2
    for got, expected in zip(out, want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-6 / distance + 2e-5)


def test_equal_policies_are_exactly_zero_apart(small_chunks):
    mu = policy(np.random.default_rng(0), 7, 5, 300, "bfloat16", 0.8)
    assert all((np.asarray(value) == 0).all() for value in divergences(mu, mu))


def test_float64_stays_float64(small_chunks):
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        mu, pi = (policy(rng, 9, 6, 300, "float64", t, 6.0) for t in (0.9, 1.0))
        for got, expected in zip(jitted(mu, pi), plain64(mu, pi), strict=True):
            assert got.dtype == jnp.float64
            np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)


def column_policy(logits):
    """One token whose logits are exactly these."""
    return Policy(jnp.ones((1, 1)), jnp.asarray(np.asarray(logits)[:, None], jnp.float32))


@pytest.mark.parametrize("chunked", [False, True])
def test_probabilities_of_zero(chunked, request):
    """0 log 0 = 0 on both sides; a 0 of the second policy alone is an infinite KL."""
    if chunked:
        request.getfixturevalue("small_chunks")
    at = np.arange(400)
    mu = np.where(at < 150, -np.inf, np.linspace(-1, 1, 400))  # a whole chunk of zeros
    pi = np.where((at < 150) & (at != 3), -np.inf, np.linspace(1, -1, 400))
    out = jitted(column_policy(mu), column_policy(pi))
    want = plain64(column_policy(mu), column_policy(pi))
    np.testing.assert_allclose(out.tv, want[0], rtol=1e-5)
    np.testing.assert_allclose(out.kl, want[1], rtol=1e-5)
    assert np.isfinite(out.kl).all() and out.reverse_kl[0] == np.inf == want[2][0]


@pytest.mark.parametrize("chunked", [False, True])
def test_extreme_rows(chunked, request):
    if chunked:
        request.getfixturevalue("small_chunks")
    one_hot = np.where(np.arange(300) == 299, 1e4, -1e4)
    flat = np.full(300, 1e4)
    out = jitted(column_policy(one_hot), column_policy(one_hot[::-1]))
    assert out.tv[0] == 1 and out.kl[0] == out.reverse_kl[0] == 2e4
    out = jitted(column_policy(flat), column_policy(one_hot))
    np.testing.assert_allclose(out.tv, 299 / 300, rtol=1e-6)
    np.testing.assert_allclose(out.kl, 299 / 300 * 2e4 - np.log(300), rtol=1e-6)
    np.testing.assert_allclose(out.reverse_kl, np.log(300), rtol=1e-6)


def test_agrees_with_the_divergences_of_whole_vectors():
    rng = np.random.default_rng(2)
    mu = policy(rng, 20, 8, 90, "float32")
    pi = moved(rng, mu, 0.2)
    log_p, log_q = (jax.nn.log_softmax(p.hidden @ p.unembedding.T) for p in (mu, pi))
    out = jitted(mu, pi)
    np.testing.assert_allclose(out.tv, divergence.exact_tv(log_p, log_q), rtol=1e-4)
    np.testing.assert_allclose(out.kl, divergence.exact_kl(log_p, log_q), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(
        out.reverse_kl, divergence.exact_kl(log_q, log_p), rtol=1e-3, atol=1e-6
    )


def test_nothing_is_differentiated():
    mu = policy(np.random.default_rng(0), 4, 3, 20, "float32")

    def total(hidden, unembedding):
        return sum(jnp.sum(d) for d in divergences(mu, Policy(hidden, unembedding)))

    gradients = jax.grad(total, (0, 1))(mu.hidden * 2, mu.unembedding)
    assert all((np.asarray(g) == 0).all() for g in gradients)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_array_of_tokens_by_vocabulary_is_compiled(dtype):
    tokens, width = 2048, 64
    hidden = jax.ShapeDtypeStruct((tokens, width), dtype)
    unembedding = jax.ShapeDtypeStruct((LARGE_VOCABULARY, width), dtype)

    @jax.jit
    def both(*arrays):
        return divergences(Policy(*arrays[:2]), Policy(*arrays[2:]))

    compiled = both.lower(hidden, unembedding, hidden, unembedding).compile()
    size, text = compiled.memory_analysis().temp_size_in_bytes, compiled.as_text()
    # Both policies' products and logits, and their difference. XLA's CPU compiler multiplies
    # bfloat16 in float32, from a copy of the matrices that it makes before the loop.
    chunk = 4 * tokens * xla_body.chunk_columns(2 * tokens, LARGE_VOCABULARY, 1024)
    copies = 2 * 4 * LARGE_VOCABULARY * width if dtype == "bfloat16" else 0
    assert size < 5.5 * chunk + copies < 4 * tokens * LARGE_VOCABULARY / 4
    assert not re.search(rf"\[{tokens},{LARGE_VOCABULARY}\]", text)
    assert not re.search(rf"\[{LARGE_VOCABULARY},{tokens}\]", text)


def test_the_shapes_are_named_when_tracing():
    plain = inspect.unwrap(divergences)  # below the test run's own type checks
    x, w = jnp.ones((4, 8)), jnp.ones((10, 8))
    good = Policy(x, w)
    cases = [
        (Policy(x[0], w), good, r"mu.hidden \(8,\)"),
        (good, Policy(x, w[:, :5]), r"widths D.*pi.unembedding \(10, 5\)"),
        (good, Policy(x[:3], w), r"token counts.*pi.hidden \(3, 8\)"),
        (Policy(x, w[:9]), good, r"one vocabulary.*mu.unembedding \(9, 8\)"),
        (good, Policy(x, w, 0.0), "temperature.*got 0.0"),
        (Policy(x, w, 1.0, -2.0), good, "soft_cap.*got -2.0"),
    ]
    for mu, pi, message in cases:
        with pytest.raises(ValueError, match=message):
            plain(mu, pi)


def test_no_tokens():
    empty = Policy(jnp.ones((0, 8)), jnp.ones((10, 8)))
    assert all(value.shape == (0,) for value in divergences(empty, empty))


@pytest.fixture(scope="module")
def scored(tiny):
    """Two policies, a rollout of three sequences without padding, and its log-probabilities [B,T,V]
    by whole forward passes."""
    model, theirs = tiny
    rng = np.random.default_rng(0)
    ours = jax.tree.map(lambda p: p + 0.05 * rng.normal(size=p.shape).astype(p.dtype), theirs)
    tokens = jnp.asarray(rng.integers(37, size=(3, 7)), jnp.int32)
    everywhere = jnp.ones_like(tokens, bool)

    def log_probs(params):
        decoder = model.bind(params)
        hidden, _ = full_forward(decoder, tokens, everywhere)
        return jax.nn.log_softmax(hidden[:, 1:-1] @ decoder.unembedding_matrix().T / 0.8)

    log_mu, log_pi = map(jax.jit(log_probs), (theirs, ours))
    topk_logp, topk_ids = jax.lax.top_k(log_mu, 4)
    responses = tokens[:, 2:]
    rollout = Rollout(
        prompt_tokens=tokens[:, :2],
        prompt_mask=everywhere[:, :2],
        response_tokens=responses,
        response_mask=everywhere[:, 2:].at[1, 2:].set(False),
        logp_rollout=jnp.take_along_axis(log_mu, responses[..., None], -1)[..., 0],
        topk_ids=topk_ids,
        topk_logp_rollout=topk_logp,
        entropy_rollout=jnp.zeros(responses.shape),
        finish_reason=jnp.zeros(3, jnp.int32),
    )
    return model, theirs, ours, rollout, log_mu, log_pi


def test_scores_of_two_policies(scored):
    model, theirs, ours, rollout, log_mu, log_pi = scored

    @jax.jit
    def both(ours, theirs):
        plain = score(model, ours, rollout, temperature=0.8)
        return score(model, ours, rollout, temperature=0.8, rollout_params=theirs), plain

    stats, plain = both(ours, theirs)
    mask = np.asarray(rollout.response_mask)
    for got, of in ((stats.exact_tv, divergence.exact_tv), (stats.exact_kl, divergence.exact_kl)):
        want = np.asarray(of(log_mu, log_pi))
        np.testing.assert_allclose(np.asarray(got)[mask], want[mask], rtol=1e-3, atol=1e-5)
    assert plain.exact_tv is plain.exact_kl is None
    np.testing.assert_array_equal(stats.logp, plain.logp)


def test_tightness_by_whole_vectors(scored):
    model, theirs, ours, rollout, log_mu, log_pi = scored
    mask = np.asarray(rollout.response_mask)
    measure = jax.jit(lambda *params: tightness(model, *params, rollout, temperature=0.8))
    numbers = reduce_metrics(measure(theirs, ours))
    at = rollout.response_tokens[..., None]
    sampled = [jnp.take_along_axis(log_p, at, -1)[..., 0] for log_p in (log_mu, log_pi)]
    best = [jnp.take_along_axis(log_p, rollout.topk_ids, -1) for log_p in (log_mu, log_pi)]
    support = *sampled, rollout.response_tokens, rollout.topk_ids, *best
    for kind in ("tv", "kl"):
        exact, binary, topk = (
            float(jnp.sum(getattr(divergence, f"{form}_{kind}")(*of), where=mask))
            for form, of in (("exact", (log_mu, log_pi)), ("binary", sampled), ("topk", support))
        )
        assert numbers[f"divergence/exact_{kind}_mean"] == pytest.approx(
            exact / mask.sum(), rel=1e-3
        )
        assert numbers[f"divergence/binary_{kind}_over_exact"] == pytest.approx(
            binary / exact, 1e-3
        )
        assert numbers[f"divergence/topk_{kind}_over_exact"] == pytest.approx(topk / exact, 1e-3)
        assert 0 < binary < topk < exact


ON_A_MESH = """
import jax, numpy as np
from jax.sharding import AxisType
from dppo_jax.kernels import divergences as module, xla
from dppo_jax.kernels.divergences import Policy, divergences
from dppo_jax.metrics import reduce_metrics
from dppo_jax.models.decoder import full_forward
from dppo_jax.records import Rollout
from dppo_jax.scoring import score, tightness
from dppo_jax.kernels.sharded import Layout
from test_exact_divergences import moved, plain64, policy
xla.CHUNK_LOGITS, module.LEAST_COLUMNS = 1, 128
rng = np.random.default_rng(0)
mu = policy(rng, 16, 8, 1040, "float32", 0.8)
pi = moved(rng, mu, 0.1)
mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
layout = Layout(tokens=("data",), vocabulary="model", width="data")
def both(*arrays):
    mu, pi = Policy(*arrays[:2], 0.8), Policy(*arrays[2:], 0.8)
    return divergences(mu, pi, layout=layout)
with jax.set_mesh(mesh):
    program = jax.jit(both).lower(*mu[:2], *pi[:2]).compile()
    for a, b in zip(program(*mu[:2], *pi[:2]), plain64(mu, pi)):
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-4)
text = program.as_text()
# what crosses the mesh is numbers a token: [8] of them on each device
crossing = [line.split(" = ")[1].split(" all-")[0] for line in text.splitlines()
            if " all-reduce(" in line or " all-gather(" in line]
assert crossing and not [shape for shape in crossing if "1040" in shape or "260" in shape], crossing
print("same")
"""


@pytest.mark.multidevice
def test_a_split_vocabulary_gives_the_same_values():
    here = os.path.dirname(os.path.abspath(__file__))
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([os.path.dirname(here), here]),
    }
    run = [sys.executable, "-c", ON_A_MESH]
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "same", done.stderr
