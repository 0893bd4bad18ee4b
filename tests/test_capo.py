"""CAPO's predictions against the matrices that they abbreviate, and the sums they are made of."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_update import made_batch

from dppo_jax import objectives as o
from dppo_jax.metrics import reduce_metrics
from dppo_jax.models.decoder import Model, full_forward
from dppo_jax.objectives.capo import predicted_by_step
from dppo_jax.scoring import last_layer
from dppo_jax.update import init_state, make_update

sys.path.insert(0, str(Path(__file__).parent / "contracts"))
from objective_batches import from_probabilities  # noqa: E402


def stats_of(policies, advantages, hidden):
    """Tokens whose sampled id is 0, with these distributions and mean squares of hidden states."""
    policies = np.asarray(policies, np.float64)
    stats, batch = from_probabilities(policies[:, 0], policies[:, 0], advantages)
    sums = np.stack([(policies**2).sum(-1), (policies**3).sum(-1), np.asarray(hidden)], -1)
    return dataclasses.replace(stats, last_layer=jnp.asarray(sums[None], jnp.float32)), batch


def test_hand_computed_table():
    """Columns: π, A, mean(x²) -> m_H, m_F at step_size 0.1, and what 0 <= m_H, m_F <= 0.005 keep.

    Row 1: r = 0.5, Σπ² = 0.38, c = 0.1·2·1.5 = 0.3, s = 0.3·0.38 = 0.114,
    Var = 0.09·(0.16 - 0.12²) = 0.013104, m_H = 2·0.114 + (0.114² - 0.013104) = 0.227892,
    m_F = 0.114²/2. Row 2: c = -0.2, s = -0.2·0.38. Row 3: a certain token changes nothing.
    Row 4: c = 6, s = 6·0.5 = 3, Var = 36·(0.25 - 0) = 9, m_H = 2·3 + (9 - 9).
    """
    stats, batch = stats_of(
        [(0.5, 0.3, 0.2), (0.5, 0.3, 0.2), (1.0, 0.0, 0.0), (0.5, 0.5, 0.0)],
        [2.0, -2.0, 1.0, 2.0],
        [1.5, 1.0, 1.0, 30.0],
    )
    found = predicted_by_step(stats, batch, 0.1)
    wanted = [0.227892, 0.152 - (0.076**2 - 0.04 * 0.1456), 0.0, 6.0]
    np.testing.assert_allclose(found.objective[0], wanted, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.policy[0], [0.006498, 0.002888, 0.0, 4.5], rtol=1e-5)

    def gradient(objective, batch):
        def loss(logp):
            return objective.loss(dataclasses.replace(stats, logp=logp), batch).loss_sum

        return jax.grad(loss)(stats.logp)[0]

    # -A·r where kept, r = 1
    one_sided = o.capo(0.1, delta_f=0.005, delta_h=0.0, delta_h_high=jnp.inf)
    np.testing.assert_allclose(gradient(one_sided, batch), [0.0, 2.0, -1.0, 0.0], atol=1e-7)
    # s = 0.11 and -0.076 are beyond √(2·1e-4) = 0.014; at a hundredth of the step none is
    np.testing.assert_allclose(gradient(o.capo(0.1), batch), [0.0, 0.0, -1.0, 0.0], atol=1e-7)
    slow = gradient(o.capo(0.001), batch)
    np.testing.assert_allclose(slow, [-2.0, 2.0, -1.0, 0.0], atol=1e-7)  # the last: s = 0.03
    rollout = dataclasses.replace(batch.rollout, logp_rollout=stats.logp - jnp.log(1.25))
    moved = gradient(o.capo(0.001), dataclasses.replace(batch, rollout=rollout))
    np.testing.assert_allclose(moved, [0.0, 2.5, 0.0, 0.0], atol=1e-6)  # r = 1.25: GRPO's clip


def test_predictions_are_those_of_the_whole_matrices():
    """g·D + DᵀHD/2 and DᵀFD/2 over the flattened [V·D] unembedding, D = step_size/width·g."""
    rng = np.random.default_rng(0)
    vocab, width, step = 7, 5, 0.7
    policies = rng.dirichlet(np.full(vocab, 0.4), size=6)
    states = rng.normal(size=(6, width))
    advantages = rng.normal(size=6)
    wanted = []
    for pi, x, a in zip(policies, states, advantages, strict=True):
        away = np.eye(vocab)[0] - pi
        g = a * np.kron(away, x)
        fisher = np.kron(np.outer(away, away), np.outer(x, x))
        h = a * (fisher - np.kron(np.diag(pi) - np.outer(pi, pi), np.outer(x, x)))
        d = step / width * g
        wanted.append((g @ d + 0.5 * d @ h @ d, 0.5 * d @ fisher @ d))
    found = predicted_by_step(*stats_of(policies, advantages, (states**2).mean(-1)), step)
    np.testing.assert_allclose(np.stack([leaf[0] for leaf in found], -1), wanted, rtol=2e-4)


def test_a_nearly_certain_token_is_kept():
    """Rounding of sums near 1 does not look like a step downhill."""
    rest = np.array([1e-3, 1e-5, 1e-7, 0.0])
    policies = np.stack([1 - rest, rest / 2, rest / 2], -1)
    for sign in (1.0, -1.0):
        stats, batch = stats_of(policies, np.full(4, sign), np.ones(4))
        assert (predicted_by_step(stats, batch, 0.1).objective >= 0).all()


@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_sums_over_the_vocabulary(tiny, prompts, soft_cap):
    model, params = tiny
    model = Model(dataclasses.replace(model.config, final_soft_cap=soft_cap))

    @jax.jit
    def both(params):
        decoder = model.bind(params)
        states, _ = full_forward(decoder, prompts.tokens, prompts.mask)
        pi = jax.nn.softmax(decoder.logits(states) / 0.8)
        square = jnp.mean((states / 0.8) ** 2, axis=-1)
        wanted = jnp.stack([(pi**2).sum(-1), (pi**3).sum(-1), square], -1)
        flat = states.reshape(-1, states.shape[-1])
        return last_layer(decoder, flat, 0.8).reshape(wanted.shape), wanted

    np.testing.assert_allclose(*both(params), rtol=1e-4)


def test_an_update_masks_by_it(tiny):
    """The sums reach the objective through the scorer."""
    model, params = tiny
    objective = o.capo(1.0, 0.005, 0.0, jnp.inf, delta_low=1.0, delta_high=jnp.inf)
    update = make_update(model, objective, optax.sgd(0.1), temperature=1.0)
    state = init_state(jax.tree.map(jnp.copy, params), optax.sgd(0.1))
    _, metrics = update(state, made_batch())
    assert 0 < reduce_metrics(metrics)["mask/fraction"] < 1


def test_what_is_refused():
    with pytest.raises(ValueError, match="step_size=0.0 > 0"):
        o.capo(step_size=0.0)
    with pytest.raises(ValueError, match="delta_h_high=-1.0 needed"):
        o.capo(delta_h_high=-1.0)
