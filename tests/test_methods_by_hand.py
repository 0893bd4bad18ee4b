"""Hand-computed gradients of the methods that no other table has, under their own defaults."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax import objectives as o
from dppo_jax.objectives.methods import METHODS

sys.path[:0] = [str(Path(__file__).parent / "contracts")]

from objective_batches import from_probabilities  # noqa: E402

# π/μ = 2.2, 4, 1.2, 0.6, 4; π/old = 1.1, 1.33, 1.2, 0.75, 1.05; old/μ = 2, 3, 1, 0.8, 3.8
MU, OLD = [0.2, 0.1, 0.5, 0.5, 0.1], [0.4, 0.3, 0.5, 0.4, 0.38]
PI, A = [0.44, 0.4, 0.6, 0.3, 0.399], [1.0, 1.0, 1.0, -1.0, 1.0]
# π/old of tokens 1 and 3 is past PPO's clip at 0.8, 1.2 (token 2 is on it): their gradient is 0.
# By hand -A·π/old·weight; for minirl -A·min(π/μ, C).
OF_FIVE = {
    "minirl": (o.minirl(), [-2.2, 0, -1.2, 0, -3.99]),
    "minirl_tis": (o.minirl_tis(), [-2.2, 0, -1.2, 0, -3.0]),
    "grpo_tis": (o.grpo_tis(delta_high=0.25), [-1.1 * 2, 0, -1.2, 0, -1.05 * 2]),
    # Π old/μ = 2 · 3 · 1 · .8 · 3.8 = 18.24
    "grpo_mis": (o.grpo_mis(delta_high=0.25), [0] * 5),
    "grpo_mis all": (
        o.grpo_mis(delta_high=0.25, highest=20.0), np.array([-1.1, 0, -1.2, 0, -1.05]) * 18.24,
    ),
    "grpo_icepop": (
        o.grpo_icepop(delta_high=0.25, highest=3.5), [-1.1 * 2, 0, -1.2, 0, 0],
    ),
    "ppo_critic": (o.ppo_critic(1.0, 9.0), [-2.2, -4.0, -1.2, 0.6, -3.99]),
    "dvpo": (o.dvpo(1.0, 9.0), [-2.2, -4.0, -1.2, 0.6, -3.99]),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_FIVE)
def test_by_hand(name):
    objective, expected = OF_FIVE[name]
    stats, batch = from_probabilities(MU, PI, A, old=OLD)
    shape = (1, 5, 2) if name == "dvpo" else (1, 5)
    values = jnp.ones(shape)
    stats = replace(stats, values=values)
    batch = replace(batch, values_old=values, returns=values)
    np.testing.assert_allclose(_gradient(objective, stats, batch)[0], expected, rtol=1e-5)


def test_sequences_that_drifted_off_by_hand():
    """grpo_opsm: A < 0 and mean log μ/π = (log 2 + log 1.5) / 2 = .549 > .5 goes; A > 0 stays."""
    for pi, sign, expected in (
        ([0.2, 0.4], -1.0, [0, 0]),
        ([0.2, 0.4], 1.0, [-0.5, -2 / 3]),
        ([0.6, 0.4], -1.0, [1.5, 0]),  # mean log μ/π = 0: PPO's clip alone
    ):
        stats, batch = from_probabilities([0.4, 0.6], pi, [sign, sign])
        found = _gradient(o.grpo_opsm(), stats, batch)[0]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_whole_vocabularies_by_hand():
    """OBJECTIVES' example, V = 5, sampled index 3, r = 2, A = 1: TV .15, KL .0627775 over all;
    Top-2 KL .0553194, TV .15; slots {0, 3}, 3 in the place of 1, KL .0548636. Each is masked where
    its δ is below, and kept with r where above."""
    mu, pi = np.array([0.5, 0.3, 0.1, 0.06, 0.04]), np.array([0.35, 0.35, 0.1, 0.12, 0.08])
    stats, batch = from_probabilities(mu[3:4], pi[3:4], [1.0])
    slots = np.array([0, 1])
    stats = replace(
        stats,
        topk_logp=jnp.log(jnp.asarray(pi[slots], jnp.float32))[None, None],
        exact_tv=jnp.full((1, 1), 0.5 * np.abs(mu - pi).sum()),
        exact_kl=jnp.full((1, 1), np.sum(mu * np.log(mu / pi))),
    )
    rollout = replace(
        batch.rollout,
        response_tokens=jnp.full((1, 1), 3),
        topk_ids=jnp.asarray(slots)[None, None],
        topk_logp_rollout=jnp.log(jnp.asarray(mu[slots], jnp.float32))[None, None],
    )
    batch = replace(batch, rollout=rollout)
    for make, divergence in (
        (o.dppo_exact_tv, 0.15),
        (o.dppo_exact_kl, 0.0627775),
        (o.dppo_topk_tv, 0.15),
        (o.dppo_topk_kl, 0.0553194),
        (partial(o.dppo, o.topk_slots_tv_measure), 0.15),
        (partial(o.dppo, o.topk_slots_kl_measure), 0.0548636),
        (o.cppo_kl, 0.0553194),  # T = 1: w = 1, S = W = 0, so c = δ
        (o.cppo, 0.15),
    ):
        for delta, expected in ((divergence - 1e-4, 0.0), (divergence + 1e-4, -2.0)):
            found = float(_gradient(make(delta=delta), stats, batch)[0, 0])
            assert found == pytest.approx(expected), (make, delta)


# Where else: the test whose table has the method's row.
ELSEWHERE = {
    "test_objectives.py": ["dppo_binary_tv", "dppo_binary_kl", "grpo", "grpo_clip_higher",
                           "grpo_relaxed", "pg_is", "pg_tis"],
    "test_trust_regions.py": ["drpo", "mask_drpo", "spo", "cppo_soft", "trm_max", "trm_avg"],
    "test_ratio_methods.py": ["ppo_clip", "dapo", "dr_grpo", "gspo", "gspo_token", "luspo", "gmpo",
                              "sapo", "vespo", "reinforce", "cispo", "minpro", "cpgd", "dro",
                              "bapo", "kl_cov", "clip_cov", "mask_bad_updates"],
    "test_regression_methods.py": ["rebel", "rover", "r2vpo"],
    "test_capo.py": ["capo"],
}  # fmt: skip
HERE = {"grpo_opsm", "dppo_exact_tv", "dppo_exact_kl", "dppo_topk_tv", "dppo_topk_kl", "cppo"}


def test_every_row_has_a_table():
    """A method without one is told; those named are used in the file that is said to have them."""
    elsewhere = [name for names in ELSEWHERE.values() for name in names]
    assert {method.name for method in METHODS} == {
        *elsewhere, *HERE, "cppo_kl", *(name.split()[0] for name in OF_FIVE),
    }  # fmt: skip
    for file, names in ELSEWHERE.items():
        text = (Path(__file__).parent / file).read_text()
        assert [name for name in names if f"{name}(" not in text] == [], file


def _gradient(objective, stats, batch):
    return jax.grad(lambda logp: objective.loss(replace(stats, logp=logp), batch).loss_sum)(
        stats.logp
    )
