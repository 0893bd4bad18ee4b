"""Rollout corrections by hand, and what happens when they meet an objective."""

import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax import objectives as o
from dppo_jax.records import Max, Mean

sys.path[:0] = [str(Path(__file__).parent / "contracts")]

from objective_batches import from_probabilities, loss_and_gradient, make_batch  # noqa: E402

MU, OLD = np.array([0.5, 0.5, 0.2, 0.4]), np.array([0.25, 0.6, 0.8, 0.4])
RHO = OLD / MU  # 0.5, 1.2, 4, 1: product 2.4, geometric mean 1.245
PI = np.array([0.3, 0.55, 0.5, 0.1])
CURRENT = PI / MU  # 0.6, 1.1, 2.5, 0.25

TABLE = {
    "tis": (o.tis(), [0.5, 1.2, 2.0, 1.0]),
    "tis current": (o.tis(1.5, o.current_policy), [0.6, 1.1, 1.5, 0.25]),
    "sequence_tis": (o.sequence_tis(), [2.4] * 4),
    "sequence_tis capped": (o.sequence_tis(2.0), [2.0] * 4),
    "icepop": (o.icepop(0.6, 3.0), [0, 1.2, 0, 1.0]),
    "icepop default": (o.icepop(), [0.5, 1.2, 4.0, 1.0]),
    "sequence_mis": (o.sequence_mis(), [2.4] * 4),
    "sequence_mis out": (o.sequence_mis(2.0), [0] * 4),
    "sequence_mis below": (o.sequence_mis(3.0, 2.5), [0] * 4),
    "product_mask": (o.product_mask(0.5, 3.0), [1] * 4),
    "product_mask out": (o.product_mask(), [0] * 4),
    "geometric_mask": (o.geometric_mask(0.9, 1.25), [1] * 4),
    "geometric_mask out": (o.geometric_mask(), [0] * 4),
    "opsm": (o.opsm(0.2), [0] * 4),  # mean log μ/π = -log(0.4125)/4 = 0.221
    "opsm inside": (o.opsm(0.23), [1] * 4),
    "opsm_token": (o.opsm_token(0.5), [0, 1, 1, 0]),  # log μ/π = .51, -.1, -.9, 1.39
    "product": (o.product(o.tis(), o.opsm_token(0.5)), [0, 1.2, 2.0, 0]),
}


@pytest.mark.parametrize("correction, weights", TABLE.values(), ids=TABLE)
def test_weights_by_hand(correction, weights):
    stats, batch = from_probabilities(MU, PI, -np.ones(4), old=OLD)
    np.testing.assert_allclose(correction.weight(stats, batch)[0], weights, rtol=1e-5)


def test_off_policy_masking_spares_positive_advantages():
    stats, batch = from_probabilities(MU, PI, np.ones(4))
    for correction in (o.opsm(0.01), o.opsm_token(0.01)):
        assert (correction.weight(stats, batch) == 1).all()


def test_weights_multiply_loss_and_gradient_and_are_constants():
    """PPO's clip around old, each token's loss and gradient times its weight."""
    weights = np.array([0.5, 1.2, 2.0, 1.0])
    for objective in (
        o.ppo_clip(anchor=o.old_anchor), o.drpo(), o.dppo_binary_tv(), o.sapo(), o.dro(), o.r2vpo(),
        o.rover(), o.kl_cov(0.5), o.cpgd(drift=0.1, aggregate=o.token_mean),
    ):  # fmt: skip
        stats, batch = from_probabilities(MU, PI, [1.0, -1.0, 2.0, -0.5], old=OLD)
        stats = replace(stats, uniform_logp=jnp.full((1, 4), -3.0))
        batch = replace(
            batch, uniform_logp_old=jnp.full((1, 4), -2.5), objective_state=jnp.float32(0.3)
        )
        _, plain = loss_and_gradient(objective, stats, batch)
        _, ours = loss_and_gradient(o.corrected(objective, o.tis()), stats, batch)
        np.testing.assert_allclose(ours.logp, plain.logp * weights, rtol=1e-5)
        assert plain.logp.any()
        twice = o.corrected(o.corrected(objective, o.tis()), o.icepop(0.6, 3.0))
        _, ours = loss_and_gradient(twice, stats, batch)
        np.testing.assert_allclose(
            ours.logp, plain.logp * weights * np.array([0, 1.2, 0, 1.0]), rtol=1e-5
        )
    through_pi = o.corrected(o.pg_is(), o.tis(9.0, o.current_policy))
    _, ours = loss_and_gradient(through_pi, *from_probabilities(MU, PI, np.ones(4)))
    np.testing.assert_allclose(ours.logp[0], -(CURRENT**2), rtol=1e-5)


def test_metrics():
    batch = from_probabilities(MU, PI, [1.0, -1.0, 1.0, -1.0], old=OLD)
    metrics = o.corrected(o.pg_is(), o.icepop(0.6, 3.0)).loss(*batch).metrics
    np.testing.assert_allclose(metrics["correction/weight"], Mean(2.2, 4.0), rtol=1e-6)
    np.testing.assert_allclose(metrics["correction/weight_max"], Max(1.2), rtol=1e-6)
    assert metrics["correction/dropped"] == Mean(2.0, 4.0)
    assert metrics["mask/fraction"] == Mean(0.0, 4.0)


def test_needs_and_scope_are_joined():
    for correction, needs, scope in [
        (o.tis(), {"logp_old"}, "token"),
        (o.tis(2.0, o.current_policy), set(), "token"),
        (o.sequence_mis(), {"logp_old"}, "sequence"),
        (o.product(o.opsm(), o.icepop()), {"logp_old"}, "sequence"),
    ]:
        ours = o.corrected(o.dapo(), correction)
        assert ours.needs == needs and ours.scope == scope
        assert (ours.token_local is not None) == (scope == "token")
    assert o.corrected(o.gspo(), o.opsm_token()).scope == "sequence"
    assert o.corrected(o.bapo(), o.sequence_tis()).scope == "batch"
    stats, batch = make_batch()
    with pytest.raises(ValueError, match="logp_old"):
        o.corrected(o.dapo(), o.tis()).loss(stats, replace(batch, logp_old=None))


def test_padding_is_no_part_of_a_sequences_product():
    stats, batch = from_probabilities(MU, PI, -np.ones(4), old=OLD)
    mask = jnp.asarray([[True, True, False, False]])
    poisoned = replace(
        batch,
        rollout=replace(batch.rollout, response_mask=mask),
        logp_old=jnp.where(mask, batch.logp_old, jnp.nan),
    )
    for correction, expected in [(o.sequence_tis(), 0.6), (o.geometric_mask(0.7, 0.8), 1.0)]:
        weight = correction.weight(stats, poisoned)
        np.testing.assert_allclose(weight[0, :2], [expected] * 2, rtol=1e-5)
    result, gradient = loss_and_gradient(
        o.corrected(o.dapo(anchor=o.old_anchor), o.sequence_tis()), stats, poisoned
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((result, gradient)))


@pytest.mark.parametrize(
    "bad",
    [
        lambda: o.tis(0.0),
        lambda: o.sequence_tis(-1.0),
        lambda: o.icepop(5.0, 0.5),
        lambda: o.sequence_mis(lowest=-0.1),
        lambda: o.product_mask(2.0, 0.5),
        lambda: o.geometric_mask(1.002, 0.999),
        lambda: o.grpo_icepop(lowest=6.0),
    ],
)
def test_refuses_what_would_drop_every_token(bad):
    with pytest.raises(ValueError, match="must be"):
        bad()
