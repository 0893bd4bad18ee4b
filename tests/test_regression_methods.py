"""REBEL, ROVER and R2VPO: tables by hand, gradients against differences, the state they carry."""

import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from dppo_jax import objectives as o
from dppo_jax.metrics import reduce_metrics
from dppo_jax.records import Batch, Mean
from dppo_jax.sampling.generate import SamplingConfig, generate
from dppo_jax.scoring import score
from dppo_jax.update import init_state, make_update

sys.path.append(str(Path(__file__).parent / "contracts"))
from objective_batches import from_probabilities, loss_and_gradient, make_batch  # noqa: E402


def groups(seed=2, prompts=3, samples=3):
    """`make_batch` with its rows as samples of few prompts; the last row has no token."""
    stats, batch = make_batch(seed=seed, b=prompts * samples, t=7)
    rollout = replace(
        batch.rollout,
        prompt_tokens=batch.rollout.prompt_tokens[:prompts],
        prompt_mask=batch.rollout.prompt_mask[:prompts],
    )
    return stats, replace(batch, rollout=rollout)


def rebel_by_hand(stats, batch, samples, eta=1.0):
    """Mean over sequences of their mean square over partners; numpy."""
    mask = np.asarray(batch.rollout.response_mask)
    gap = np.asarray(stats.logp - batch.rollout.logp_rollout, np.float64)
    u = np.where(mask, gap, 0).sum(1) / eta - np.asarray(batch.advantages)[:, 0]
    total, count = 0.0, 0
    for start in range(0, len(u), samples):
        there = [i for i in range(start, start + samples) if mask[i].any()]
        count += len(there)
        for i in there:
            total += sum((u[i] - u[j]) ** 2 for j in there) / max(1, len(there) - 1)
    return total, count


def test_rebel_pair_by_hand():
    """Σ log r = log(1.2 · .5) = -.510826 and log 2 = .693147; R = 1 and 0, so A = ±.5:
    d - ΔR = -1.203973 - 1 = -2.203973, squared 4.857496; with η = 2: (-.601986 - 1)² = 2.566360."""
    first = from_probabilities([0.5, 0.4], [0.6, 0.2], [0.5, 0.5])
    second = from_probabilities([0.3, 0.4], [0.6, 0.4], [-0.5, -0.5])
    stats, batch = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)
    rollout = replace(
        batch.rollout, prompt_tokens=jnp.zeros((1, 0), int), prompt_mask=jnp.zeros((1, 0), bool)
    )
    batch = replace(batch, rollout=rollout)
    for eta, expected in ((1.0, 4.857496), (2.0, 2.566360)):
        loss, gradient = loss_and_gradient(o.rebel(eta), stats, batch)
        assert loss.loss_sum / loss.weight_sum == pytest.approx(expected, rel=1e-5)
        slope = 2 * -np.sqrt(expected) / eta  # of the loss, per token of the first
        np.testing.assert_allclose(gradient.logp / 2, [[slope] * 2, [-slope] * 2], rtol=1e-5)


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_rebel_groups_against_numpy(eta):
    """Three prompts of three samples, one of them empty; padding and its order mean nothing."""
    stats, batch = groups()
    loss = jax.jit(o.rebel(eta).loss)
    found = loss(stats, batch)
    total, count = rebel_by_hand(stats, batch, 3, eta)
    assert found.weight_sum == count == 8
    np.testing.assert_allclose(found.loss_sum, total, rtol=1e-5)
    order = np.array([2, 0, 1, 5, 4, 3, 6, 7, 8])  # within the prompts
    rows = jax.tree.map(lambda x: x[order] if len(x) == 9 else x, (stats, batch))
    np.testing.assert_allclose(loss(*rows).loss_sum, total, rtol=1e-5)
    poisoned = replace(
        stats, logp=jnp.where(batch.rollout.response_mask, stats.logp, jnp.nan)
    )  # fmt: skip
    np.testing.assert_allclose(loss(poisoned, batch).loss_sum, total, rtol=1e-5)


def test_rebel_wants_pairs():
    with pytest.raises(ValueError, match="samples_per_prompt to 2 or more"):
        o.rebel().loss(*make_batch())
    with pytest.raises(ValueError, match="eta must be positive"):
        o.rebel(0.0)


def rover_batch():
    stats, batch = make_batch(seed=6, b=4, t=5)
    rng = np.random.default_rng(0)
    one, two = (jnp.asarray(rng.normal(size=(4, 5)) - 3, jnp.float32) for _ in range(2))
    return replace(stats, uniform_logp=one), replace(batch, uniform_logp_old=two)


def test_rover_by_hand():
    """ρ = 2, two tokens, A = .5: Q = 2 log(.6/.5), 2 log(.2/.4); the first's target is
    .5 + 2 (-2 - -3) c, the last's .5."""
    stats, batch = from_probabilities([0.9, 0.9], [0.6, 0.2], [0.5, 0.5], old=[0.5, 0.4])
    stats = replace(stats, uniform_logp=jnp.array([[-9.0, -2.0]]))
    batch = replace(batch, uniform_logp_old=jnp.array([[-4.0, -3.0]]))
    for scale in (1.0, 0.5):
        loss, gradient = loss_and_gradient(o.rover(2.0, scale), stats, batch)
        errors = np.array([2 * np.log(1.2) - (0.5 + 2 * scale), 2 * np.log(0.5) - 0.5])
        np.testing.assert_allclose(loss.loss_sum, (errors**2).sum(), rtol=1e-5)
        np.testing.assert_allclose(gradient.logp[0], 4 * errors, rtol=1e-5)
        assert not gradient.uniform_logp.any()


def test_rover_ignores_what_comes_after_the_response():
    stats, batch = rover_batch()
    mask = batch.rollout.response_mask
    noisy = replace(stats, uniform_logp=jnp.where(mask, stats.uniform_logp, jnp.nan))
    old = replace(batch, uniform_logp_old=jnp.where(mask, batch.uniform_logp_old, 7.0))
    loss = o.rover().loss
    np.testing.assert_allclose(loss(noisy, old).loss_sum, loss(stats, batch).loss_sum, rtol=1e-6)
    with pytest.raises(ValueError, match="uniform_logp"):
        loss(replace(stats, uniform_logp=None), batch)


def test_r2vpo_by_hand_and_its_dual_step():
    """λ = .5, r = 1.2 and .5, A = 1 and -1: loss -1.2 + .5·.04 and .5 + .5·.25; mean (r - 1)² is
    .145, so λ becomes .5 + .1 (.145 - .04) = .5105, and falls no lower than 0."""
    stats, batch = from_probabilities([0.5, 0.4], [0.6, 0.2], [1, -1])
    objective = o.r2vpo()
    batch = replace(batch, objective_state=jnp.float32(0.5))
    loss, gradient = loss_and_gradient(objective, stats, batch)
    np.testing.assert_allclose(loss.loss_sum, -1.18 + 0.625, rtol=1e-5)
    slopes = [1.2 * (-1 + 2 * 0.5 * 0.2), 0.5 * (1 + 2 * 0.5 * -0.5)]
    np.testing.assert_allclose(gradient.logp[0], slopes, rtol=1e-5)
    assert reduce_metrics(loss.metrics)["r2vpo/dual"] == 0.5
    assert float(objective.next_state(jnp.float32(0.5), loss.metrics)) == pytest.approx(0.5105)
    quiet = {"r2vpo/ratio_variance": Mean(jnp.float32(0), jnp.float32(9))}
    assert float(objective.next_state(jnp.float32(0.001), quiet)) == 0.0


@pytest.mark.parametrize("make", [o.rebel, o.rover, o.r2vpo])
def test_gradients_against_differences(make):
    stats, batch = rover_batch() if make is o.rover else groups()

    @jax.jit
    def loss(logp):
        return make().loss(replace(stats, logp=logp), batch).loss_sum

    check_grads(loss, (stats.logp,), order=1, modes=["rev"], rtol=2e-2, atol=2e-2, eps=1e-2)


def test_the_scorer_streams_the_vocabularys_mean(tiny, prompts):
    """`uniform_logp` against the mean of whole log-probability vectors, at a temperature."""
    model, params = tiny
    settings = SamplingConfig(max_new_tokens=3, samples_per_prompt=2, top_k_capture=37)
    rollout = generate(model, params, prompts, jax.random.key(0), settings=settings)
    stats = score(model, params, rollout, temperature=0.7)
    whole = np.asarray(stats.topk_logp)  # K = V: every token
    mask = np.asarray(rollout.response_mask)
    np.testing.assert_allclose(
        np.asarray(stats.uniform_logp)[mask], whole.mean(-1)[mask], rtol=1e-5, atol=1e-5
    )
    capped = type(model)(replace(model.config, final_soft_cap=5.0))
    assert score(capped, params, rollout, temperature=1.0).uniform_logp is None


def test_the_dual_variable_moves_with_the_updates(tiny, prompts):
    model, params = tiny
    settings = SamplingConfig(max_new_tokens=3, samples_per_prompt=2, top_k_capture=2)
    rollout = generate(model, params, prompts, jax.random.key(0), settings=settings)
    batch = Batch(rollout, jnp.ones(rollout.response_mask.shape))
    objective, optimizer = o.r2vpo(dual=0.3, delta=0.0), optax.sgd(0.1)
    update = make_update(model, objective, optimizer, temperature=1.0)
    state = init_state(jax.tree.map(jnp.array, params), optimizer, objective.initial_state)
    state, first = update(state, batch)
    state, second = update(state, batch)
    assert float(state.objective_state) > 0.3  # the second step's ratios have moved
    variance = reduce_metrics(second)["r2vpo/ratio_variance"]
    assert float(state.objective_state) == pytest.approx(0.3 + 0.1 * variance, abs=1e-6)
    assert reduce_metrics(first)["r2vpo/dual"] == pytest.approx(0.3)
