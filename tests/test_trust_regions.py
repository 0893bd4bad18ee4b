"""Trust regions by hand: DRPO, CPPO, TRM; both forms of the ratio; thresholds on either side."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from dppo_jax import objectives as o
from dppo_jax.records import Mean
from dppo_jax.step_numbers import step_numbers

sys.path[:0] = [str(Path(__file__).parent / "contracts")]

from objective_batches import from_probabilities, loss_and_gradient, make_batch  # noqa: E402


def gradient_of(objective, mu, pi, advantages):
    """d loss_sum / d logp of one sequence."""
    return np.asarray(
        loss_and_gradient(objective, *from_probabilities(mu, pi, advantages))[1].logp
    )[0]


def given_distances(values):
    """A measure that says these, whatever the policies."""
    return lambda stats, batch, anchor: jnp.broadcast_to(jnp.asarray(values), stats.logp.shape)


# ---- DRPO ------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [0.15, 12.5])
@pytest.mark.parametrize("advantage", [1.3, -0.7])
def test_drpo_weighs_as_its_closed_form(delta, advantage):
    """arXiv 2606.09821 eq. 9: the gradient is -A r w, w = 1 - sign(A(r - 1)) |π - μ| / δ."""
    mu, pi = (axis.ravel() for axis in np.meshgrid([0.01, 0.3, 0.8], [0.02, 0.35, 0.6]))
    ours = gradient_of(o.drpo(delta), mu, pi, np.full(9, advantage))
    weight = 1 - np.sign(advantage * (pi / mu - 1)) * np.abs(pi - mu) / delta
    np.testing.assert_allclose(ours, -advantage * pi / mu * weight, rtol=2e-4, atol=1e-5)
    assert (weight < 0).any() == (delta == 0.15), "corrective past the boundary"


def test_spo_bounds_the_ratio_and_mask_drpo_only_what_dppo_masks():
    mu, pi, a = (
        np.array(v) for v in ([0.3, 0.8, 0.3, 0.3], [0.5, 0.5, 0.35, 0.1], [1, -1, 1, 1.0])
    )
    r = pi / mu
    away = np.sign(a * (r - 1))
    ours = gradient_of(o.spo(2.0), mu, pi, a)
    np.testing.assert_allclose(ours, -a * r * (1 - away * np.abs(r - 1) / 2.0), rtol=1e-4)
    ours = gradient_of(o.mask_drpo(0.5, boundary=0.15), mu, pi, a)
    outside = np.array([1, 1, 0, 0])  # the last is far, but comes back
    weight = 1 - outside * np.abs(pi - mu) / 0.5
    np.testing.assert_allclose(ours, -a * r * weight, rtol=1e-4)


def test_drpo_value_and_sides():
    """Loss -A r + |A| μ (r - 1)² / 2δ; each sign of A has its own δ."""
    batch = from_probabilities([0.5, 0.5], [0.6, 0.4], [2.0, -1.0])
    result, _ = loss_and_gradient(o.drpo(0.2), *batch)
    expected = (-2 * 1.2 + 2 * 0.5 * 0.04 / 0.4) + (0.8 + 0.5 * 0.04 / 0.4)
    np.testing.assert_allclose(result.loss_sum, expected, rtol=1e-6)
    result, _ = loss_and_gradient(o.drpo(9.0, delta_low=0.1, delta_high=0.4), *batch)
    expected = (-2 * 1.2 + 2 * 0.5 * 0.04 / 0.8) + (0.8 + 0.5 * 0.04 / 0.2)
    np.testing.assert_allclose(result.loss_sum, expected, rtol=1e-6)


# ---- both forms of the ratio -----------------------------------------------------------------

REGIONS = {
    "binary": o.bounded(
        o.binary_tv_measure, delta_low=0.1, delta_high=0.2, anchor=o.rollout_anchor
    ),
    "old": o.bounded(o.topk_kl_measure, delta_low=0.05, delta_high=0.05, anchor=o.old_anchor),
    "prefix": o.prefix_budget(
        o.topk_tv_measure, delta_low=0.15, delta_high=0.15, anchor=o.rollout_anchor
    ),
    "soft": o.soft_prefix_budget(
        o.topk_tv_measure, delta_low=0.15, delta_high=0.15, anchor=o.rollout_anchor
    ),
    "none": o.unconstrained(),
}


@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)
def test_both_forms_have_one_gradient_without_a_cap(region):
    stats, batch = make_batch(seed=5)
    _, detached = loss_and_gradient(o.policy_gradient(region), stats, batch)
    surrogate, differentiable = loss_and_gradient(o.ratio_surrogate(region), stats, batch)
    np.testing.assert_allclose(detached.logp, differentiable.logp, rtol=1e-5, atol=1e-7)
    assert detached.logp.any()
    keep, _, gate, _ = region.decide(stats, batch)
    ratio = np.exp(stats.logp - batch.rollout.logp_rollout)
    weight = np.where(keep & batch.rollout.response_mask, ratio, 0) * (1 if gate is None else gate)
    np.testing.assert_allclose(surrogate.loss_sum, -(batch.advantages * weight).sum(), rtol=1e-5)


def test_past_the_cap_the_forms_part():
    """Detached: the gradient is scaled by C. Inside a differentiable ratio: it is gone."""
    batch = from_probabilities([0.1, 0.5], [0.8, 0.4], [1.0, 1.0])
    region = o.unconstrained()
    _, detached = loss_and_gradient(o.policy_gradient(region, cap=3.0), *batch)
    _, differentiable = loss_and_gradient(o.ratio_surrogate(region, cap=3.0), *batch)
    np.testing.assert_allclose(detached.logp, [[-3.0, -0.8]], rtol=1e-6)
    np.testing.assert_allclose(differentiable.logp, [[0.0, -0.8]], rtol=1e-6)


# ---- CPPO ------------------------------------------------------------------------------------

D, RHO = np.array([0.10, 0.02, 0.05, 0.12, 0.16]), np.array([1.2, 1.1, 0.9, 1.3, 1.4])
BUDGET = partial(o.fixed_budget, 0.02)


def of_ratios(sign):
    return from_probabilities([0.5] * 5, 0.5 * RHO, [sign] * 5)


def test_prefix_sums_by_hand():
    stats, batch = of_ratios(1.0)
    prefix = o.prefix_sums(
        jnp.asarray(D[None]), batch.rollout.response_mask, w_min=0.8, budget=BUDGET()
    )
    np.testing.assert_allclose(prefix.weighted[0], [0.1, 0.019, 0.045, 0.102, 0.128], rtol=1e-6)
    np.testing.assert_allclose(prefix.spent[0], [0, 0.1, 0.119, 0.164, 0.266], rtol=1e-5)
    np.testing.assert_allclose(prefix.granted[0] / 0.02, [0, 1, 1.95, 2.85, 3.7], rtol=1e-6)
    np.testing.assert_allclose(prefix.weights[0], [1, 1.95, 2.85, 3.7, 4.5], rtol=1e-6)
    ceiling = np.minimum(0.15, 0.15 + prefix.granted - prefix.spent)[0]
    np.testing.assert_allclose(ceiling, [0.15, 0.07, 0.07, 0.043, -0.042], atol=1e-6)


@pytest.mark.parametrize("sign, kept", [(1.0, [1, 1, 1, 0, 0]), (-1.0, [1, 1, 1, 1, 1])])
def test_cppo_masks_by_hand(sign, kept):
    objective = o.cppo(given_distances(D), 0.15, budget=BUDGET)
    _, gradient = loss_and_gradient(objective, *of_ratios(sign))
    np.testing.assert_allclose(gradient.logp[0], -sign * RHO * np.array(kept), rtol=1e-5)


def test_theorem_1_as_a_metric():
    """δ_b = max S_t / W_t = .1 / 1, the first prefix; L' = Σ (r - 1) = .9 where A = 1; T = 5,
    ℓ = .16: .9 - 2·5·4·.16·.1 = .26. Of KL, and from old, there is none."""
    stats, batch = of_ratios(1.0)
    objective = o.cppo(given_distances(D), 0.15, budget=BUDGET)
    found = step_numbers([objective.loss(stats, batch).metrics])
    assert found["bound/prefix_budget_max"] == pytest.approx(0.1) and found["bound/length_max"] == 5
    assert found["bound/surrogate"] == pytest.approx(0.9)
    assert found["bound/prefix_improvement"] == pytest.approx(0.26, rel=1e-5)
    batch = replace(batch, logp_old=stats.logp)
    for other in (
        o.cppo(o.binary_kl_measure, 0.1),
        o.cppo(o.binary_tv_measure, anchor=o.old_anchor),
    ):
        assert "bound/prefix_budget_max" not in other.loss(stats, batch).metrics


def test_cppo_soft_gate_by_hand():
    """x = max(Z/δ, S/(δ + b W)), with S = (.1, .119, .164, .266, .394); g = min(1, 1/x)."""
    objective = o.cppo(given_distances(D), 0.15, budget=BUDGET, rule=o.soft_prefix_budget)
    whole = np.array([0.1, 0.119, 0.164, 0.266, 0.394]) / (
        0.15 + 0.02 * np.array([0, 1, 1.95, 2.85, 3.7])
    )
    gates = np.minimum(1, 1 / whole)  # Z/δ is smaller at every token
    assert (gates < 1).sum() == 2
    _, gradient = loss_and_gradient(objective, *of_ratios(1.0))
    np.testing.assert_allclose(gradient.logp[0], -RHO * gates, rtol=1e-5)
    _, gradient = loss_and_gradient(objective, *of_ratios(-1.0))
    np.testing.assert_allclose(gradient.logp[0], RHO, rtol=1e-5)  # its one token away has g = 1


def test_cppo_counts_each_sequences_own_tokens():
    """A sequence of 5 among 9 columns, and in a batch with a longer one, is masked as alone."""
    stats, batch = of_ratios(1.0)
    widen = lambda leaf: jnp.pad(leaf, [(0, 1), (0, 4)] + [(0, 0)] * (leaf.ndim - 2))  # noqa: E731
    mask = jnp.zeros((2, 9), bool).at[0, :5].set(True).at[1].set(True)
    rollout = jax.tree.map(
        lambda leaf: widen(leaf) if leaf.ndim > 1 else jnp.zeros(2, jnp.int32), batch.rollout
    )
    wide = replace(
        batch, rollout=replace(rollout, response_mask=mask), advantages=widen(batch.advantages)
    )
    distances = jnp.full((2, 9), 0.9).at[0, :5].set(jnp.asarray(D))
    objective = o.cppo(given_distances(distances), 0.15, budget=BUDGET)
    _, gradient = loss_and_gradient(objective, jax.tree.map(widen, stats), wide)
    np.testing.assert_allclose(gradient.logp[0, :5], -RHO * [1, 1, 1, 0, 0], rtol=1e-5)


def test_budgets():
    distance = jnp.asarray([[0.01, 0.05, 0.02, 0.9], [0.001, 0.002, 0.9, 0.9], [0.9] * 4])
    mask = jnp.asarray([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    first = np.quantile([0.01, 0.05, 0.02], 0.9)
    wide = o.quantile_budget(times=5.0)(distance, mask)
    np.testing.assert_allclose(wide[:, 0], [first, 0.02, 0.02], rtol=1e-6)
    paper = o.quantile_budget()(distance, mask)
    np.testing.assert_allclose(paper[:, 0], [0.04, 0.02, 0.02], rtol=1e-6)
    np.testing.assert_allclose(o.fixed_budget()(distance, mask), [[0.015]] * 3, rtol=1e-6)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(values=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8), q=st.floats(0, 1))
def test_quantile_is_numpys(values, q):
    padded = np.full((1, 8), 0.5, np.float32)
    padded[0, : len(values)] = values
    mask = jnp.arange(8)[None] < len(values)
    ours = o.quantile_budget(floor=1e-6, times=1e6, quantile=q)(jnp.asarray(padded), mask)
    expected = np.clip(np.quantile(np.array(values, np.float32), q), 1e-6, 1.0)
    np.testing.assert_allclose(ours[0, 0], expected, rtol=1e-4, atol=1e-6)


def test_cppo_of_one_token_and_asymmetric_thresholds():
    batch = from_probabilities([0.5], [0.6], [1.0])
    keep = partial(o.cppo, given_distances([0.12]), budget=BUDGET)
    for objective, kept in [(keep(0.15), 1), (keep(0.1), 0), (keep(0.1, delta_high=0.15), 1)]:
        _, gradient = loss_and_gradient(objective, *batch)
        np.testing.assert_allclose(gradient.logp, [[-1.2 * kept]], rtol=1e-6)
    _, gradient = loss_and_gradient(keep(0.1, delta_low=0.15), *batch)
    assert not gradient.logp.any()


def test_cppo_runs_without_a_loop_over_tokens():
    stats, batch = make_batch(t=6)
    text = str(jax.make_jaxpr(o.cppo().loss)(stats, batch))
    assert "cumsum" in text and "while" not in text and "scan" not in text


# ---- TRM -------------------------------------------------------------------------------------


def test_trm_drops_whole_sequences():
    """Distances .1, .2, .3 and .3, .3, .6: maxima .3 and .6, means .2 and .4."""
    stats, batch = make_batch(b=2, t=3)
    mask = jnp.ones((2, 3), bool)
    batch = replace(
        batch,
        rollout=replace(batch.rollout, response_mask=mask),
        advantages=jnp.asarray([[1.0] * 3, [-1.0] * 3]),
    )
    measure = given_distances([[0.1, 0.2, 0.3], [0.3, 0.3, 0.6]])

    def kept(objective):
        result, gradient = loss_and_gradient(objective, stats, batch)
        rows = np.asarray(gradient.logp) != 0
        assert (rows == rows[:, :1]).all()
        assert result.metrics["mask/fraction"] == Mean((~rows).sum(), 6.0)
        return rows[:, 0].tolist()

    assert kept(o.trm_max(measure, 0.31)) == [True, False]
    assert kept(o.trm_max(measure, 0.25)) == [False, False]
    assert kept(o.trm_max(measure, 0.25, delta_low=0.61)) == [False, True]
    assert kept(o.trm_avg(measure, 0.25)) == [True, False]
    assert kept(o.trm_avg(measure, 0.41)) == [True, True]
    assert kept(o.trm_avg(measure, 0.41, delta_high=0.1)) == [False, True]


def test_padding_is_no_part_of_a_sequences_summary():
    stats, batch = make_batch(b=2, t=3)
    mask = jnp.asarray([[1, 1, 0], [0, 0, 0]], bool)
    batch = replace(batch, rollout=replace(batch.rollout, response_mask=mask))
    region = o.sequence_bounded(
        given_distances([[0.1, 0.1, 9.0]] * 2),
        lambda distance, mask: jnp.max(distance, axis=1, keepdims=True, where=mask, initial=0.0),
        delta_low=0.2, delta_high=0.2, anchor=o.rollout_anchor,
    )  # fmt: skip
    assert region.decide(stats, batch).keep.all()


def test_sequence_regions_ask_for_what_their_measure_needs():
    for objective in (o.cppo(o.exact_tv_measure), o.trm_max(o.exact_kl_measure)):
        assert objective.needs == {"exact_divergence"}
    assert o.trm_avg(anchor=o.old_anchor).needs == {"logp_old"}


# ---- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        lambda: o.drpo(0.0),
        lambda: o.spo(-1.0),
        lambda: o.cppo(delta=-0.1),
        lambda: o.cppo(delta=float("nan")),
        lambda: o.cppo(w_min=1.5),
        lambda: o.cppo_soft(delta=0.0),
        lambda: o.quantile_budget(times=0.5),
        lambda: o.fixed_budget(-0.01),
        lambda: o.trm_max(delta=-1.0),
        lambda: o.ratio_surrogate(o.unconstrained(), cap=0.0),
    ],
)
def test_refuses_nonsense(bad):
    with pytest.raises(ValueError, match=r"must be|needs"):
        bad()


SMOOTH = {
    "drpo": o.drpo(0.15),
    "mask_drpo": o.mask_drpo(0.5),
    "spo": o.spo(1.0),
    "surrogate": o.ratio_surrogate(o.unconstrained()),
    "dppo surrogate": o.dppo_binary_tv(form=o.ratio_surrogate),
}


@pytest.mark.parametrize("objective", SMOOTH.values(), ids=SMOOTH)
def test_gradients_are_those_of_the_value(objective):
    stats, batch = from_probabilities([0.3, 0.5, 0.2], [0.35, 0.3, 0.1], [1.0, -1.0, 0.5])

    def loss(logp):
        return objective.loss(replace(stats, logp=jnp.asarray(logp)), batch).loss_sum

    check_grads(loss, (stats.logp,), order=1, modes=("rev",), eps=3e-3, rtol=1e-2, atol=1e-3)
