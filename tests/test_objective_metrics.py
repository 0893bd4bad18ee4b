"""Metrics of the masked tokens: by hand, against numpy, and by token id through an update."""

import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dppo_jax import objectives
from dppo_jax.masked_tokens import as_text, most_masked
from dppo_jax.metrics import reduce_metrics
from dppo_jax.objectives.metrics import MASKED_TOKENS
from dppo_jax.prompts.tokenizers import train_sentencepiece
from dppo_jax.records import Batch, Counts, fold_metrics
from dppo_jax.sampling.generate import SamplingConfig, generate
from dppo_jax.update import init_state, make_update

sys.path.append(str(Path(__file__).parent / "contracts"))
from objective_batches import from_probabilities, make_batch  # noqa: E402


def numbers(objective, stats, batch):
    return reduce_metrics(objective.loss(stats, batch).metrics)


def test_by_hand():
    """DPPO-Binary-TV 0.15 on OBJECTIVES' table: 3 of 4 tokens with A > 0 kept, 1 of 2 with A < 0.

    A    mu   pi   |pi - mu|   dropped
    +1   .5   .7   .2          yes        r = 1.4
    +1   .5   .6   .1
    +1   .9   .6   .3          no: moves back
    +1   .01  .02  .01
    -2   .8   .4   .4          yes        r = .5
    -2   .2   .1   .1
    0    .3   .9   .6          no: A = 0
    """
    mu = [0.5, 0.5, 0.9, 0.01, 0.8, 0.2, 0.3]
    pi = [0.7, 0.6, 0.6, 0.02, 0.4, 0.1, 0.9]
    stats, batch = from_probabilities(mu, pi, [1, 1, 1, 1, -2, -2, 0])
    stats = replace(stats, entropy=jnp.asarray([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]]))
    found = numbers(objectives.dppo_binary_tv(), stats, batch)
    expected = {
        "mask/fraction": 2 / 6, "mask/fraction_positive": 1 / 4, "mask/fraction_negative": 1 / 2,
        "mask/prob_positive": 0.7, "mask/prob_negative": 0.4,
        "mask/prob_rollout_positive": 0.5, "mask/prob_rollout_negative": 0.8,
        "mask/logp_positive": np.log(0.7), "mask/logp_rollout_negative": np.log(0.8),
        "mask/ratio_positive": 1.4, "mask/ratio_negative": 0.5,
        "mask/entropy_positive": 0.1, "mask/entropy_negative": 0.5,
        "mask/divergence_positive": 0.2, "mask/divergence_negative": 0.4,
        "prob_diff/mean": 1.71 / 7, "prob_diff/max": 0.6,
        "divergence/mean": 1.71 / 7, "divergence/max": 0.6,
        "divergence/below_0.01": 0, "divergence/below_0.05": 1 / 7,
        "ratio/max": 3.0, "advantage/max": 2.0,
        # A (r - 1): .4 + .2 - 1/3 + 1, and -2 (-.5) twice; ½|r - 1| alike, with 2 for the last
        "bound/surrogate": 0.4 + 0.2 - 1 / 3 + 1 + 1 + 1,
        "bound/tv_sum": (0.4 + 0.2 + 1 / 3 + 1 + 0.5 + 0.5 + 2) / 2,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-5, abs=1e-7)
    assert not any(name.startswith("topk/") for name in found)


def test_nothing_masked_has_no_mean():
    found = numbers(objectives.pg_is(), *from_probabilities([0.5], [0.7], [1]))
    assert found["mask/fraction"] == 0 and np.isnan(found["mask/prob_positive"])


def test_topk_coverage_and_counts_against_numpy():
    """Also what stands in the padding, ids included, is counted nowhere."""
    stats, batch = make_batch(seed=5, vocab=12)
    batch = replace(batch, vocab_size=12)
    mask = np.asarray(batch.rollout.response_mask)
    metrics = objectives.dppo_topk_tv(delta=0.05).loss(stats, batch).metrics
    counts = metrics.pop(MASKED_TOKENS).value
    found = reduce_metrics(metrics)
    tokens, ids = np.asarray(batch.rollout.response_tokens), np.asarray(batch.rollout.topk_ids)
    inside = (ids == tokens[..., None]).any(-1)
    assert found["topk/sampled_inside"] == pytest.approx(inside[mask].mean())
    for name, logp in (("topk/mass", stats.topk_logp),
                       ("topk/mass_rollout", batch.rollout.topk_logp_rollout)):  # fmt: skip
        assert found[name] == pytest.approx(np.exp(np.asarray(logp)).sum(-1)[mask].mean(), rel=1e-5)
    advantages = np.asarray(batch.advantages)
    raised, lowered, seen = np.asarray(counts)
    np.testing.assert_array_equal(seen, np.bincount(tokens[mask], minlength=12))
    for masked, sign in ((raised, "positive"), (lowered, "negative")):
        wanted = mask & (advantages > 0 if sign == "positive" else advantages < 0)
        assert masked.sum() == pytest.approx(found[f"mask/fraction_{sign}"] * wanted.sum())
        assert masked.sum() > 0 and (masked <= seen).all()


def test_counts_add_over_microbatches():
    one, two = Counts(jnp.eye(3, 4, dtype=int)), Counts(jnp.ones((3, 4), int))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), {"a": one}, {"a": two})
    np.testing.assert_array_equal(fold_metrics(stacked)["a"].value, np.eye(3, 4) + 1)


@pytest.mark.parametrize("microbatches", [1, 3])
def test_an_update_counts_its_tokens(tiny, prompts, microbatches):
    model, params = tiny
    settings = SamplingConfig(max_new_tokens=4, samples_per_prompt=2, top_k_capture=4)
    rollout = generate(model, params, prompts, jax.random.key(0), settings=settings)
    advantages = jnp.broadcast_to(jnp.array([[1.0], [-1.0]] * 3), rollout.response_mask.shape)
    # the rollout's own probabilities lowered: every token has moved away, and those with A > 0 more
    rollout = replace(rollout, logp_rollout=rollout.logp_rollout - 5.0)
    optimizer = optax.sgd(0.0)
    update = make_update(
        model, objectives.grpo(), optimizer, temperature=1.0, microbatches=microbatches
    )
    state = init_state(jax.tree.map(jnp.array, params), optimizer)
    state = replace(state, token_counts=jnp.zeros((3, 37), jnp.int32))
    for _ in range(2):
        state, metrics = update(state, Batch(rollout, advantages))
    assert MASKED_TOKENS not in metrics
    raised, lowered, seen = np.asarray(state.token_counts)
    tokens, mask = np.asarray(rollout.response_tokens), np.asarray(rollout.response_mask)
    up = mask & (np.asarray(advantages) > 0)
    np.testing.assert_array_equal(seen, 2 * np.bincount(tokens[mask], minlength=37))
    np.testing.assert_array_equal(raised, 2 * np.bincount(tokens[up], minlength=37))
    assert not lowered.any()


def test_the_table_of_most_masked_tokens(tmp_path):
    tokenizer = train_sentencepiece(["ab=7"], tmp_path / "t.model")
    a, seven = tokenizer.encode("a")[0], tokenizer.encode("7")[0]
    counts = np.zeros((3, tokenizer.vocab_size + 2), np.int32)
    counts[:, a], counts[:, seven], counts[:, -1] = (1, 2, 6), (4, 0, 4), (0, 1, 9)
    counts[2, 0] = 5  # seen, never masked
    first, second, third = most_masked(counts, tokenizer)
    assert first == (seven, "7", 4, 4, 0, 4, 1.0)
    assert second == (a, "a", 3, 1, 2, 6, 0.5)
    assert (third.id, third.text, third.masked) == (tokenizer.vocab_size + 1, "", 1)
    assert as_text([first, second]) == (
        "  masked    A > 0    A < 0   of all  token\n"
        "       4        4        0  100.00%  '7'\n"
        "       3        1        2   50.00%  'a'\n"
    )
