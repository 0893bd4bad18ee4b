"""Packed rows against columns of padding: plans, scores, gradients, and no second program."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from test_critic import batch_with_values
from test_update import assert_close, made_batch

from dppo_jax import packing
from dppo_jax.advantages import gae
from dppo_jax.batches import make_batch_of, score_packed
from dppo_jax.critic import ValueHead, ValueModel
from dppo_jax.metrics import CompilationCounter, reduce_metrics
from dppo_jax.models.decoder import Model
from dppo_jax.objectives import (
    dppo_binary_tv,
    gspo,
    kl_cov,
    rebel,
    seq_mean_token_mean,
    token_mean,
    with_entropy_bonus,
    with_value_loss,
)
from dppo_jax.packing import MOST_IN_A_ROW, Budget, plan
from dppo_jax.records import Batch
from dppo_jax.scoring import score
from dppo_jax.update import init_state, make_update


@hypothesis.given(
    st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(1, 3), st.integers(9, 30)
)
def test_a_plan_holds_every_sequence_once_and_no_cell_twice(lengths, rows, columns):
    made = plan(np.array(lengths), Budget(rows, columns))
    sequences, row, start = map(np.asarray, (made.sequences, made.row, made.start))
    assert sorted(sequences[sequences >= 0]) == list(range(len(lengths)))
    assert (sequences[int(made.count) :] == -1).all() and (sequences[: int(made.count)] >= 0).any()
    assert sequences.shape[0] == -(-len(lengths) // rows)  # whatever the lengths
    taken = np.zeros((len(sequences), rows, columns), int)
    for m, s in zip(*np.nonzero(sequences >= 0), strict=True):
        length = lengths[sequences[m, s]]
        assert start[m, s] + length <= columns
        taken[m, row[m, s], start[m, s] : start[m, s] + length] += 1
    assert taken.max() == 1 and taken.sum() == sum(lengths)
    for m in range(len(sequences)):
        assert np.bincount(row[m][sequences[m] >= 0], minlength=1).max() <= MOST_IN_A_ROW


def test_a_plan_by_hand():
    """5, 4, 3, 2, 1 into rows of 7: 5 + 2, 4 + 3, 1; a row a microbatch."""
    made = plan(np.array([2, 3, 4, 5, 1]), Budget(1, 7))
    assert int(made.count) == 3
    rows = [
        {int(s): int(c) for s, c in zip(made.sequences[m], made.start[m], strict=True) if s >= 0}
        for m in range(3)
    ]
    assert rows == [{3: 0, 0: 5}, {2: 0, 1: 4}, {4: 0}]


def test_a_budget_below_one_row():
    with pytest.raises(ValueError, match="holds no 2 rows of the longest .* set at least 200"):
        Budget.of(199, 100, shards=2)
    assert Budget.of(450, 100, shards=2) == Budget(4, 100)
    assert Budget.of(450, 97, shards=2, across=8) == Budget(4, 104)  # whole columns a device


@pytest.fixture(scope="module")
def small(tiny):
    """One layer, whose window is shorter than a row and a sequence."""
    model, params = tiny
    one = Model(dataclasses.replace(model.config, layers=1, window=4))
    return one, params | {"blocks": jax.tree.map(lambda leaf: leaf[:1], params["blocks"])}


def moved(state, batch, update):
    after, metrics = update(state, batch)
    return after.params, reduce_metrics(metrics)


@pytest.mark.parametrize(
    "objective",
    [
        dppo_binary_tv(),
        gspo(aggregate=seq_mean_token_mean),
        kl_cov(0.15),
        with_entropy_bonus(rebel(8.0, aggregate=token_mean), 0.1),
    ],
    ids=["tokens", "sequences", "whole batch", "prompts"],
)
def test_a_packed_step_is_the_padded_one(small, objective):
    """Parameters after a step of plain gradient descent, losses and metrics, in float32.

    Rows of 7 cells, three to a microbatch: the 8 sequences of 1 to 5 tokens need two microbatches.
    KL-Cov's means and largest three tokens are the whole minibatch's, in padded parts of it too.
    REBEL's prompts of two samples have them in different rows, and weigh them by their lengths.
    """
    model, params = small
    batch, optimizer = made_batch(), optax.sgd(1.0)
    results = []
    ways = [{}, {"tokens_per_microbatch": 21}, {"microbatches": 4}]
    for options in ways[: 2 if objective.statistics is None else 3]:
        update = make_update(model, objective, optimizer, temperature=0.8, **options)
        state = init_state(jax.tree.map(jnp.copy, params), optimizer)
        results.append(moved(state, batch, update))
    (plain, numbers), (packed, of_packed), *split = results
    for each in (packed, *(params for params, _ in split)):
        assert_close(each, plain, 1e-5)
    assert set(numbers) == set(of_packed)
    for name, value in numbers.items():
        if name != "update/padding_fraction":
            np.testing.assert_allclose(of_packed[name], value, rtol=2e-4, atol=1e-5, err_msg=name)

    # Prompts of 3, 1, 2, 3 and responses of 5 1 | 3 4 | 2 5 | 1 3, whose last tokens are not fed.
    tokens_once = 9 + (4 + 0 + 2 + 3 + 1 + 4 + 0 + 2)
    assert numbers["update/padding_fraction"] == pytest.approx(1 - tokens_once / (4 * (3 + 2 * 4)))
    tokens = 2 * 9 + 16
    assert of_packed["update/padding_fraction"] == pytest.approx(1 - tokens / (2 * 21))


@pytest.mark.parametrize("kind", [ValueModel, ValueHead])
def test_a_packed_critic_is_the_padded_one(small, kind):
    """The values that a batch keeps, and both sides' parameters after a step that moves them."""
    model, params = small
    batch, options = batch_with_values(), dict(temperature=0.8)
    more = {"shared_gradient": True} if kind is ValueHead else {}
    critic = kind(optax.sgd(0.5), **more).build(model.config)
    fresh = critic.init(jax.random.key(0), params)
    weight = jax.random.normal(jax.random.key(1), fresh["head"]["weight"].shape)
    valued = fresh | {"head": fresh["head"] | {"weight": weight}}
    objective, found = with_value_loss(dppo_binary_tv(), clip=0.2), []
    for cells in ({}, {"tokens_per_microbatch": 21}):
        state = init_state(jax.tree.map(jnp.copy, params), optax.sgd(0.5))
        values = init_state(jax.tree.map(jnp.copy, valued), critic.optimizer)
        state = dataclasses.replace(state, critic=values)
        batch_of = make_batch_of(model, objective, gae, critic=critic, **options, **cells)
        rewards = jnp.linspace(-1.0, 1.0, 8).reshape(4, 2)
        made, _ = batch_of(state, None, batch.rollout, rewards)
        update = make_update(model, objective, optax.sgd(0.5), critic, **options, **cells)
        after, metrics = update(state, made)
        real = batch.rollout.response_mask
        kept = [jnp.where(real, leaf, 0.0) for leaf in (made.values_old, made.advantages)]
        found.append((kept, after.params, after.critic.params))
        assert reduce_metrics(metrics)["critic/gradient_norm"] > 0.1
    assert_close(found[1], found[0], 1e-5)


def test_other_lengths_compile_nothing(small):
    model, params = small
    update = make_update(
        model, dppo_binary_tv(), optax.sgd(0.1), temperature=1.0, tokens_per_microbatch=14
    )
    state = init_state(jax.tree.map(jnp.copy, params), optax.sgd(0.1))
    batch = made_batch()
    state, first = update(state, batch)
    rollout = dataclasses.replace(
        batch.rollout, response_mask=batch.rollout.response_mask.at[:, 2:].set(False)
    )
    counter = CompilationCounter()
    _, second = update(state, Batch(rollout, batch.advantages))
    assert counter.total == 0
    counts = [reduce_metrics(m)["update/padding_fraction"] for m in (first, second)]
    assert counts[0] != counts[1]


def test_scores_of_packed_sequences(small):
    """Every statistic, at the temperature, of each sequence in its own place."""
    model, params = small
    rollout = made_batch().rollout
    budget = packing.budget_of(14, rollout)
    whole = jax.jit(lambda p, r: score(model, p, r, temperature=0.7))(params, rollout)
    packed = jax.jit(lambda p, r, of: score_packed(model, p, r, of, budget, temperature=0.7))(
        params, rollout, packing.plan_of(rollout, budget)
    )
    real = np.asarray(rollout.response_mask)
    for name in ("logp", "topk_logp", "entropy", "uniform_logp"):
        ours, theirs = (np.asarray(getattr(stats, name))[real] for stats in (packed, whole))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_places_without_a_sequence_replay_nothing():
    """So that no choice of another sequence is counted there."""
    rollout = made_batch().rollout
    prompts, answers = rollout.prompt_mask.shape, rollout.response_mask.shape
    rollout = dataclasses.replace(
        rollout,
        prompt_experts=jnp.zeros((*prompts, 1, 2), jnp.int8),
        experts=jnp.zeros((*answers, 1, 2), jnp.int8),
    )
    budget = packing.budget_of(21, rollout)
    of = packing.plan_of(rollout, budget)
    taken = packing.take(rollout, of, 0, budget)
    inside = np.asarray(of.sequences[0] >= 0)
    assert not inside.all()
    for recorded in (taken.prompt_experts, taken.experts):
        assert (np.asarray(recorded) == np.where(inside, 0, -1)[:, None, None, None]).all()


def test_what_packing_does_not_go_with(small):
    model, _ = small

    def made(objective, **options):
        return make_update(
            model, objective, optax.sgd(1.0), temperature=1.0, tokens_per_microbatch=14, **options
        )

    with pytest.raises(ValueError, match="microbatches=2: the tokens decide"):
        made(dppo_binary_tv(), microbatches=2)
    critic = ValueModel(optax.sgd(0.5)).build(model.config)
    with pytest.raises(ValueError, match=r"compares them by more than log-prob.* \(a critic\)"):
        made(rebel(), critic=critic)
