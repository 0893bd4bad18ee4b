"""Advantage estimators by hand and against recorded outputs of verl and Stable-RL."""

import json
from collections import defaultdict
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_jax import advantages

RECORDED = json.loads((Path(__file__).parent / "golden" / "advantages.json").read_text())
ESTIMATORS = (
    advantages.group_mean_baseline,
    advantages.group_std_normalized,
    advantages.leave_one_out,
)


def estimate(estimator, *groups):
    return np.asarray(estimator(jnp.asarray(groups, jnp.float32)))


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


@pytest.mark.parametrize(
    "row", RECORDED["advantages"], ids=lambda r: f"{r['estimator']}{r['kwargs']}"
)
def test_recorded(row):
    estimator = {
        ("grpo", True): advantages.group_std_normalized,
        ("grpo", False): advantages.group_mean_baseline,
        ("rloo", None): advantages.leave_one_out,
    }[row["estimator"], row["kwargs"].get("norm_adv_by_std_in_grpo")]
    groups = defaultdict(list)
    for place, prompt in enumerate(RECORDED["inputs"]["index"]):
        groups[prompt].append(place)
    compared = 0
    for places in groups.values():
        ours = estimate(estimator, [RECORDED["inputs"]["scores"][place] for place in places])[0]
        if len(places) == 1:
            assert ours == [0.0]  # differs from the recordings, which keep the reward
            continue
        np.testing.assert_allclose(ours, [row["advantages"][p] for p in places], atol=1e-6)
        compared += len(places)
    assert compared == 11


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nothing_to_compare_is_exactly_zero(estimator):
    assert not estimate(estimator, [0.1] * 7, [1 / 3] * 7).any()
    assert not estimate(estimator, [0.7], [-2.0]).any()


@settings(max_examples=25, deadline=None)
@given(
    rewards=st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=8),
    shift=st.floats(-2, 2, width=32),
)
@pytest.mark.parametrize("estimator", ESTIMATORS)
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
