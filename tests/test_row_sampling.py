"""Rows drawn each in its own way: how often each token comes, and on what that depends."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sampler_head import kept64

from dppo_jax.kernels import streamed_sampler
from dppo_jax.kernels.drawing import draw, numbers
from dppo_jax.kernels.filters import Filters
from dppo_jax.kernels.rows import draw_rows, row_keys
from dppo_jax.kernels.sampler import sample, sample_rows
from dppo_jax.sampling.requests import SamplingParams
from dppo_jax.sampling.rows import row_of, stacked

VOCABULARY, DRAWS, ROOM = 23, 6_000, 3
HISTORY = [4, 4, 9, 17, -1, VOCABULARY]
REQUESTS = {
    "whole": SamplingParams(1),
    "cold": SamplingParams(1, temperature=0.5),
    "top_k": SamplingParams(1, top_k=6),
    "top_p": SamplingParams(1, top_p=0.8, temperature=0.9),
    "min_p": SamplingParams(1, min_p=0.1),
    "three": SamplingParams(1, top_k=9, top_p=0.9, min_p=0.05),
    "penalty": SamplingParams(1, repetition_penalty=2.5),
    "bias": SamplingParams(1, logit_bias=((3, 2.0), (7, -100.0), (3, 0.5))),
    "everything": SamplingParams(
        1,
        temperature=1.3,
        top_k=12,
        top_p=0.95,
        min_p=0.02,
        repetition_penalty=1.5,
        logit_bias=((9, 1.0),),
    ),
    "greedy": SamplingParams(1, temperature=0.0, repetition_penalty=3.0),
}


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(1).normal(size=VOCABULARY).astype(np.float32) * 1.5


def distribution64(logits, params):
    """(kept set, probabilities) of a request by the definitions, in float64."""
    z = logits.astype(np.float64)
    for token, bias in params.logit_bias:
        z[token] += bias
    for token in {t for t in HISTORY if 0 <= t < VOCABULARY}:
        penalty = params.repetition_penalty
        z[token] = z[token] / penalty if z[token] > 0 else z[token] * penalty
    z /= params.temperature or 1.0
    kept, slack = kept64(z, Filters(params.top_k, params.top_p, params.min_p))
    assert slack > 1e-3, "the case is too close to call"
    p = np.where(kept, np.exp(z - z.max()), 0.0)
    return kept, p / p.sum()


def batch_of(params, size):
    return jax.tree.map(
        lambda leaf: jnp.repeat(leaf[None], size, axis=0), row_of(params, 0, biases=ROOM)
    )


@pytest.fixture(scope="module")
def drawn(logits):
    """Every request's DRAWS tokens in one batch: draw i stands for position i of its response."""
    rows = jax.tree.map(
        lambda *leaves: jnp.concatenate(leaves), *(batch_of(r, DRAWS) for r in REQUESTS.values())
    )
    count = DRAWS * len(REQUESTS)
    history = jnp.broadcast_to(jnp.array(HISTORY), (count, len(HISTORY)))
    out = jax.jit(draw_rows, static_argnames=("top_k_capture", "raw_logp"))(
        jnp.broadcast_to(logits, (count, VOCABULARY)),
        rows,
        jnp.tile(jnp.arange(DRAWS), len(REQUESTS)),
        history,
        top_k_capture=4,
        raw_logp=True,
    )
    parts = jax.tree.map(lambda leaf: np.split(np.asarray(leaf), len(REQUESTS)), out)
    return {
        name: jax.tree.map(lambda part, i=i: part[i], parts, is_leaf=lambda x: isinstance(x, list))
        for i, name in enumerate(REQUESTS)
    }


@pytest.mark.parametrize("name", REQUESTS)
def test_frequencies_are_those_of_the_recorded_distribution(name, logits, drawn):
    params, out = REQUESTS[name], drawn[name]
    kept, p = distribution64(logits, params)
    if not params.temperature:
        assert (out.token == np.argmax(p)).all()
    else:
        counts = np.bincount(out.token, minlength=VOCABULARY)
        assert (counts[~kept] == 0).all()
        usual = p * DRAWS >= 5
        observed = np.append(counts[usual], counts[~usual].sum())
        expected = np.append(p[usual], p[~usual].sum()) * DRAWS
        observed, expected = observed[expected > 0], expected[expected > 0]
        chi2 = ((observed - expected) ** 2 / expected).sum()
        freedom = len(expected) - 1
        assert chi2 < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations
    np.testing.assert_allclose(np.exp(out.logp), p[out.token], rtol=3e-5)
    best = np.argsort(-p, kind="stable")[:4]
    np.testing.assert_array_equal(out.topk_ids[0], best)
    np.testing.assert_allclose(np.exp(out.topk_logp[0]), p[best], rtol=3e-5)
    entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
    np.testing.assert_allclose(out.entropy, entropy, rtol=3e-5)


@pytest.mark.parametrize("name", REQUESTS)
def test_the_raw_log_probability_is_the_policys_own(name, logits, drawn):
    """No bias, penalty or filter, at the sampling temperature: what the scorer scores."""
    z = logits.astype(np.float64) / (REQUESTS[name].temperature or 1.0)
    logp = z - np.log(np.exp(z).sum())
    np.testing.assert_allclose(drawn[name].raw_logp, logp[drawn[name].token], atol=1e-5)


def test_rows_alike_are_drawn_as_by_the_scalar_form():
    hidden = jax.random.normal(jax.random.key(0), (50, 8))
    matrix = jax.random.normal(jax.random.key(1), (VOCABULARY, 8))
    position = jnp.arange(50)

    @functools.partial(jax.jit, static_argnames="params")
    def run(rows, params):
        filters = Filters(params.top_k, params.top_p, params.min_p)
        logits = 3.0 * jnp.tanh(hidden @ matrix.T / 3.0)
        at = numbers(row_keys(rows, position), len(logits))
        shared_key = sample(
            hidden, matrix, jax.random.key(0), temperature=params.temperature, top_k_capture=4,
            filters=filters, soft_cap=3.0,
        )  # fmt: skip
        return (
            sample_rows(hidden, matrix, rows, position, None, top_k_capture=4, soft_cap=3.0),
            draw(logits, at, params.temperature, 4, filters),
            shared_key,
        )

    for params in (SamplingParams(1, temperature=0.7), REQUESTS["three"]):
        ours, want, shared_key = run(batch_of(params, 50), params)
        np.testing.assert_array_equal(ours.token, want.token)
        for name in ("topk_ids", "topk_logp", "entropy"):
            for other in (want, shared_key):
                np.testing.assert_allclose(getattr(ours, name), getattr(other, name), rtol=1e-5)
        assert ours.raw_logp is None


def test_same_seed_same_tokens_whatever_the_batch():
    """A request's sample among plain rows, among filtered ones, and at another place."""
    logits = jax.random.normal(jax.random.key(0), (8, VOCABULARY)) * 2
    position = jnp.array([0, 1, 2, 3, 0, 1, 2, 3])
    history = jnp.broadcast_to(jnp.array(HISTORY), (8, len(HISTORY)))

    compiled = jax.jit(draw_rows, static_argnums=4)

    def run(requests, order):
        rows = stacked([row_of(*r, biases=ROOM) for r in requests])
        rows, z, at = jax.tree.map(lambda leaf: leaf[order], (rows, logits, position))
        out = compiled(z, jax.tree.map(jnp.asarray, rows), at, history, 4)
        return jax.tree.map(lambda leaf: leaf[np.argsort(order)], out)

    mine = [(SamplingParams(9, seed=5), 0), (SamplingParams(9, seed=5), 1)] * 2
    plain = [(SamplingParams(9, seed=s), 0) for s in range(4)]
    mixed = [(dataclasses.replace(REQUESTS["everything"], seed=s), 2) for s in range(4)]
    alone = run(mine + plain, np.arange(8))
    for requests, order in (
        (mine + mixed, np.arange(8)),
        (mine + mixed, np.array([5, 3, 0, 7, 6, 2, 1, 4])),
    ):
        other = run(requests, order)
        np.testing.assert_array_equal(other.token[:4], alone.token[:4])
        np.testing.assert_allclose(other.logp[:4], alone.logp[:4], rtol=1e-5)


def test_streamed_rows_record_what_plain_ones_do(monkeypatch):
    """Each kind of request in one batch, and none of them moved by the others."""
    monkeypatch.setattr(streamed_sampler, "BINS", 4)
    logits = jax.random.normal(jax.random.key(0), (len(REQUESTS), VOCABULARY)) * 2
    matrix, position = jnp.eye(VOCABULARY), jnp.arange(len(REQUESTS))
    history = jnp.broadcast_to(jnp.array(HISTORY), (len(REQUESTS), len(HISTORY)))
    rows = stacked([row_of(r, 1, biases=ROOM) for r in REQUESTS.values()])

    @functools.partial(jax.jit, static_argnames=("form", "replay"))
    def run(rows, form, replay):
        return sample_rows(
            logits, matrix, rows, position, history, top_k_capture=4, raw_logp=True,
            form=form, replay=replay,
        )  # fmt: skip

    for replay in (False, True):
        ours, want = (run(rows, form, replay) for form in ("streamed", "plain"))
        there = np.isfinite(want.topk_logp)
        np.testing.assert_array_equal(ours.topk_ids[there], want.topk_ids[there])
        np.testing.assert_allclose(ours.topk_logp[there], want.topk_logp[there], rtol=1e-4)
        np.testing.assert_array_equal(np.isfinite(ours.topk_logp), there)
        np.testing.assert_allclose(ours.entropy, want.entropy, rtol=1e-4, atol=1e-6)
        divisor = np.where(rows.temperature == 0, 1, rows.temperature)[:, None]
        raw = jax.nn.log_softmax(logits / divisor)
        np.testing.assert_allclose(ours.raw_logp, raw[position, ours.token], rtol=1e-4)
        assert ours.token[-1] == want.token[-1]  # greedy
        if replay:
            np.testing.assert_array_equal(ours.kept_count, want.kept_count)
        # without those that are drawn plainly, the others draw what they did
        alone = jax.tree.map(np.array, rows)
        alone.repetition_penalty[:] = 1
        alone.bias[:] = 0
        other = run(alone, "streamed", replay)
        names = list(REQUESTS)
        for name in ("whole", "cold", "top_k", "top_p", "min_p", "three"):
            assert ours.token[names.index(name)] == other.token[names.index(name)], name


def test_keys_depend_on_seed_sample_and_position_alone():
    keys = [
        (SamplingParams(1, seed=seed), sample, position)
        for seed in (0, 1, -1, 2**32, 2**40 + 1)
        for sample in (0, 1)
        for position in (0, 1)
    ]
    rows = jax.tree.map(jnp.asarray, stacked([row_of(p, sample) for p, sample, _ in keys]))
    data = jax.random.key_data(row_keys(rows, jnp.array([at for *_, at in keys])))
    assert len(np.unique(data, axis=0)) == len(keys)
    of_one = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 1), 0)
    np.testing.assert_array_equal(data[6], jax.random.key_data(of_one))


def test_plain_rows_pay_for_no_filter():
    """One branch for them, without the loops of the bisection and without scatters."""
    program = jax.make_jaxpr(lambda *args: draw_rows(*args, 4))(
        jnp.ones((2, VOCABULARY)),
        batch_of(REQUESTS["everything"], 2),
        jnp.arange(2),
        jnp.zeros((2, 5), jnp.int32),
    )
    (choice,) = (e for e in program.eqns if e.primitive.name == "cond")
    full, plain = (str(branch) for branch in choice.params["branches"])
    for costly in ("scan[", "scatter"):
        assert costly in full and costly not in plain, costly


def test_more_bias_than_there_is_room_for_is_refused():
    with pytest.raises(ValueError, match="names 3 tokens, and there is room for 2"):
        row_of(REQUESTS["bias"], 0, biases=2)
