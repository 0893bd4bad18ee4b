"""Policy-improvement bounds on token trees small enough to enumerate: every J and D is exact."""

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_jax import bounds, divergence

SHAPES = [(3, 2), (3, 4), (4, 3)]  # vocabulary, horizon
ROWS, COLUMNS, WIDTH = 81, 4, 4  # all trees are padded to one shape, for one compilation
END = 0  # in trees of responses that end themselves
W_MIN = 0.8


@dataclass
class Tree:
    """Two policies over all responses y of at most T tokens; state s_t is a prefix."""

    horizon: int
    rewards: np.ndarray  # [N] of each response
    mask: np.ndarray  # [N T]
    tokens: np.ndarray  # [N T]
    log_mu: np.ndarray  # [N T V] at the state before each token
    log_pi: np.ndarray

    def at_tokens(self, log_probs):
        return np.take_along_axis(log_probs, self.tokens[..., None], -1)[..., 0]

    @property
    def log_ratio(self):
        """NaN outside the mask, which nothing may read."""
        difference = self.at_tokens(self.log_pi) - self.at_tokens(self.log_mu)
        return np.where(self.mask, difference, np.nan)

    def probability(self, log_probs):
        logp = np.where(self.mask, self.at_tokens(log_probs), 0).sum(axis=1)
        return np.where(self.mask.any(axis=1), np.exp(logp), 0)

    @property
    def improvement(self):
        """J(π) - J(μ)."""
        return self.rewards @ (self.probability(self.log_pi) - self.probability(self.log_mu))

    def bounds(self):
        """Everything that bounds.py has to say of this tree, in float64."""
        mu = self.probability(self.log_mu)
        with jax.enable_x64(True):
            logs = (self.log_mu, self.log_pi)
            values = in_full(self.rewards, self.log_ratio, self.mask, mu, *logs, self.horizon)
            return {name: np.asarray(value) for name, value in values.items()}


@jax.jit
def in_full(rewards, log_ratio, mask, mu, log_mu, log_pi, horizon):
    tv = jnp.where(mask, divergence.exact_tv(log_mu, log_pi).astype(mu.dtype), 0)
    largest, at_position = tv.max(), mu @ tv
    xi = jnp.abs(rewards).max()
    remaining = jnp.maximum(horizon - 1 - jnp.arange(COLUMNS), 0)
    budget = bounds.prefix_budget(at_position, W_MIN + (1 - W_MIN) * remaining / (horizon - 1))
    even = bounds.prefix_budget(at_position)
    arguments = (rewards, log_ratio, mask, mu)
    return {
        "L'": bounds.surrogate(*arguments),
        "error": bounds.surrogate_error(*arguments),
        "eq. 7": bounds.penalty_max_tv(xi, horizon, largest),
        "eq. 8": bounds.penalty_sum_tv(xi, at_position.sum()),
        "theorem 1": bounds.penalty_prefix(xi, horizon, largest, budget),
        "theorem 1, w = 1": bounds.penalty_prefix(xi, horizon, largest, even),
        "E D_t": at_position,
        "E sampled": mu @ jnp.where(mask, bounds.sampled_tv(log_ratio), 0),
        "max D": largest,
    }


PENALTIES = ("eq. 7", "eq. 8", "theorem 1", "theorem 1, w = 1")


def tree(logits_mu, logits_pi, reward, vocab, horizon, ends=False):
    """`logits_*` map a prefix to V logits, `reward` a response to a number."""
    responses = sorted({
        y[: y.index(END) + 1] if ends and END in y else y
        for y in itertools.product(range(vocab), repeat=horizon)
    })  # fmt: skip
    logs = np.full((2, ROWS, COLUMNS, WIDTH), -np.inf)
    logs[..., 0] = 0.0
    mask, tokens = np.zeros((2, ROWS, COLUMNS), int)
    rewards = np.zeros(ROWS)
    known: tuple[dict, dict] = ({}, {})
    for row, y in enumerate(responses):
        rewards[row] = reward(y)
        for t, token in enumerate(y):
            mask[row, t], tokens[row, t] = True, token
            for which, logits in enumerate((logits_mu, logits_pi)):
                if y[:t] not in known[which]:
                    known[which][y[:t]] = np.asarray(logits(y[:t]))
                z = known[which][y[:t]]
                logs[which, row, t, :vocab] = z - np.logaddexp.reduce(z)
    return Tree(horizon, rewards, mask.astype(bool), tokens, *logs)


@st.composite
def trees(draw):
    vocab, horizon = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.0, 1.0, 4.0]))
    drift = draw(st.sampled_from([1e-3, 0.1, 1.0, 4.0]))
    binary = draw(st.booleans())
    mu: dict = {}

    def logits_mu(s):
        return mu.setdefault(s, scale * rng.normal(size=vocab))

    def logits_pi(s):
        return mu[s] + drift * rng.normal(size=vocab)

    def reward(y):
        return float(rng.integers(2)) if binary else rng.normal()

    return tree(logits_mu, logits_pi, reward, vocab, horizon, ends=draw(st.booleans()))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(trees())
def test_the_identity_holds_and_no_bound_is_violated(t):
    found = t.bounds()
    size = 1 + abs(found["L'"])
    assert t.improvement == pytest.approx(found["L'"] - found["error"], abs=1e-6 * size)
    for name in PENALTIES:  # divergences are float32, hence 1e-6
        assert t.improvement >= found["L'"] - found[name] - 1e-6 * size, name
        assert abs(found["error"]) <= found[name] + 1e-6 * size, name
        assert name == "eq. 8" or found[name] <= found["eq. 7"] * (1 + 1e-6)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(trees())
def test_the_sampled_estimate_of_total_variation_is_unbiased(t):
    """E_μ of ½|r - 1| over the tree, against the divergences themselves."""
    found = t.bounds()
    np.testing.assert_allclose(found["E sampled"], found["E D_t"], atol=1e-6)


@jax.jit
def chain(log_mu, log_pi, tokens):
    """Binary, Top-K for K = 0..V and exact divergences at [M] states, as rows; TV, KL."""
    order = jnp.argsort(-log_mu, axis=-1)

    def at(log_probs, ids):
        return jnp.take_along_axis(log_probs, ids, axis=-1)

    sampled = [at(log_p, tokens[:, None])[:, 0] for log_p in (log_mu, log_pi)]
    chains = []
    for kind in ("tv", "kl"):
        top = getattr(divergence, f"topk_{kind}")
        slots = [order[:, :k] for k in range(log_mu.shape[-1] + 1)]
        chains.append(
            [getattr(divergence, f"binary_{kind}")(*sampled)]
            + [top(*sampled, tokens, ids, at(log_mu, ids), at(log_pi, ids)) for ids in slots]
            + [getattr(divergence, f"exact_{kind}")(log_mu, log_pi)]
        )
    return [jnp.stack(values) for values in chains]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(trees())
def test_coarser_divergences_are_smaller_at_every_state(t):
    """Binary <= Top-K(K) <= Top-K(K + 1) <= exact, at each state for each token."""
    log_mu, log_pi = (x.reshape(-1, WIDTH) for x in (t.log_mu, t.log_pi))
    tv, kl = chain(
        jnp.asarray(log_mu, jnp.float32), jnp.asarray(log_pi, jnp.float32), t.tokens.reshape(-1)
    )
    # the rest's mass is a difference of float32 numbers: its error counts μ/π times in KL
    possible = np.isfinite(log_mu)
    worst = np.exp((log_mu[possible] - log_pi[possible]).max())
    for values, conditioning in ((tv, 1.0), (kl, worst)):
        slack = 2e-6 + 5e-7 * conditioning
        values = np.asarray(values, np.float64)
        assert (np.diff(values, axis=0) >= -slack).all()
        np.testing.assert_allclose(values[1], values[0], atol=slack)  # K = 0 is binary
        np.testing.assert_allclose(values[-2], values[-1], atol=slack)  # K = V is exact


def two_coins(shift, sign):
    """Two fair coins, then both biased by `shift`; R = ± the sign of (r_1 - 1)(r_2 - 1)."""
    fair, biased = np.log([0.5, 0.5]), np.log([0.5 + shift, 0.5 - shift])
    return tree(
        lambda s: fair, lambda s: biased, lambda y: sign * (1.0 if y[0] == y[1] else -1.0), 2, 2
    )


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_equation_7_cannot_be_improved(sign):
    """By hand, with d for D: L' = 0, Δ = ∓4 d², and eq. 7's 2·2·1·d² = 4 d² is reached; eq. 8's
    is 4·2d."""
    d = 0.2
    t = two_coins(d, sign)
    found = t.bounds()
    np.testing.assert_allclose(found["max D"], d, rtol=1e-6)
    np.testing.assert_allclose(found["L'"], 0, atol=1e-12)
    np.testing.assert_allclose(found["error"], -4 * d**2 * sign, rtol=1e-9)
    np.testing.assert_allclose(t.improvement, 4 * d**2 * sign, rtol=1e-9)
    np.testing.assert_allclose(found["eq. 7"], 4 * d**2, rtol=1e-6)
    np.testing.assert_allclose(found["theorem 1"], 4 * d**2, rtol=1e-6)
    np.testing.assert_allclose(found["eq. 8"], 8 * d, rtol=1e-6)


def test_theorem_1_is_below_equation_7_where_drift_comes_late():
    """The last of four tokens moves by 0.3 or so, the others by little."""
    fair = np.zeros(3)
    found = tree(
        lambda s: fair,
        lambda s: fair + ([1.5, 0, 0] if len(s) == 3 else [0.01, 0, 0]),
        lambda y: float(y[-1] == 0),
        3,
        4,
    ).bounds()
    assert found["theorem 1"] < 0.35 * found["eq. 7"]


def test_a_sample_estimates_both_terms():
    """Means over responses drawn from μ, without weights."""
    fair, tilted = np.zeros(3), np.array([0.3, 0.0, -0.3])
    t = tree(lambda s: fair, lambda s: tilted, lambda y: float(sum(y)), 3, 3, ends=True)
    found, mu = t.bounds(), t.probability(t.log_mu)
    drawn = np.random.default_rng(0).choice(len(mu), size=20_000, p=mu)
    sample = [jnp.asarray(values[drawn], jnp.float32) for values in (t.rewards, t.log_ratio)]
    mask = jnp.asarray(t.mask[drawn])
    assert float(bounds.surrogate(*sample, mask)) == pytest.approx(found["L'"], abs=0.03)
    assert float(bounds.surrogate_error(*sample, mask)) == pytest.approx(found["error"], abs=0.03)
