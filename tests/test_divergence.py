"""Divergences against float64 sums, OBJECTIVES' hand-computed examples, and recorded values."""

import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_jax import divergence

GOLDEN = Path(__file__).parent / "golden"


def logs(*values):
    return jnp.log(jnp.asarray(values, jnp.float32))


def policies(seed, vocab, scale, drift):
    """Two log-distributions in float64, and a token drawn anywhere in the vocabulary."""
    rng = np.random.default_rng(seed)
    logits = scale * rng.normal(size=vocab)
    other = logits + drift * rng.normal(size=vocab)
    log_mu, log_pi = (x - np.logaddexp.reduce(x) for x in (logits, other))
    return log_mu, log_pi, int(rng.integers(vocab))


def bucketed(log_mu, log_pi, support):
    """TV and KL in float64 over the tokens of `support` and one bucket for the rest, and d KL /
    d (the rest's mass)."""
    rest = sorted(set(range(len(log_mu))) - set(support))
    sums = []
    for log_p in (log_mu, log_pi):
        p = np.exp(log_p)
        sums.append([*p[list(support)], *([p[rest].sum()] if rest else [])])
    mu, pi = np.array(sums)
    conditioning = (mu / pi)[-1] if rest else 0.0
    return 0.5 * np.abs(mu - pi).sum(), (mu * np.log(mu / pi)).sum(), conditioning


def topk(name, log_mu, log_pi, token, k):
    ids = np.argsort(-log_mu)[:k]
    return float(
        getattr(divergence, name)(
            jnp.float32(log_mu[token]),
            jnp.float32(log_pi[token]),
            jnp.int32(token),
            jnp.asarray(ids, jnp.int32),
            jnp.asarray(log_mu[ids], jnp.float32),
            jnp.asarray(log_pi[ids], jnp.float32),
        )
    )


@pytest.mark.parametrize(
    "mu, pi, tv, kl",
    [
        (0.5, 0.51, 0.01, 0.000200),
        (0.5, 0.62, 0.12, 0.029663),
        (0.9, 0.6, 0.3, 0.226289),
        (0.9, 0.74, 0.16, 0.080619),
        (0.01, 0.2, 0.19, 0.181005),
        (0.2, 0.01, 0.19, 0.428672),
        (1e-4, 1e-6, 0.000099, 0.000362),
        (0.999, 0.8, 0.199, 0.216623),
    ],
)
def test_binary_values(mu, pi, tv, kl):
    np.testing.assert_allclose(divergence.binary_tv(logs(mu), logs(pi)), [tv], atol=5e-7)
    np.testing.assert_allclose(divergence.binary_kl(logs(mu), logs(pi)), [kl], atol=6e-7)


def test_five_token_example():
    """K = 2 and sampled token 3: the union has three tokens, the paper's code replaces slot 1."""
    log_mu = logs(0.5, 0.3, 0.1, 0.06, 0.04)
    log_pi = logs(0.35, 0.35, 0.1, 0.12, 0.08)
    ids = jnp.array([0, 1])
    union = (log_mu[3], log_pi[3], jnp.int32(3), ids, log_mu[ids], log_pi[ids])
    slots = (log_mu[jnp.array([0, 3])], log_pi[jnp.array([0, 3])])
    values = {
        "exact": (divergence.exact_tv(log_mu, log_pi), divergence.exact_kl(log_mu, log_pi)),
        "union": (divergence.topk_tv(*union), divergence.topk_kl(*union)),
        "slots": (divergence.topk_slots_tv(*slots), divergence.topk_slots_kl(*slots)),
        "binary": (
            divergence.binary_tv(log_mu[3], log_pi[3]),
            divergence.binary_kl(log_mu[3], log_pi[3]),
        ),
    }
    expected = {
        "exact": (0.15, 0.0627775),
        "union": (0.15, 0.0553194),
        "slots": (0.15, 0.0548636),
        "binary": (0.06, 0.0204117),
    }
    for name in expected:
        np.testing.assert_allclose(values[name], expected[name], atol=2e-7, err_msg=name)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.1, 1.0, 4.0]),
    drift=st.sampled_from([1e-3, 0.3, 3.0]),
)
def test_coarser_buckets_see_less(seed, scale, drift):
    """Binary <= Top-K <= Top-(K+1) <= exact, each equal to its float64 sum; K = V is exact.

    KL's slack: an error of the rest's mass, a difference of float32 numbers, counts μ/π times.
    """
    vocab = 6
    log_mu, log_pi, token = policies(seed, vocab, scale, drift)
    whole = jnp.asarray(log_mu, jnp.float32), jnp.asarray(log_pi, jnp.float32)
    at_token = whole[0][token], whole[1][token]
    for column, kind in enumerate(("tv", "kl")):
        supports = [{token}] + [
            {token, *np.argsort(-log_mu)[:k].tolist()} for k in (0, 1, 2, 4, vocab)
        ]
        values = [bucketed(log_mu, log_pi, sorted(support)) for support in supports]
        chain = [float(getattr(divergence, f"binary_{kind}")(*at_token))]
        chain += [topk(f"topk_{kind}", log_mu, log_pi, token, k) for k in (0, 1, 2, 4, vocab)]
        expected = [value[column] for value in values]
        chain.append(float(getattr(divergence, f"exact_{kind}")(*whole)))
        expected.append(expected[-1])
        conditioning = max(value[2] for value in values)
        slack = 1e-6 if kind == "tv" else 2e-6 * (1 + expected[-1]) + 5e-7 * conditioning
        np.testing.assert_allclose(chain, expected, rtol=0, atol=slack)
        assert (np.diff(chain) >= -slack).all(), chain


def test_rest_keeps_its_digits_beside_a_certain_token():
    """The rest of (1 - 3e-5, 1e-5, 2e-5) and of (1 - 3e-4, 1e-4, 2e-4): 1 - Σp in float32 would
    give it an error of 6e-8 of one, not of itself."""
    mu, pi = (np.array([1 - 3 * s, s, 2 * s]) for s in (1e-5, 1e-4))
    expected = (mu * np.log(mu / pi)).sum()
    stored = [jnp.asarray(np.log(p[:2]), jnp.float32) for p in (mu, pi)]
    args = stored[0][0], stored[1][0], jnp.int32(0), jnp.array([0, 1]), *stored
    np.testing.assert_allclose(divergence.topk_kl(*args), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.49, 0.51, 0.9, 1 - 1e-6])
def test_log1mexp(p):
    x = np.float32(np.log(p))
    expected = np.log(-np.expm1(np.float64(x)))
    np.testing.assert_allclose(divergence.log1mexp(jnp.asarray(x)), expected, rtol=2e-6)


EXTREMES = [0.0, -1e-7, -1e-3, -30.0, -80.0, -1e4]


@pytest.mark.parametrize("anchor", [*EXTREMES, -np.inf])
@pytest.mark.parametrize("current", EXTREMES)
def test_finite_at_extremes(anchor, current):
    mu, pi = jnp.float32(anchor), jnp.float32(current)
    slots = jnp.array([-0.5, anchor, -np.inf]), jnp.array([-0.4, current, -3.0])
    ids = jnp.array([1, 2, 3])
    for kind in ("tv", "kl"):
        binary = getattr(divergence, f"binary_{kind}")(mu, pi)
        union = getattr(divergence, f"topk_{kind}")(mu, pi, jnp.int32(0), ids, *slots)
        stored = getattr(divergence, f"topk_slots_{kind}")(*slots)
        for value in (binary, union, stored):
            assert np.isfinite(value) and value >= 0
        if anchor == current:
            assert binary == 0
    p, q = np.exp(np.float64(anchor)), np.exp(np.float64(current))
    np.testing.assert_allclose(divergence.binary_tv(mu, pi), abs(p - q), rtol=1e-5, atol=1e-12)


def test_impossible_token_of_the_current_policy_costs_infinity():
    assert divergence.binary_kl(logs(0.5), jnp.array([-jnp.inf]))[0] == jnp.inf
    assert divergence.binary_tv(logs(0.5), jnp.array([-jnp.inf]))[0] == 0.5


def test_no_gradient():
    log_mu, log_pi = logs(0.5, 0.3, 0.2), logs(0.2, 0.5, 0.3)
    ids = jnp.array([0, 2])

    def everything(log_mu, log_pi):
        slots = log_mu[ids], log_pi[ids]
        union = (log_mu[1], log_pi[1], jnp.int32(1), ids, *slots)
        return sum(
            jnp.sum(value)
            for value in (
                divergence.binary_tv(log_mu, log_pi),
                divergence.binary_kl(log_mu, log_pi),
                divergence.topk_tv(*union),
                divergence.topk_kl(*union),
                divergence.topk_slots_tv(*slots),
                divergence.topk_slots_kl(*slots),
                divergence.exact_tv(log_mu, log_pi),
                divergence.exact_kl(log_mu, log_pi),
            )
        )

    value, gradients = jax.value_and_grad(everything, argnums=(0, 1))(log_mu, log_pi)
    assert value > 1
    assert not any(gradient.any() for gradient in gradients)


def test_half_precision_is_computed_in_float32():
    values = divergence.binary_kl(logs(0.5).astype(jnp.bfloat16), logs(0.4).astype(jnp.bfloat16))
    assert values.dtype == jnp.float32


@pytest.mark.parametrize("index, k", [(0, 1), (1, 20)])
def test_recorded_policies(index, k):
    """Stable-RL's K slots, and the union between them and the exact divergence, on a real LM."""
    entry = json.loads(gzip.decompress((GOLDEN / "topk_divergence.json.gz").read_bytes()))[index]
    case = json.loads((GOLDEN / "inputs.json").read_text())["stories260K_bf16_rollout"]
    mu, pi = (jnp.asarray(entry[f"topk_{who}_logprobs"]) for who in ("rollout", "new"))
    ids, tokens = jnp.asarray(entry["topk_ids"]), jnp.asarray(case["token_ids"])
    assert mu.shape[-1] == k
    for kind in ("tv", "kl"):
        slots = getattr(divergence, f"topk_slots_{kind}")(mu, pi)
        np.testing.assert_allclose(slots, entry[f"topk_{kind}"], atol=1e-5)
        union = getattr(divergence, f"topk_{kind}")(
            jnp.asarray(case["rollout_log_prob"]),
            jnp.asarray(case["log_prob"]),
            tokens,
            ids,
            mu,
            pi,
        )
        assert (union >= slots - 1e-6).all()
        assert (union <= jnp.asarray(entry[f"exact_{kind}"]) + 2e-6).all()
        outside = ~(ids == tokens[..., None]).any(-1)
        np.testing.assert_allclose(union[~outside], slots[~outside], atol=1e-6)
        if k == 1:
            assert (union[outside] > slots[outside]).any()


def test_recorded_exact_divergences(shared_data):
    """TV and KL over a real LM's whole vocabulary against the values recorded in float64."""
    recorded = json.loads((shared_data / "golden" / "topk_divergence.json").read_text())
    with np.load(shared_data / "golden" / "stories260K_logprobs.npz") as arrays:
        mu, pi = jnp.asarray(arrays["rollout"]), jnp.asarray(arrays["new"])
    for entry in recorded:
        np.testing.assert_allclose(divergence.exact_tv(mu, pi), entry["exact_tv"], atol=1e-5)
        np.testing.assert_allclose(divergence.exact_kl(mu, pi), entry["exact_kl"], atol=1e-5)
