"""Mismatch between trainer and sampler made on purpose, alone and in a run that is stopped."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax import rollout_policy as rp

KEY = jax.random.key(3)


def params(step):
    return {"w": jnp.full((2, 64), 1.0 + step), "b": jnp.full((3,), -0.1 * (step + 1))}


def sampled_from(policy, steps):
    """What steps 0..steps-1 sample from, when step n trains params(n)."""
    state, found = policy.init(params(0)), []
    for step in range(steps):
        chosen, state = policy.choose(state, params(step), jnp.int32(step), KEY)
        found.append(chosen)
    return found


def test_current_is_the_trained_policy():
    jax.tree.map(np.testing.assert_array_equal, sampled_from(rp.current(), 2)[1], params(1))


@pytest.mark.parametrize("lag", [1, 3])
def test_stale_lags_by_its_steps(lag):
    for step, chosen in enumerate(sampled_from(rp.stale(lag), 8)):
        jax.tree.map(np.testing.assert_array_equal, chosen, params(max(0, step - lag)))


def test_bfloat16_rounds_and_takes_half_the_memory():
    (chosen,) = sampled_from(rp.bfloat16_weights(), 1)
    assert chosen["b"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(chosen["b"], np.float32(-0.10009765625))  # 8 bits of 0.1


def test_noise_is_relative_and_new_each_key():
    policy = rp.noisy_weights(0.1)
    first, second = (policy.choose((), params(4), jnp.int32(0), k)[0]["w"]
                     for k in jax.random.split(KEY))  # fmt: skip
    for noisy in (first, second):
        assert float(jnp.std(noisy)) == pytest.approx(0.5, rel=0.3)  # 0.1 of 5
        assert float(jnp.mean(noisy)) == pytest.approx(5, abs=0.3)
    assert not np.array_equal(first, second)
    jax.tree.map(np.testing.assert_array_equal, policy.choose((), params(4), 0, KEY)[0],
                 policy.choose((), params(4), 1, KEY)[0])  # fmt: skip


def test_chained_policies_follow_each_other():
    chosen = sampled_from(rp.chained([rp.stale(2), rp.bfloat16_weights()]), 5)[4]
    expected = sampled_from(rp.bfloat16_weights(), 3)[2]
    jax.tree.map(np.testing.assert_array_equal, chosen, expected)


def test_what_a_policy_hands_on_is_not_copied():
    params = {"base": {"w": jnp.ones(3)}, "adapters": {"w": jnp.zeros(2)}}
    key = jax.random.key(0)
    choose = rp.chooser(rp.current())
    for step in range(2):
        chosen, state = choose((), params, step, key)
        assert chosen["base"]["w"] is params["base"]["w"]
        assert chosen["adapters"]["w"] is params["adapters"]["w"]
    policy = rp.stale(1)
    choose, state = rp.chooser(policy), policy.init(params)
    for step, expected in enumerate((0.0, 0.0, 1.0)):
        chosen, state = choose(
            state, params | {"adapters": {"w": jnp.full(2, float(step))}}, step, key
        )
        assert chosen["base"]["w"] is params["base"]["w"]
        np.testing.assert_array_equal(chosen["adapters"]["w"], expected)


def test_bad_values():
    with pytest.raises(ValueError, match="at least 1 step old"):
        rp.stale(0)
    with pytest.raises(ValueError, match="negative"):
        rp.noisy_weights(-0.1)


@pytest.mark.slow
def test_a_stopped_stale_run_goes_on_as_if_it_had_not(dppo, toy_recipe, tmp_path):
    """The remembered parameters are in the checkpoint; mismatch grows as the policy moves away."""
    recipe = tmp_path / "stale.gin"
    recipe.write_text(
        "from __gin__ import dynamic_registration\n"
        "from dppo_jax import rollout_policy\nfrom dppo_jax import train\n"
        f'include "{toy_recipe}"\n'
        "train.train.rollout_policy = @rollout_policy.stale()\n"
        "rollout_policy.stale.steps = 2\n"
    )
    done = dppo("train", recipe, "--workdir", tmp_path / "run")
    assert done.status == 0, done.err

    def mismatches(folder):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["mismatch/prob_abs_mean"] for line in lines]

    found = mismatches(tmp_path / "run")
    assert found[0] < 1e-6 < 1e-4 < min(found[1:])
    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "run", stopped)
    shutil.rmtree(stopped / "checkpoints" / "4")
    (stopped / "summary.json").unlink()
    done = dppo("train", recipe, "--workdir", stopped)
    assert done.status == 0 and "after step 2 of 4" in done.out, done.err
    assert mismatches(stopped) == found
