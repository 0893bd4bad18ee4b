"""The sampler against the plain form: a whole forward pass for every token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax.models.decoder import full_forward
from dppo_jax.records import FINISH_LENGTH, FINISH_STOP, Prompts
from dppo_jax.sampling import generate as generate_module
from dppo_jax.sampling.generate import SamplingConfig, generate
from dppo_jax.scoring import mismatch, score

SETTINGS = SamplingConfig(max_new_tokens=9, samples_per_prompt=4, top_k_capture=5, end_ids=(3, 11))


@functools.partial(jax.jit, static_argnums=0)
def _plain(model, params, ids):
    decoder = model.bind(params)
    hidden, _ = full_forward(decoder, ids, jnp.ones_like(ids, bool))
    return hidden[0] @ decoder.unembedding_matrix().T


def plain_logits(model, params, tokens):
    """Logits [S, V] after each of a list of tokens, without padding, cache or batch."""
    return _plain(model, params, np.asarray(tokens, np.int32)[None])


def real_tokens(rollout, row):
    of = row * len(rollout.prompt_tokens) // len(rollout.response_tokens)
    prompt = np.asarray(rollout.prompt_tokens[of])[np.asarray(rollout.prompt_mask[of])]
    response = np.asarray(rollout.response_tokens[row])[np.asarray(rollout.response_mask[row])]
    return list(prompt), list(response)


@pytest.fixture(scope="module")
def rollout(tiny, prompts):
    return generate(*tiny, prompts, jax.random.key(2), settings=SETTINGS)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_records_the_distribution_it_sampled_from(tiny, prompts, temperature):
    settings = dataclasses.replace(SETTINGS, temperature=temperature)
    rollout = generate(*tiny, prompts, jax.random.key(2), settings=settings)
    for row in range(0, 12, 5):
        prompt, response = real_tokens(rollout, row)
        logits = plain_logits(*tiny, prompt + response) / temperature
        for t, token in enumerate(response):
            logp = np.asarray(jax.nn.log_softmax(logits[len(prompt) + t - 1]))
            np.testing.assert_allclose(rollout.logp_rollout[row, t], logp[token], atol=5e-5)
            np.testing.assert_allclose(
                rollout.entropy_rollout[row, t], -(np.exp(logp) * logp).sum(), atol=5e-5
            )
            best = np.argsort(-logp)[:5]
            np.testing.assert_array_equal(rollout.topk_ids[row, t], best)
            np.testing.assert_allclose(rollout.topk_logp_rollout[row, t], logp[best], atol=5e-5)


def test_greedy_takes_the_most_likely_token(tiny, prompts):
    settings = dataclasses.replace(SETTINGS, temperature=0.0, samples_per_prompt=1)
    rollout = generate(*tiny, prompts, jax.random.key(0), settings=settings)
    for row in range(3):
        prompt, response = real_tokens(rollout, row)
        best = np.argmax(plain_logits(*tiny, prompt + response), axis=-1)
        np.testing.assert_array_equal(response, best[len(prompt) - 1 : -1])


def test_filters_are_part_of_the_recorded_distribution(tiny, prompts):
    """At temperature 0.7, the three most likely tokens: sampled, renormalised, and nothing else."""
    settings = dataclasses.replace(SETTINGS, temperature=0.7, top_k=3, top_p=0.95)
    rollout = generate(*tiny, prompts, jax.random.key(2), settings=settings)
    for row in range(0, 12, 5):
        prompt, response = real_tokens(rollout, row)
        logits = np.asarray(plain_logits(*tiny, prompt + response)) / 0.7
        for t, token in enumerate(response):
            best = np.sort(logits[len(prompt) + t - 1])[::-1][:3]
            p = np.exp(best) / np.exp(best).sum()
            p = p[np.cumsum(p) - p < 0.95]
            p /= p.sum()
            recorded = np.exp(np.asarray(rollout.topk_logp_rollout[row, t]))
            np.testing.assert_allclose(recorded[: len(p)], p, atol=5e-5)
            assert (recorded[len(p) :] == 0).all()
            kept = rollout.topk_ids[row, t, : len(p)]
            assert token in kept
            at = int(np.argmax(np.asarray(kept) == token))
            np.testing.assert_allclose(np.exp(rollout.logp_rollout[row, t]), p[at], atol=5e-5)


def test_the_end_token_is_part_of_the_response(rollout):
    mask, tokens = np.asarray(rollout.response_mask), np.asarray(rollout.response_tokens)
    stopped = np.asarray(rollout.finish_reason) == FINISH_STOP
    assert stopped.any() and not stopped.all(), "the draw should hold both kinds"
    for row in range(len(mask)):
        length = mask[row].sum()
        assert mask[row, :length].all() and not mask[row, length:].any()
        assert np.isin(tokens[row, :length][:-1], SETTINGS.end_ids).sum() == 0
        if stopped[row]:
            assert tokens[row, length - 1] in SETTINGS.end_ids
            assert rollout.logp_rollout[row, length - 1] < 0
        else:
            assert length == SETTINGS.max_new_tokens
            assert rollout.finish_reason[row] == FINISH_LENGTH


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_scorer_agrees_with_the_sampler(tiny, prompts, temperature):
    settings = dataclasses.replace(SETTINGS, temperature=temperature)
    rollout = generate(*tiny, prompts, jax.random.key(5), settings=settings)
    stats = score(*tiny, rollout, temperature=temperature)
    mask = np.asarray(rollout.response_mask)
    for ours, theirs in (
        (stats.logp, rollout.logp_rollout),
        (stats.entropy, rollout.entropy_rollout),
        (stats.topk_logp, rollout.topk_logp_rollout),
    ):
        np.testing.assert_allclose(
            np.asarray(ours)[mask], np.asarray(theirs)[mask], atol=1e-4, rtol=0
        )
    numbers = mismatch(stats, rollout)
    assert float(numbers["mismatch/logp_abs_max"].value) < 1e-4
    ratio = numbers["mismatch/ratio_mean"]
    assert float(ratio.count) == mask.sum()
    assert abs(float(ratio.sum) / mask.sum() - 1) < 1e-4


def test_mismatch_by_hand(tiny, rollout):
    """One token off by log 2: |Δ| = log 2 once, ratio 2 once, multiplicative error 2 once."""
    stats = score(*tiny, rollout, temperature=1.0)
    exact = dataclasses.replace(
        stats, logp=rollout.logp_rollout.at[0, 0].add(jnp.log(2.0)).at[:, -1].add(0.0)
    )
    count = float(rollout.response_mask.sum())
    numbers = mismatch(exact, rollout)
    assert float(numbers["mismatch/logp_abs_mean"].sum) == pytest.approx(np.log(2))
    assert float(numbers["mismatch/ratio_mean"].sum) == pytest.approx(count + 1)
    assert float(numbers["mismatch/multiplicative_error"].sum) == pytest.approx(count + 1)
    p = float(jnp.exp(rollout.logp_rollout[0, 0]))
    assert float(numbers["mismatch/prob_abs_max"].value) == pytest.approx(p, rel=1e-5)


def test_sampling_the_pad_id_loses_nothing(tiny):
    """Masks are the sampler's: id 0 in a response, which fills columns elsewhere, is a token."""
    model, params = tiny
    one = Prompts(jnp.array([[5, 9]]), jnp.ones((1, 2), bool))
    settings = SamplingConfig(
        max_new_tokens=200, samples_per_prompt=4, top_k_capture=5, end_ids=(3,), temperature=1.5
    )
    rollout = generate(model, params, one, jax.random.key(0), settings=settings)
    mask, tokens = np.asarray(rollout.response_mask), np.asarray(rollout.response_tokens)
    inside = (tokens == 0) & mask
    assert inside.any(), "the draw should hold the id"
    stats = score(model, params, rollout, temperature=1.5)
    after = np.cumsum(inside, axis=1).astype(bool) & mask
    np.testing.assert_allclose(
        np.asarray(stats.logp)[after], np.asarray(rollout.logp_rollout)[after], atol=1e-4, rtol=0
    )


def test_padding_is_never_attended(tiny, prompts):
    """Other ids in the padding, and more of it, change nothing."""
    model, params = tiny
    other = Prompts(jnp.where(prompts.mask, prompts.tokens, 29), prompts.mask)
    wider = Prompts(
        jnp.pad(prompts.tokens, ((0, 0), (4, 0)), constant_values=1),
        jnp.pad(prompts.mask, ((0, 0), (4, 0))),
    )
    results = [
        generate(model, params, p, jax.random.key(2), settings=SETTINGS)
        for p in (prompts, other, wider)
    ]
    for result in results[1:]:
        np.testing.assert_array_equal(result.response_tokens, results[0].response_tokens)
        np.testing.assert_allclose(result.logp_rollout, results[0].logp_rollout, atol=5e-5)


def test_growing_the_cache_changes_nothing(tiny, prompts, monkeypatch):
    settings = SamplingConfig(max_new_tokens=9, samples_per_prompt=2, top_k_capture=4)
    once = generate(*tiny, prompts, jax.random.key(2), settings=settings)
    monkeypatch.setattr(generate_module, "SMALLEST_STAGE", 2)
    assert generate_module.stages(9) == [3, 6, 9]
    # A fresh function object: jit would return the program of the one stage.
    staged = jax.jit(generate.__wrapped__, static_argnames=("model", "settings"))(
        *tiny, prompts, jax.random.key(2), settings=settings
    )
    np.testing.assert_array_equal(once.response_tokens, staged.response_tokens)
    np.testing.assert_allclose(once.logp_rollout, staged.logp_rollout, atol=5e-5)


def test_stops_when_every_sequence_has_ended(tiny, prompts):
    everything = tuple(range(37))
    settings = dataclasses.replace(SETTINGS, end_ids=everything)
    rollout = generate(*tiny, prompts, jax.random.key(2), settings=settings)
    np.testing.assert_array_equal(np.asarray(rollout.response_mask).sum(axis=1), 1)
    assert (np.asarray(rollout.finish_reason) == FINISH_STOP).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(max_new_tokens=0), "at least 1"),
        (dict(temperature=-1.0), "negative"),
        (dict(top_k=-1), "top_k=-1 must not be negative"),
        (dict(top_p=0.0), "top_p=0.0 must be above 0"),
        (dict(min_p=1.1), "min_p=1.1 must be within"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **change)


def test_settings_that_do_not_fit_the_model():
    with pytest.raises(ValueError, match="top_k_capture=5 is not within 1..4"):
        SETTINGS.check(vocab_size=4)
    with pytest.raises(ValueError, match="end id 11 is outside"):
        SETTINGS.check(vocab_size=8)
