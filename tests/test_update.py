"""Exact accumulation, clipping and schedule, and a step that is compiled once."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dppo_jax.accumulate import accumulate
from dppo_jax.metrics import CompilationCounter, reduce_metrics
from dppo_jax.models.decoder import Model, full_forward
from dppo_jax.objectives import dppo_binary_tv, dppo_exact_tv, seq_mean_token_mean, token_mean
from dppo_jax.optimizer import adamw
from dppo_jax.records import Batch, LossSum, Mean, Rollout, TrainState, fold_metrics
from dppo_jax.scoring import score
from dppo_jax.update import (
    gradient_step,
    init_state,
    make_update,
    microbatch,
    take_prompts,
)

PROMPTS, ROWS, PROMPT, RESPONSE, STORED, VOCAB = 4, 8, 3, 5, 4, 37
AGGREGATIONS = {"token_mean": token_mean, "seq_mean_token_mean": seq_mean_token_mean}


def made_batch(seed=0):
    """Ragged rows whose sampler was another policy, so that ratios and masks are uneven."""
    rng = np.random.default_rng(seed)
    lengths = np.array([5, 1, 3, 4, 2, 5, 1, 3])
    mask = np.arange(RESPONSE) < lengths[:, None]
    prompt_mask = np.arange(PROMPT) >= PROMPT - np.array([3, 1, 2, 3])[:, None]
    logp = np.where(mask, rng.uniform(-4, -0.5, mask.shape), 0)
    rollout = Rollout(
        prompt_tokens=jnp.asarray(rng.integers(VOCAB, size=(PROMPTS, PROMPT)), jnp.int32),
        prompt_mask=jnp.asarray(prompt_mask),
        response_tokens=jnp.asarray(rng.integers(VOCAB, size=mask.shape), jnp.int32),
        response_mask=jnp.asarray(mask),
        logp_rollout=jnp.asarray(logp, jnp.float32),
        topk_ids=jnp.asarray(rng.integers(VOCAB, size=(*mask.shape, STORED)), jnp.int32),
        topk_logp_rollout=jnp.asarray(rng.uniform(-5, -1, (*mask.shape, STORED)), jnp.float32),
        entropy_rollout=jnp.ones(mask.shape, jnp.float32),
        finish_reason=jnp.ones(ROWS, jnp.int32),
    )
    advantages = rng.normal(size=(ROWS, 1)) * np.ones(mask.shape)
    return Batch(rollout, jnp.asarray(advantages, jnp.float32))


def loss_of(model, objective, temperature=1.0):
    def loss(params, batch):
        stats = score(model, params, batch.rollout, temperature=temperature)
        return objective.loss(stats, batch)

    return loss


def gradients(small, batch, aggregate=token_mean, microbatches=1):
    model, params = small
    loss = loss_of(model, dppo_binary_tv(aggregate=aggregate))
    return jax.jit(lambda p, b: accumulate(loss, p, b, microbatches))(params, batch)


@pytest.fixture(scope="module")
def small(tiny):
    """One layer of the tiny model, which compiles in half the time."""
    model, params = tiny
    one = Model(dataclasses.replace(model.config, layers=1))
    return one, params | {"blocks": jax.tree.map(lambda leaf: leaf[:1], params["blocks"])}


@pytest.fixture(scope="module")
def whole(small):
    return {name: gradients(small, made_batch(), rule) for name, rule in AGGREGATIONS.items()}


def assert_close(ours, theirs, tolerance=1e-6):
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "microbatches"), [("token_mean", 2), ("token_mean", 4), ("seq_mean_token_mean", 4)]
)
def test_microbatches_change_nothing(small, whole, name, microbatches):
    grads, total = gradients(small, made_batch(), AGGREGATIONS[name], microbatches)
    assert_close(grads, whole[name][0])
    assert_close(total, whole[name][1], 3e-6)


def test_microbatches_hold_every_prompt_once_with_its_samples():
    rows = {"prompts": jnp.arange(6), "sequences": jnp.arange(12) // 2}
    for index in range(3):
        part = microbatch(rows, index, 3)
        assert part["prompts"].tolist() == [index, index + 3]
        assert part["sequences"].tolist() == [index, index, index + 3, index + 3]


def test_padding_changes_nothing(small, whole):
    """Other ids where the masks are False, and more columns of them."""
    batch = made_batch()
    r = batch.rollout

    def response(values, fill):
        masked = jnp.where(
            r.response_mask.reshape(*r.response_mask.shape, *(1,) * (values.ndim - 2)), values, fill
        )
        wide = ((0, 0), (0, 3), *((0, 0),) * (values.ndim - 2))
        return jnp.pad(masked, wide, constant_values=fill)

    prompt_tokens = jnp.where(r.prompt_mask, r.prompt_tokens, 9)
    wider = Rollout(
        prompt_tokens=jnp.pad(prompt_tokens, ((0, 0), (2, 0)), constant_values=4),
        prompt_mask=jnp.pad(r.prompt_mask, ((0, 0), (2, 0))),
        response_tokens=response(r.response_tokens, 21),
        response_mask=response(r.response_mask, False),
        logp_rollout=response(r.logp_rollout, -3.0),
        topk_ids=response(r.topk_ids, 2),
        topk_logp_rollout=response(r.topk_logp_rollout, -1.0),
        entropy_rollout=response(r.entropy_rollout, 7.0),
        finish_reason=r.finish_reason,
    )
    for name, rule in AGGREGATIONS.items():
        grads, total = gradients(small, Batch(wider, response(batch.advantages, 5.0)), rule)
        assert_close(grads, whole[name][0])
        assert_close(total, whole[name][1], 3e-6)


def test_gradient_is_that_of_the_plain_form(small):
    """Logits, softmax and the masked loss written out, at a temperature, differentiated by JAX."""
    model, params = small
    batch, temperature, delta = made_batch(), 0.8, 0.15
    r = batch.rollout

    def plain(params):
        decoder = model.bind(params)
        asked, asked_mask = (jnp.repeat(x, 2, 0) for x in (r.prompt_tokens, r.prompt_mask))
        tokens = jnp.concatenate([asked, r.response_tokens], 1)
        mask = jnp.concatenate([asked_mask, r.response_mask], 1)
        hidden, _ = full_forward(decoder, tokens, mask)
        logits = hidden @ decoder.unembedding_matrix().T / temperature
        logp = jax.nn.log_softmax(logits[:, PROMPT - 1 : -1])
        logp = jnp.take_along_axis(logp, r.response_tokens[..., None], -1)[..., 0]
        pi, mu = jnp.exp(jax.lax.stop_gradient(logp)), jnp.exp(r.logp_rollout)
        away = jnp.sign(pi - mu) == jnp.sign(batch.advantages)
        weight = jnp.where((jnp.abs(pi - mu) > delta) & away, 0.0, pi / mu) * r.response_mask
        return -jnp.sum(batch.advantages * weight * logp) / r.response_mask.sum(), weight

    (value, weight), expected = jax.jit(jax.value_and_grad(plain, has_aux=True))(params)
    kept = float((weight > 0).sum())
    assert 0 < kept < float(r.response_mask.sum()), "the mask should drop some tokens"
    loss = loss_of(model, dppo_binary_tv(delta=delta), temperature)
    ours, total = jax.jit(lambda p: accumulate(loss, p, batch, 1))(params)
    assert float(total.loss_sum / total.weight_sum) == pytest.approx(float(value), rel=1e-5)
    assert_close(ours, expected)


# ---- the optimizer, in closed form -------------------------------------------------------------


def updates_of(optimizer, gradient, steps):
    """What the optimizer adds to a parameter in each of `steps` steps of one gradient."""
    params = {"w": jnp.zeros(len(gradient))}
    state, out = optimizer.init(params), []
    for _ in range(steps):
        updates, state = optimizer.update({"w": jnp.asarray(gradient)}, state, params)
        out.append(np.asarray(updates["w"]))
    return np.array(out)


def test_schedule():
    """Adam steps by -rate · sign where the gradient never changes."""

    def rates(**options):
        steps = -updates_of(adamw(learning_rate=0.1, clip_norm=1e3, **options), [1.0], 7)[:, 0]
        return steps.tolist()

    def near(values):
        return pytest.approx(values, rel=1e-4, abs=1e-8)

    assert rates() == near([0.1] * 7)
    assert rates(warmup_steps=4) == near([0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    cosine = [0.1 * (1 + np.cos(np.pi * i / 4)) / 2 for i in range(5)]
    assert rates(decay_steps=4) == near([*cosine, 0, 0])
    assert rates(warmup_steps=2, decay_steps=6) == near([0, 0.05, *cosine])
    floor = [0.02 + 0.8 * rate for rate in cosine]
    assert rates(decay_steps=4, final_fraction=0.2) == near([*floor, 0.02, 0.02])
    with pytest.raises(ValueError, match="decay_steps=3 must exceed warmup_steps=3"):
        adamw(learning_rate=0.1, warmup_steps=3, decay_steps=3)


def test_clipping():
    """With eps far above the gradient Adam is linear: its steps show the clipped gradient."""
    linear = partial(adamw, learning_rate=1.0, eps=1e4)
    short, long = [0.3, -0.4], [30.0, -40.0]  # norms 0.5 and 50

    def first(gradient, clip_norm):
        return -1e4 * updates_of(linear(clip_norm=clip_norm), gradient, 1)[0]

    np.testing.assert_allclose(first(short, 1.0), short, rtol=1e-3)
    np.testing.assert_allclose(first(long, 1.0), [0.6, -0.8], rtol=1e-3)
    np.testing.assert_allclose(first(long, 5.0), [3.0, -4.0], rtol=1e-3)
    np.testing.assert_allclose(first(long, 1e9), long, rtol=2e-2)
    with pytest.raises(ValueError, match="clip_norm=0.0 must be positive; 1e9 clips nothing"):
        adamw(learning_rate=0.1, clip_norm=0.0)


def test_weight_decay():
    params = {"w": jnp.array([2.0])}
    optimizer = adamw(learning_rate=0.1, weight_decay=0.5)
    updates, _ = optimizer.update({"w": jnp.zeros(1)}, optimizer.init(params), params)
    assert float(updates["w"][0]) == pytest.approx(-0.1 * 0.5 * 2)


# ---- steps ---------------------------------------------------------------------------------------


def squares(params, rows):
    """Σ (w - x)² over rows, weight one each."""
    loss = jnp.sum((params["w"] - rows) ** 2)
    count = jnp.float32(len(rows))
    return LossSum(loss, count, {"loss/squares": Mean(loss, count)})


def test_steps_decrease_a_simple_loss():
    optimizer = optax.sgd(0.1)
    state, rows = init_state({"w": jnp.zeros(())}, optimizer), jnp.array([1.0, 2.0, 3.0, 6.0])
    step_of, losses = jax.jit(lambda s: gradient_step(s, squares, rows, optimizer, 2)), []
    for step in range(30):
        state, metrics = step_of(state)
        assert int(state.step) == step + 1
        losses.append(reduce_metrics(metrics)["loss/total"])
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(12.5)  # (1 + 4 + 9 + 36) / 4
    assert float(state.params["w"]) == pytest.approx(3, abs=0.01)  # the mean
    _, metrics = step_of(init_state({"w": jnp.zeros(())}, optimizer))
    numbers = reduce_metrics(metrics)
    assert numbers["update/gradient_norm"] == pytest.approx(6)  # 2 · mean
    assert numbers["update/step_norm"] == pytest.approx(0.6)


@pytest.fixture(scope="module")
def stepped(small):
    """Three updates of one function: states before and after, metrics, compilations of each."""
    model, params = small
    optimizer = adamw(learning_rate=1e-3)
    update = make_update(model, dppo_binary_tv(), optimizer, temperature=1.0, microbatches=2)
    counter = CompilationCounter()
    state = init_state(jax.tree.map(jnp.copy, params), optimizer)
    states, numbers, compilations = [state], [], []
    for seed in range(3):
        batch = jax.block_until_ready(made_batch(seed))
        before = counter.total
        state, metrics = update(states[-1], batch)
        compilations.append(counter.total - before)
        states.append(state)
        numbers.append(reduce_metrics(metrics))
    nothing = made_batch()
    nothing = dataclasses.replace(
        nothing,
        rollout=dataclasses.replace(
            nothing.rollout, response_mask=jnp.zeros_like(nothing.rollout.response_mask)
        ),
    )
    fresh = init_state(jax.tree.map(jnp.copy, params), optimizer)
    empty_state, empty_metrics = update(fresh, nothing)
    return states, numbers, compilations, empty_state, reduce_metrics(empty_metrics)


def test_the_update_is_compiled_once(stepped):
    _, _, compilations, _, _ = stepped
    assert compilations == [1, 0, 0]


def test_the_given_state_is_reused(stepped):
    """Donation: two copies of parameters and optimizer would not fit where one does."""
    states = stepped[0]
    for old in states[:-1]:
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.params, old.opt_state)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[-1]))
    assert int(states[-1].step) == 3


def test_an_update_reports_loss_mask_and_mismatch(stepped):
    for numbers in stepped[1]:
        assert {name.split("/")[0] for name in numbers} >= {"loss", "mask", "mismatch", "update"}
        assert numbers["loss/total"] == pytest.approx(numbers["loss/policy"])
        assert 0 < numbers["mask/fraction"] < 1
        for name, value in numbers.items():
            # A mean over the masked tokens of one sign is NaN where there are none.
            of_masked = name.startswith("mask/") and name.endswith(("_positive", "_negative"))
            assert np.isfinite(value) or (of_masked and "fraction" not in name), name


def test_a_state_that_the_objective_carries(small):
    """The loss reads it in every microbatch; it moves once a gradient step, by all of the step."""
    model, params = small
    plain = dppo_binary_tv()

    def loss(stats, batch):
        out = plain.loss(stats, batch)
        seen = Mean(batch.objective_state["dual"] * out.weight_sum, out.weight_sum)
        return out._replace(metrics=out.metrics | {"dual/seen": seen})

    def next_state(state, metrics):
        return {"dual": state["dual"] + metrics["dual/seen"].count}

    objective = plain._replace(
        loss=loss, initial_state={"dual": jnp.float32(2)}, next_state=next_state
    )
    update = make_update(model, objective, optax.sgd(0.0), temperature=1.0, microbatches=2)
    state = init_state(jax.tree.map(jnp.copy, params), optax.sgd(0.0), objective.initial_state)
    batch = made_batch()
    tokens = float(batch.rollout.response_mask.sum())
    for expected in (2.0, 2.0 + tokens):
        state, metrics = update(state, batch)
        assert reduce_metrics(metrics)["dual/seen"] == expected
    assert float(state.objective_state["dual"]) == 2.0 + 2 * tokens
    assert float(objective.initial_state["dual"]) == 2  # an update donates its own copy only


def test_the_parameters_that_sampled_go_with_exact_divergences(small):
    model, params = small
    state = init_state(jax.tree.map(jnp.copy, params), optax.sgd(0.0))
    for objective, extra in ((dppo_exact_tv(), ()), (dppo_binary_tv(), (params,))):
        update = make_update(model, objective, optax.sgd(0.0), temperature=1.0)
        with pytest.raises(ValueError, match="anchor's parameters"):
            update(state, made_batch(), *extra)


def test_a_batch_without_a_token_moves_nothing(small, stepped):
    _, _, _, state, numbers = stepped
    assert numbers["update/gradient_norm"] == numbers["update/step_norm"] == 0
    assert_close(state.params, small[1], 0)
    assert np.isnan(numbers["loss/total"])


def test_the_minibatch_of_prompts():
    batch = made_batch()
    part = take_prompts(batch, jnp.array([3, 0, 2]))
    for ours, theirs in zip(*map(jax.tree.leaves, (part, batch)), strict=True):
        rows = [3, 0, 2] if len(theirs) == PROMPTS else [6, 7, 0, 1, 4, 5]
        np.testing.assert_array_equal(ours, np.asarray(theirs)[rows])


def test_folding_takes_sums_and_maxima():
    stacked = {"a": Mean(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]))}
    assert tuple(map(float, fold_metrics(stacked)["a"])) == (3, 7)
    assert isinstance(init_state({"w": jnp.zeros(2)}, optax.sgd(1.0)), TrainState)
