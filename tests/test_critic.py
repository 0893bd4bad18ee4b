"""The critic: what it sees, how it learns beside the policy, and runs that have one."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_update import assert_close, made_batch

from dppo_jax import objectives as o
from dppo_jax.critic import Critic, ValueModel
from dppo_jax.metrics import reduce_metrics
from dppo_jax.models.decoder import Model
from dppo_jax.update import init_state, make_update

ALL_TERMS = o.with_value_loss(
    o.with_entropy_bonus(o.with_reference_kl(o.dppo_binary_tv(), 0.1, o.k3_plus), 0.05), clip=0.2
)


@pytest.fixture(scope="module")
def small(tiny):
    model, params = tiny
    one = Model(dataclasses.replace(model.config, layers=1))
    return one, params | {"blocks": jax.tree.map(lambda leaf: leaf[:1], params["blocks"])}


def made_critic(small, outputs=None, optimizer=None):
    """With a head that is not zero, so that the values tell tokens apart."""
    model, policy = small
    critic = Critic(ValueModel(optimizer or optax.sgd(0.1), outputs), model.config)
    params = critic.init(jax.random.key(0), policy)
    weight = jax.random.normal(jax.random.key(1), params["head"]["weight"].shape)
    return critic, params | {"head": params["head"] | {"weight": weight}}


def batch_with_values(seed=0):
    batch = made_batch(seed)
    rng = np.random.default_rng(seed + 100)

    def drawn():
        return jnp.asarray(rng.normal(size=batch.advantages.shape), jnp.float32)

    reference = batch.rollout.logp_rollout + 0.3 * drawn()
    return dataclasses.replace(batch, logp_ref=reference, values_old=drawn(), returns=drawn())


# ---- the model -----------------------------------------------------------------------------------


def test_values_start_at_zero_and_the_decoder_as_the_policy(small):
    model, policy = small
    for outputs, shape in ((None, ()), (6, (6,))):
        critic = Critic(ValueModel(optax.sgd(0.1), outputs), model.config)
        params = critic.init(jax.random.key(0), policy)
        values = jax.jit(critic.values)(params, made_batch().rollout)
        assert values.shape == (8, 5, *shape) and not values.any()
        assert_close(params["decoder"], policy, 0)
    structure = jax.tree.structure(jax.tree.map(lambda _: 0, params))
    axes = jax.tree.map(lambda _: 0, critic.logical_axes, is_leaf=lambda x: isinstance(x, tuple))
    assert jax.tree.structure(axes) == structure


def test_a_decoder_of_its_own_starts_at_random(small):
    model, policy = small
    other = dataclasses.replace(model.config, width=16, head_size=4)
    critic = Critic(ValueModel(optax.sgd(0.1), decoder=other), model.config)
    params = critic.init(jax.random.key(0), policy)
    assert params["head"]["weight"].shape == (16, 1) and params["decoder"]["embedding"].std() > 0
    assert jax.jit(critic.values)(params, made_batch().rollout).shape == (8, 5)
    with pytest.raises(ValueError, match="outputs=0: a critic predicts at least one"):
        ValueModel(optax.sgd(0.1), outputs=0)


def test_a_value_is_of_what_came_before(small):
    """V_t does not see token t nor any later one, and sees the one before."""
    critic, params = made_critic(small)
    values = jax.jit(critic.values)
    rollout = made_batch().rollout
    tokens = rollout.response_tokens
    changed = dataclasses.replace(rollout, response_tokens=tokens.at[:, 2].set(tokens[:, 2] + 1))
    before, after = values(params, rollout), values(params, changed)
    assert_close(before[:, :3], after[:, :3], 0)
    long = np.asarray(rollout.response_mask[:, 3])
    assert (np.abs(before - after)[long, 3] > 1e-4).all()


# ---- the update ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stepped(small):
    """States and metrics after one step of every term at once, by number of microbatches."""
    model, policy = small
    critic, values = made_critic(small)
    found = {}
    for parts in (1, 2):
        update = make_update(
            model, ALL_TERMS, optax.sgd(0.1), critic, temperature=1.0, microbatches=parts
        )
        state = init_state(jax.tree.map(jnp.copy, policy), optax.sgd(0.1))
        valued = init_state(jax.tree.map(jnp.copy, values), critic.optimizer)
        found[parts] = update(dataclasses.replace(state, critic=valued), batch_with_values())
    return found


def test_microbatches_change_nothing(stepped):
    (one, metrics), (two, others) = stepped[1], stepped[2]
    assert_close(one, two, 1e-6)
    ours, theirs = reduce_metrics(metrics), reduce_metrics(others)
    assert ours.keys() == theirs.keys() >= {
        "loss/kl_ref", "loss/entropy_bonus", "loss/value", "critic/gradient_norm",
        "critic/step_norm", "critic/squared_error", "update/gradient_norm",
    }  # fmt: skip
    for name, value in ours.items():
        assert value == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    parts = ("loss/policy", "loss/kl_ref", "loss/entropy_bonus", "loss/value")
    assert ours["loss/total"] == pytest.approx(sum(ours[name] for name in parts), rel=1e-5)
    assert int(one.step) == int(one.critic.step) == 1


def test_the_policy_does_not_feel_the_critic(small, stepped):
    """The same step of the policy without the value loss, which goes through the single pass."""
    model, policy = small
    plain = o.with_entropy_bonus(o.with_reference_kl(o.dppo_binary_tv(), 0.1, o.k3_plus), 0.05)
    update = make_update(model, plain, optax.sgd(0.1), temperature=1.0)
    state, _ = update(
        init_state(jax.tree.map(jnp.copy, policy), optax.sgd(0.1)), batch_with_values()
    )
    assert_close(state.params, stepped[1][0].params, 1e-6)


@pytest.mark.parametrize("kind", ["value", "quantiles"])
def test_the_critic_learns_what_it_is_told(small, kind):
    """Returns that the tokens before decide: the error of a fixed batch falls to a tenth."""
    model, policy = small
    batch = batch_with_values()
    tokens = batch.rollout.response_tokens
    returns = jnp.cos(tokens.astype(jnp.float32).cumsum(axis=1))
    returns = jnp.concatenate([jnp.zeros((8, 1)), returns[:, :-1]], axis=1)  # of the tokens before
    objective, outputs = o.with_value_loss(o.pg_is(), clip=None), None
    if kind == "quantiles":
        objective, outputs = o.with_quantile_value_loss(o.pg_is(), heads=2, kappa=0.2), 8
        returns = returns[..., None] + jnp.linspace(-0.1, 0.1, 4)
        batch = dataclasses.replace(batch, values_old=jnp.zeros((8, 5, 8)))
    batch = dataclasses.replace(batch, returns=returns)
    critic = Critic(ValueModel(optax.adam(1e-2), outputs), model.config)
    values = critic.init(jax.random.key(0), policy)
    state = init_state(jax.tree.map(jnp.copy, policy), optax.sgd(0.0))
    state = dataclasses.replace(state, critic=init_state(values, critic.optimizer))
    update = make_update(model, objective, optax.sgd(0.0), critic, temperature=1.0)
    errors = []
    for _ in range(60):
        state, metrics = update(state, batch)
        errors.append(reduce_metrics(metrics)["critic/squared_error"])
    assert errors[-1] < 0.1 * errors[0]


# ---- runs ----------------------------------------------------------------------------------------


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(workdir):
    written = lines(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in written]


@pytest.fixture(scope="module")
def run(dppo, every_term_recipe, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    done = dppo("train", every_term_recipe, "--workdir", workdir)
    assert done.status == 0, done.err
    return workdir


def test_a_run_with_every_term(run):
    written = lines(run / "metrics.jsonl")
    for name in (
        "loss/value", "loss/kl_ref", "loss/entropy_bonus", "reward/penalty",
        "critic/explained_variance", "critic/gradient_norm", "critic/squared_error",
    ):  # fmt: skip
        assert all(isinstance(line[name], float) for line in written), name
    duals = [line["r2vpo/dual"] for line in written]
    assert duals[0] != 0.04 and len(set(duals)) == len(duals)  # moved once a gradient step
    # the policy is its own reference at first, and moves away from it
    assert written[0]["reward/penalty"] == pytest.approx(0, abs=1e-5)
    assert abs(written[-1]["reward/penalty"]) > 1e-4 and written[-1]["loss/kl_ref"] > 1e-5
    assert [line["time/compilations"] for line in written][1:] == [0] * 3
    assert (run / "reference").is_dir()


def test_it_goes_on_as_if_it_had_not_stopped(dppo, run, every_term_recipe, tmp_path):
    """With the critic, its optimizer, the same reference and the objective's dual variable."""
    stopped = tmp_path / "stopped"
    shutil.copytree(run, stopped)
    shutil.rmtree(stopped / "checkpoints" / "4")
    (stopped / "summary.json").unlink()
    done = dppo("train", every_term_recipe, "--workdir", stopped)
    assert done.status == 0 and "after step 2 of 4" in done.out, done.err
    assert untimed(stopped) == untimed(run)


def test_eval_reads_the_policy_beside_a_critic(dppo, run, every_term_recipe):
    done = dppo("eval", every_term_recipe, "--checkpoint", run, "--json")
    assert done.status == 0, done.err
    after = json.loads((run / "summary.json").read_text())["after"]
    assert json.loads(done.out)["sets"] == after


@pytest.mark.slow
def test_dvpo_runs(dppo, toy_recipe, tmp_path):
    path = tmp_path / "dvpo.gin"
    path.write_text(
        "from __gin__ import dynamic_registration\n"
        f'include "{toy_recipe}"\ninclude "configs/algorithms/dvpo.gin"\n'
    )
    done = dppo("train", path, "--workdir", tmp_path / "run", "--gin.STEPS=2")
    assert done.status == 0, done.err
    first, second = lines(tmp_path / "run" / "metrics.jsonl")
    assert first["critic/value_spread"] == 0 < second["critic/value_spread"]
    assert second["loss/value"] > 0 and second["critic/gradient_norm"] > 0


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("train.train.critic = None", "needs a critic: set train.critic"),
        ("train.train.objective = @objectives.grpo()", "the critic would learn nothing"),
    ],
)
def test_half_a_critic_is_refused(dppo, every_term_recipe, tmp_path, binding, message):
    path = tmp_path / "half.gin"
    path.write_text(every_term_recipe.read_text() + binding + "\n")
    refused = dppo("train", path, "--workdir", tmp_path / "run")
    assert refused.status == 2 and refused.err.count("\n") == 1
    assert message in refused.err and not (tmp_path / "run").exists()


def test_the_reference_may_be_another_policy(dppo, run, every_term_recipe, tmp_path):
    """Another run's parameters, so that already the first step is away from the reference."""
    path = tmp_path / "other.gin"
    path.write_text(
        "from __gin__ import dynamic_registration\nfrom dppo_jax import initial_policy\n"
        f'from dppo_jax import train\ninclude "{every_term_recipe}"\n'
        "train.train.reference = @initial_policy.checkpoint_policy()\n"
        f'initial_policy.checkpoint_policy.directory = "{run}"\n'
    )
    done = dppo("train", path, "--workdir", tmp_path / "run", "--gin.STEPS=1")
    assert done.status == 0, done.err
    (line,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert abs(line["reward/penalty"]) > 1e-3
