"""Advantage estimators by hand, by their definitions, and against recorded outputs of verl."""

import itertools
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_jax import advantages
from dppo_jax.records import Rollout

RECORDED = json.loads((Path(__file__).parent / "golden" / "advantages_kl_agg.json").read_text())
GROUPED = (
    advantages.group_mean_baseline,
    advantages.group_std_normalized,
    advantages.leave_one_out,
    advantages.gpg,
    advantages.max_rl,
)


def estimate(estimator, *groups, **others):
    return np.asarray(estimator(jnp.asarray(groups, jnp.float32), **others))


def response_mask(*lengths, columns=None):
    return jnp.arange(columns or max(lengths)) < jnp.asarray(lengths)[:, None]


def at_the_end(rewards, mask):
    last = np.asarray(mask).sum(axis=1, keepdims=True) - 1
    columns = np.arange(mask.shape[1])
    return jnp.asarray(np.where(columns == last, np.reshape(rewards, (-1, 1)), 0), jnp.float32)


# ---- one advantage a sequence --------------------------------------------------------------------


def test_by_hand():
    rewards = ([1.0, 0.0, 0.0, 0.0], [3.0, 1.0, 1.0, 3.0])
    np.testing.assert_allclose(
        estimate(advantages.group_mean_baseline, *rewards),
        [[0.75, -0.25, -0.25, -0.25], [1, -1, -1, 1]],
    )
    np.testing.assert_allclose(
        estimate(advantages.leave_one_out, *rewards),
        [[1, -1 / 3, -1 / 3, -1 / 3], [4 / 3, -4 / 3, -4 / 3, 4 / 3]],
        rtol=1e-6,
    )
    # unbiased: variance (0.5625 + 3 * 0.0625) / 3 = 0.25 and 4 / 3
    np.testing.assert_allclose(
        estimate(advantages.group_std_normalized, *rewards),
        [[1.5, -0.5, -0.5, -0.5], np.array([1, -1, -1, 1]) * np.sqrt(0.75)],
        rtol=1e-5,
    )
    # 5 of 8 rewards are not 0
    np.testing.assert_allclose(
        estimate(advantages.gpg, *rewards, f_norm=2.0),
        [[0.6, -0.2, -0.2, -0.2], [0.8, -0.8, -0.8, 0.8]],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        estimate(advantages.max_rl, *rewards), [[3, -1, -1, -1], [0.5, -0.5, -0.5, 0.5]], rtol=1e-5
    )
    # baseline (1 * 1 + 0 + 0 + 0) / 10 = 0.1; (2 * 3 + 2 * 1 + 4 * 1 + 2 * 3) / 10 = 1.8
    mask = response_mask(1, 2, 3, 4, 2, 2, 4, 2)
    np.testing.assert_allclose(
        estimate(advantages.opo, *rewards, response_mask=mask),
        [[0.9, -0.1, -0.1, -0.1], [1.2, -0.8, -0.8, 1.2]],
        rtol=1e-6,
    )


def test_the_best_of_a_group():
    rewards = ([0.2, 1.0, 0.5], [1.0, 1.0, 0.0])
    best = estimate(advantages.pass_at_k, *rewards)
    np.testing.assert_allclose(best, [[0, 0.5, 0], [0, 0, 0]], rtol=1e-6)
    # standard deviation of 0.2, 1, 0.5: sqrt((0.1344 + 0.1878 + 0.0044) / 2) = 0.4041
    normal = estimate(advantages.pass_at_k, *rewards, normalize=True)
    np.testing.assert_allclose(normal[0], [0, 1.2372, 0], rtol=1e-4)
    with pytest.raises(ValueError, match="2 <= k <= samples a prompt, got k=4 of 3"):
        estimate(advantages.pass_at_k, *rewards, k=4)
    with pytest.raises(ValueError, match="got k=1 of 1"):
        estimate(advantages.pass_at_k, [1.0])


@settings(max_examples=15)
@given(rewards=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), min_size=5, max_size=5))
def test_credit_for_the_best_of_k_by_enumeration(rewards):
    for k in (2, 3, 5):
        ours = estimate(advantages.pass_at_k, rewards, k=k)[0]
        for i, own in enumerate(rewards):
            others = itertools.combinations(rewards[:i] + rewards[i + 1 :], k - 1)
            credit = [max(own, *rest) - max(rest) for rest in others]
            np.testing.assert_allclose(ours[i], np.mean(credit), atol=1e-6)


@pytest.mark.parametrize("estimator", GROUPED)
def test_nothing_to_compare_is_exactly_zero(estimator):
    assert not estimate(estimator, [0.1] * 7, [1 / 3] * 7).any()
    assert not estimate(estimator, [0.7], [-2.0]).any()
    lengths = response_mask(*range(1, 15))
    assert not estimate(advantages.opo, [0.1] * 7, [1 / 3] * 7, response_mask=lengths).any()
    assert not estimate(advantages.pass_at_k, [0.1] * 7).any()


@pytest.mark.parametrize(
    "estimator",
    [*GROUPED, partial(advantages.opo, response_mask=response_mask(3, 1, 2, 2, 1, 3, 3, 3))],
)
def test_unequal_groups(estimator):
    """A group with absent slots is the smaller group; the absent ones, of any reward, get 0."""
    present = jnp.asarray([[True, True, False, False], [True, True, True, True]])
    ours = estimate(estimator, [1.0, 0.0, 9.0, -9.0], [3.0, 1.0, 0.0, 2.0], present=present)
    assert not ours[0, 2:].any()
    if estimator is advantages.gpg:  # α is of the whole batch: 6 samples, 4 rewards
        np.testing.assert_allclose(ours[0, :2], [0.75, -0.75])
        return
    small = {"response_mask": response_mask(3, 1)} if isinstance(estimator, partial) else {}
    small_ours = estimate(estimator, [1.0, 0.0], **small)
    np.testing.assert_allclose(ours[0, :2], small_ours[0], rtol=1e-6)


def test_a_lone_sample_may_keep_its_reward():
    mask = response_mask(2, 3)
    for estimator in (
        advantages.group_mean_baseline,
        advantages.group_std_normalized,
        advantages.leave_one_out,
        partial(advantages.opo, response_mask=mask),
    ):
        kept = estimate(partial(estimator, keep_single=True), [0.7], [-2.0])
        np.testing.assert_allclose(kept, [[0.7], [-2.0]], rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    rewards=st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=8),
    shift=st.floats(-2, 2, width=32),
)
@pytest.mark.parametrize("estimator", GROUPED[:3])
def test_centred_and_blind_to_a_shift(estimator, rewards, shift):
    spread = max(rewards) - min(rewards)
    ours = estimate(estimator, rewards)[0]
    np.testing.assert_allclose(ours.sum(), 0.0, atol=1e-4)
    if spread == 0:
        assert not ours.any()
    elif spread > 1e-2:
        shifted = estimate(estimator, [reward + shift for reward in rewards])[0]
        np.testing.assert_allclose(shifted, ours, atol=1e-3)
        assert ours[int(np.argmax(rewards))] > 0 > ours[int(np.argmin(rewards))]


# ---- advantages a token --------------------------------------------------------------------------

GAPS = jnp.asarray([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], bool)


def test_returns_skip_what_is_no_response_token():
    rewards = jnp.asarray([[1.0, 2, 99, 4, 99], [5, 99, 99, 99, 99], [99] * 5])
    ours = advantages.returns_to_go(rewards, GAPS, gamma=0.5)
    np.testing.assert_allclose(ours, [[3, 4, 0, 4, 0], [5, 0, 0, 0, 0], [0] * 5])


def test_gae_by_hand():
    """γ = 0.5, λ = 0.5. Row 0, values 1, 2, 4 around a gap, reward 8 at the end:
    δ = (0 + 1 - 1, 0 + 2 - 2, 8 - 4) = (0, 0, 4), A = (0.25, 1, 4). Row 1: A = 1 - 3."""
    rewards = jnp.asarray([[0.0, 0, 99, 8, 99], [1, 99, 99, 99, 99], [99] * 5])
    values = jnp.asarray([[1.0, 2, 99, 4, 99], [3, 99, 99, 99, 99], [99] * 5])
    plain = advantages.gae(rewards, GAPS, values, gamma=0.5, lam=0.5, whitened=False)
    np.testing.assert_allclose(plain.advantages, [[0.25, 1, 0, 4, 0], [-2, 0, 0, 0, 0], [0] * 5])
    np.testing.assert_allclose(plain.returns, [[1.25, 3, 0, 8, 0], [1, 0, 0, 0, 0], [0] * 5])
    white = advantages.gae(rewards, GAPS, values, gamma=0.5, lam=0.5)
    assert not white.advantages[~GAPS].any()
    inside = np.asarray(white.advantages[GAPS], np.float64)
    np.testing.assert_allclose(inside.mean(), 0, atol=1e-6)
    np.testing.assert_allclose(inside.var(ddof=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(white.returns, plain.returns)
    with pytest.raises(ValueError, match="lam=1.5"):
        advantages.gae(rewards, GAPS, values, lam=1.5)


@settings(max_examples=15)
@given(seed=st.integers(0, 1000), gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_gae_is_its_recursion(seed, gamma, lam):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, 3, 6)).astype(np.float32)
    mask = rng.random((3, 6)) < 0.6
    ours = advantages.gae(
        jnp.asarray(rewards), jnp.asarray(mask), jnp.asarray(values), gamma=gamma, lam=lam,
        whitened=False,
    )  # fmt: skip
    for row in range(3):
        following = advantage = 0.0
        for t in reversed(np.flatnonzero(mask[row])):
            delta = rewards[row, t] + gamma * following - values[row, t]
            advantage = delta + gamma * lam * advantage
            following = values[row, t]
            np.testing.assert_allclose(ours.advantages[row, t], advantage, atol=1e-5)
            np.testing.assert_allclose(ours.returns[row, t], advantage + following, atol=1e-5)


def test_gae_at_lambda_one_is_the_return_less_the_value():
    mask = response_mask(4, 2, 3)
    rewards = at_the_end([1.0, 0.0, -1.0], mask)
    values = jax.random.normal(jax.random.key(0), mask.shape)
    ours = advantages.gae(rewards, mask, values, lam=1.0, whitened=False)
    to_go = advantages.returns_to_go(rewards, mask)
    np.testing.assert_allclose(ours.advantages, jnp.where(mask, to_go - values, 0), atol=1e-6)
    np.testing.assert_allclose(ours.returns, to_go, atol=1e-6)


def test_distributional_gae_is_gae_of_every_quantile():
    mask = response_mask(4, 2)
    rewards = at_the_end([1.0, 0.5], mask)
    values = jax.random.normal(jax.random.key(0), (2, 4, 6))  # 2 heads of 3 quantiles
    ours = advantages.distributional_gae(rewards, mask, values, lam=0.9, heads=2, whitened=False)
    heads = (values[..., :3] + values[..., 3:]) / 2
    each = [advantages.gae(rewards, mask, heads[..., q], lam=0.9, whitened=False) for q in range(3)]
    for q in range(3):
        np.testing.assert_allclose(ours.returns[..., q], each[q].returns, atol=1e-6)
    np.testing.assert_allclose(ours.advantages, sum(e.advantages for e in each) / 3, atol=1e-6)
    with pytest.raises(ValueError, match="6 values do not divide into heads=4"):
        advantages.distributional_gae(rewards, mask, values, heads=4)


def test_whitening_what_is_all_equal_gives_zero():
    mask = response_mask(3, 1)
    assert not advantages.whiten(jnp.full((2, 3), 0.1), mask).any()
    assert not advantages.whiten(jnp.full((2, 3), 0.1), jnp.zeros((2, 3), bool)).any()


def test_the_optimal_token_baseline_by_hand():
    """Columns: weights 1 - 2π + Σπ², summed; the third column is the longest response's alone."""
    mask = response_mask(3, 2, columns=4)
    logp = jnp.log(jnp.asarray([[0.5, 0.25, 0.5, 1.0], [0.9, 0.5, 1.0, 1.0]]))
    squares = jnp.asarray([[0.5, 0.375, 0.5, 7.0], [0.82, 0.5, 7.0, 7.0]])
    rewards = jnp.asarray([[1.0, 0.2]])
    ours = advantages.optimal_token_baseline(
        rewards, at_the_end(rewards, mask), mask, logp, squares
    )
    # weights (0.5, 0.5 + 0.875) and (0.02, 0.02 + 0.5)
    first = (0.5 * 1 + 0.02 * 0.2) / 0.52
    second = (1.375 * 1 + 0.52 * 0.2) / 1.895
    np.testing.assert_allclose(
        ours, [[1 - first, 1 - second, 1, 0], [0.2 - first, 0.2 - second, 0, 0]], rtol=1e-5
    )
    alone = (jnp.asarray([[1.0], [0.2]]), at_the_end(rewards, mask), mask, logp, squares)
    assert not advantages.optimal_token_baseline(*alone).any()
    kept = advantages.optimal_token_baseline(*alone, keep_single=True)
    np.testing.assert_allclose(kept, jnp.where(mask, rewards.T, 0), rtol=1e-6)


# ---- how the loop calls them ---------------------------------------------------------------------


def made_rollout():
    mask = response_mask(2, 3, 1, 0)
    ids = jnp.broadcast_to(jnp.asarray([4, 7]), (4, 3, 2))
    topk = jnp.log(jnp.broadcast_to(jnp.asarray([0.5, 0.3]), (4, 3, 2)))
    return Rollout(
        prompt_tokens=jnp.zeros((2, 1), jnp.int32),
        prompt_mask=jnp.ones((2, 1), bool),
        response_tokens=jnp.asarray([[4, 9, 0], [7, 7, 9], [9, 0, 0], [0, 0, 0]]),
        response_mask=mask,
        logp_rollout=jnp.log(jnp.asarray([[0.5, 0.1, 1], [0.3, 0.3, 0.1], [0.1, 1, 1], [1, 1, 1]])),
        topk_ids=ids,
        topk_logp_rollout=topk,
        entropy_rollout=jnp.zeros(mask.shape),
        finish_reason=jnp.zeros(4, jnp.int32),
    )


def test_inputs_of_a_step():
    rewards = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
    penalty = jnp.full((4, 3), 0.25)
    inputs = advantages.inputs_of(rewards, made_rollout(), penalty)
    np.testing.assert_allclose(inputs.rewards, [[0.5, 1.25], [2.75, 4.0]])
    np.testing.assert_allclose(
        inputs.token_rewards,
        [[-0.25, 0.75, 0], [-0.25, -0.25, 1.75], [2.75, 0, 0], [0, 0, 0]],
    )
    # Σ p² over {0.5, 0.3} and the sampled 0.1 where it is neither
    squares = np.asarray(inputs.sum_squared_probs)[np.asarray(inputs.response_mask)]
    np.testing.assert_allclose(squares, [0.34, 0.35, 0.34, 0.34, 0.35, 0.35], rtol=1e-6)


def test_an_estimator_gets_what_it_names():
    inputs = advantages.inputs_of(jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), made_rollout())

    def longest(rewards, response_mask, scale=2.0):
        return scale * response_mask * rewards.reshape(-1, 1)

    assert advantages.named_inputs(longest) == {"rewards", "response_mask"}
    found = advantages.estimate(partial(longest, scale=1.0), inputs)
    np.testing.assert_allclose(found.advantages, [[1, 1, 0], [2, 2, 2], [3, 0, 0], [0, 0, 0]])
    assert found.returns is None
    found = advantages.estimate(lambda rewards: rewards * 2, inputs)
    np.testing.assert_allclose(found.advantages, np.array([[2], [4], [6], [8]]) * np.ones((4, 3)))
    with pytest.raises(ValueError, match=r"gave \(2,\): return \[P, G\] = \(2, 2\)"):
        advantages.estimate(lambda rewards: rewards.sum(axis=1), inputs)
    with pytest.raises(ValueError, match=r"needs a critic: set train.critic"):
        advantages.estimate(advantages.gae, inputs)
