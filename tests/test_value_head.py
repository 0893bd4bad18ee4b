"""A critic on the policy's own hidden states: what it reads, what it leaves alone, and a run."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_critic import batch_with_values
from test_update import assert_close

from dppo_jax import objectives as o
from dppo_jax.critic import HeadCritic, ValueHead
from dppo_jax.metrics import reduce_metrics
from dppo_jax.models.decoder import Model
from dppo_jax.scoring import score
from dppo_jax.update import init_state, make_update

VARIANT = Path(__file__).parent.parent / "configs/algorithms/variants/ppo_value_head.gin"


@pytest.fixture(scope="module")
def small(tiny):
    model, params = tiny
    one = Model(dataclasses.replace(model.config, layers=1))
    return one, params | {"blocks": jax.tree.map(lambda leaf: leaf[:1], params["blocks"])}


def test_values_are_of_the_policys_states_and_start_at_zero(small):
    model, policy = small
    batch = batch_with_values()
    for outputs, hidden, shape in ((None, None, (8, 5)), (6, 4, (8, 5, 6))):
        critic = ValueHead(optax.sgd(0.1), outputs, hidden).build(model.config)
        params = critic.init(jax.random.key(0), policy)
        structure = jax.tree.structure(jax.tree.map(lambda _: 0, params))
        axes = jax.tree.map(lambda _: 0, critic.logical_axes, is_leaf=lambda x: type(x) is tuple)
        assert jax.tree.structure(axes) == structure
        seen = []

        def also(decoder, states, rollout, params=params, critic=critic, seen=seen):
            seen.append(states.shape)
            return {"values": critic.values(params, rollout, states)}

        values = jax.eval_shape(
            lambda also=also: score(model, policy, batch.rollout, temperature=1.0, also=also).values
        )
        assert values.shape == shape and seen == [(40, 24)]
        states = jax.random.normal(jax.random.key(1), (40, 24))
        assert not critic.values(params, batch.rollout, states).any()
    with pytest.raises(ValueError, match="hidden=0: a layer has at least one unit"):
        ValueHead(optax.sgd(0.1), hidden=0)


@pytest.fixture(scope="module")
def stepped(small):
    """After three steps, by whether the value loss may change the policy; and without a critic."""
    model, policy = small
    found = {}
    for shared in (False, True, None):
        objective = o.dppo_binary_tv() if shared is None else o.with_value_loss(o.dppo_binary_tv())
        critic = None
        state = init_state(jax.tree.map(jnp.copy, policy), optax.sgd(0.05))
        if shared is not None:
            critic = HeadCritic(ValueHead(optax.sgd(0.02), shared_gradient=shared), model.config)
            values = init_state(critic.init(jax.random.key(0), policy), critic.optimizer)
            state = dataclasses.replace(state, critic=values)
        update = make_update(model, objective, optax.sgd(0.05), critic, temperature=1.0)
        batch = dataclasses.replace(batch_with_values(), values_old=jnp.zeros((8, 5)))
        errors = []
        for _ in range(3):
            state, metrics = update(state, batch)
            errors.append(reduce_metrics(metrics).get("critic/squared_error"))
        found[shared] = state, errors
    return found


def test_a_stopped_gradient_leaves_the_policy_alone(stepped):
    assert_close(stepped[False][0].params, stepped[None][0].params, 1e-6)
    assert jnp.abs(stepped[False][0].critic.params["head"]["weight"]).max() > 1e-3


def test_a_shared_gradient_changes_the_policy(stepped):
    apart = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), *(stepped[s][0].params for s in (True, None))
    )
    assert max(jax.tree.leaves(apart)) > 1e-4


@pytest.mark.parametrize("shared", [False, True])
def test_the_head_learns(stepped, shared):
    errors = stepped[shared][1]
    assert errors[2] < errors[1] < errors[0]


def test_a_run_with_a_head(dppo, toy_recipe, tmp_path):
    overlay = tmp_path / "head.gin"
    overlay.write_text(
        f'from __gin__ import dynamic_registration\ninclude "{toy_recipe}"\ninclude "{VARIANT}"\n'
        "STEPS = 2\n"
    )
    done = dppo("train", overlay, "--workdir", tmp_path / "run")
    assert done.status == 0, done.err
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["critic/value_mean"] != lines[1]["critic/value_mean"]
    assert all(np.isfinite(line["critic/explained_variance"]) for line in lines)
    assert all(line["time/compilations"] == 0 for line in lines[1:])
