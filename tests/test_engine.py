"""The rollout engine against a reference that computes the whole forward pass for every token."""

import dataclasses
import functools
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoder import STORIES

from dppo_jax.metrics import CompilationCounter
from dppo_jax.models.decoder import Model, full_forward
from dppo_jax.models.llama2c import read_llama2c
from dppo_jax.records import FINISH_LENGTH, FINISH_STOP
from dppo_jax.sampling import engine_inputs
from dppo_jax.sampling.engine import Engine, EngineConfig
from dppo_jax.sampling.engine_inputs import (
    Shape,
    SlotRows,
    empty_calls,
    prefill_calls,
    reads_of,
)
from dppo_jax.sampling.paged_cache import restored, rounded
from dppo_jax.sampling.pages import Pages
from dppo_jax.sampling.requests import SamplingParams
from dppo_jax.sampling.scheduler import Prefill, Prefilled
from dppo_jax.sampling.segments import (
    NOBODY,
    SegmentShape,
    find_own,
    find_shared,
    joined,
    most_of,
    own_pages,
    segment_counts,
    shared_shape,
)
from dppo_jax.sampling.sequences import Request, Sample

CONFIG = EngineConfig(
    slots=3,
    max_context=32,
    chunk=4,
    page_size=4,
    prefill_buckets=(32,),
    prefill_tokens=64,
    top_k_capture=5,
)
PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11], [1, 2, 3, 4]]
MIXED = [
    SamplingParams(max_new_tokens=13, n=2, seed=5),
    SamplingParams(max_new_tokens=9, temperature=0.0),
    SamplingParams(max_new_tokens=3, n=3, temperature=0.7, seed=2**40, stop_ids=(3, 22)),
    SamplingParams(max_new_tokens=15, n=1, seed=1),
]


@functools.partial(jax.jit, static_argnums=0)
def _plain(model, params, ids, length):
    decoder = model.bind(params)
    hidden, _ = full_forward(decoder, ids, jnp.arange(ids.shape[1])[None] < length)
    return decoder.logits(hidden)[0]


def plain_logits(model, params, tokens):
    """Logits after each token, without a cache."""
    padded = np.zeros((1, 32), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_plain(model, params, padded, len(tokens)))[: len(tokens)]


def check(tiny, prompt, sampling, completion, atol=1e-4):
    """A completion is what the reference says, token by token."""
    assert completion.error is None
    tokens, count = completion.tokens.tolist(), len(completion.tokens)
    logits = plain_logits(*tiny, [*prompt, *tokens])[len(prompt) - 1 : -1]
    logp = np.asarray(jax.nn.log_softmax(logits / (sampling.temperature or 1.0), axis=-1))
    np.testing.assert_allclose(completion.logp, logp[np.arange(count), tokens], atol=atol)
    np.testing.assert_allclose(completion.entropy, -(np.exp(logp) * logp).sum(1), atol=10 * atol)
    best = np.sort(logp, axis=1)[:, ::-1][:, : completion.topk_logp.shape[1]]
    np.testing.assert_allclose(completion.topk_logp, best, atol=atol)
    stored = np.take_along_axis(logp, completion.topk_ids, axis=1)
    np.testing.assert_allclose(stored, best, atol=atol)
    if sampling.temperature == 0:
        np.testing.assert_allclose(completion.logp, best[:, 0], atol=atol)
    assert 1 <= count <= sampling.max_new_tokens
    assert not set(tokens[:-1]) & set(sampling.stop_ids)
    stopped = tokens[-1] in sampling.stop_ids
    assert completion.finish_reason == (FINISH_STOP if stopped else FINISH_LENGTH)
    assert stopped or count == sampling.max_new_tokens


@pytest.fixture(scope="module")
def engine(tiny):
    engine = Engine(tiny[0], CONFIG)
    engine.warm_up(tiny[1])
    return engine


@pytest.fixture(scope="module")
def mixed(tiny, engine):
    return engine.generate(tiny[1], PROMPTS, MIXED)


def emptied(engine):
    """Everything has been given back."""
    assert engine.pending == 0
    for shard in engine._scheduler.shards:
        assert shard.pages.held == 0 and not shard.prefilled
        assert shard.free == len(shard.slots)
    return True


def test_samples_are_the_references(tiny, engine, mixed):
    """Prompts of several lengths, more samples than slots, one batch of unlike parameters."""
    for prompt, sampling, completions in zip(PROMPTS, MIXED, mixed, strict=True):
        assert len(completions) == sampling.n
        for completion in completions:
            check(tiny, prompt, sampling, completion)
            assert completion.timings.decode > 0
        assert completions[0].timings.prefill > 0
    assert [c.finish_name for c in mixed[2]].count("stop") > 0
    assert not np.array_equal(mixed[0][0].tokens, mixed[0][1].tokens)
    assert emptied(engine)


def test_the_batch_changes_no_token(tiny, engine, mixed):
    """Each request alone, and all in another order, draw what they drew together."""
    alone = [engine.generate(tiny[1], [p], s)[0] for p, s in zip(PROMPTS, MIXED, strict=True)]
    turned = engine.generate(tiny[1], PROMPTS[::-1], MIXED[::-1])[::-1]
    for other in (alone, turned):
        for ours, theirs in zip(mixed, other, strict=True):
            for one, two in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(one.tokens, two.tokens)
                np.testing.assert_allclose(one.logp, two.logp, atol=1e-5)


def test_nothing_compiles_after_the_warm_up(tiny, engine, mixed):
    counter, before = CompilationCounter(), engine.stats.compilations
    again = engine.generate(tiny[1], PROMPTS[1:], MIXED[1:])
    assert [len(c[0].tokens) for c in again] == [len(c[0].tokens) for c in mixed[1:]]
    assert counter.total == 0
    assert engine.stats.compilations == before > 0


DRAWS = 200
SHAPED = {
    "top_k": dict(top_k=6),
    "top_p": dict(top_p=0.9, temperature=0.8),
    "min_p": dict(min_p=0.05, temperature=1.5),
    "all of them": dict(top_k=12, top_p=0.95, min_p=0.02, temperature=1.2),
    "bias": dict(logit_bias=((3, 3.0), (11, 2.0)), temperature=1.5),
}


def expected(logits, given):
    """Hugging Face's order, by a sort: temperature, the k best, the nucleus, the least share."""
    z = logits.astype(np.float64)
    for token, bias in given.get("logit_bias", ()):
        z[token] += bias
    z /= given.get("temperature", 1.0)
    best = np.argsort(-z, kind="stable")[: given.get("top_k") or len(z)]
    p = np.exp(z[best] - z[best[0]])
    p /= p.sum()
    count = np.searchsorted(p.cumsum(), given.get("top_p", 1.0) - 1e-9) + 1
    best, p = best[:count], p[:count]
    kept = p >= given.get("min_p", 0.0) * p[0]
    found = np.zeros(len(z))
    found[best[kept]] = p[kept] / p[kept].sum()
    return found


def test_draws_have_the_distribution_that_was_asked_for(tiny, engine):
    """First tokens of many samples through slots that unlike requests share: chi-square."""
    asked = [
        SamplingParams(max_new_tokens=1, n=DRAWS, seed=i, **given)
        for i, given in enumerate(SHAPED.values())
    ]
    logits = plain_logits(*tiny, PROMPTS[0])[-1]
    drawn = engine.generate(tiny[1], [PROMPTS[0]] * len(asked), asked)
    for (name, given), samples in zip(SHAPED.items(), drawn, strict=True):
        p = expected(logits, given)
        tokens = np.array([sample.tokens[0] for sample in samples])
        counts = np.bincount(tokens, minlength=len(p))
        assert not counts[p == 0].any(), name
        logp = np.array([sample.logp[0] for sample in samples])
        np.testing.assert_allclose(logp, np.log(p[tokens]), atol=1e-4, err_msg=name)
        order = np.argsort(-p)
        common = order[DRAWS * p[order] >= 5]  # the others are one bin

        def bins(x, common=common):
            return np.array([*x[common], x.sum() - x[common].sum()])

        seen, wanted = bins(counts), bins(DRAWS * p)
        seen, wanted = (x[wanted > 1e-9] for x in (seen, wanted))
        chi2 = ((seen - wanted) ** 2 / wanted).sum()
        freedom = len(wanted) - 1
        assert freedom >= 2, name
        assert chi2 < freedom + 4 * (2 * freedom) ** 0.5, name  # four standard deviations


def test_prompts_share_what_they_have_in_common(tiny, engine):
    """Samples of a prompt compute it once; a longer prompt computes only what is new."""
    start, sampling = [30, 29, 28, 27, 26, 25, 24, 23, 22], SamplingParams(max_new_tokens=2, n=2)
    before = dataclasses.replace(engine.stats)
    [both] = engine.generate(tiny[1], [start], sampling)
    assert engine.stats.prefill_tokens - before.prefill_tokens == 9
    longer = [[*start, 5, 6, 7], [*start[:8], 1], start[:8]]
    out = engine.generate(tiny[1], longer, sampling)
    # Two whole pages are known of the first two; of the third one: its last token is computed.
    assert engine.stats.cached_tokens - before.cached_tokens == 8 + 8 + 4
    assert engine.stats.prefill_tokens - before.prefill_tokens == 9 + 4 + 1 + 4
    for prompt, completions in zip([start, *longer], [both, *out], strict=True):
        for completion in completions:
            check(tiny, prompt, sampling, completion)
    together = [[13, 12, 11, 10, 9, last] for last in range(3)]  # unknown, and in one batch
    before = dataclasses.replace(engine.stats)
    out = engine.generate(tiny[1], together, sampling)
    for prompt, [one, _] in zip(together, out, strict=True):
        check(tiny, prompt, sampling, one)
    assert engine.stats.cached_tokens - before.cached_tokens == 8


def test_pages_that_run_out_delay_and_preempt(tiny, mixed):
    """With pages for little more than one sequence everybody is served, with the same tokens."""
    engine = Engine(tiny[0], CONFIG)
    engine._scheduler.shards[0].pages = Pages(7)  # of the arrays' 24: nothing else is compiled
    scarce = engine.generate(tiny[1], PROMPTS, MIXED)
    for ours, theirs in zip(mixed, scarce, strict=True):
        for one, two in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one.tokens, two.tokens)
            np.testing.assert_allclose(one.logp, two.logp, atol=1e-5)
    assert engine.stats.preemptions > 0
    assert engine.stats.pages_held_most <= 7
    assert emptied(engine)
    # One that can never be served is told so, and holds up nobody.
    large = SamplingParams(max_new_tokens=25)
    [refused], [served] = engine.generate(tiny[1], [PROMPTS[0], PROMPTS[1]], [large, MIXED[1]])
    assert "30 tokens need 8 pages of the cache, which has 7" in refused.error
    assert refused.finish_name == "error" and len(refused.tokens) == 0
    check(tiny, PROMPTS[1], MIXED[1], served)


SHARING = dataclasses.replace(
    CONFIG, slots=6, max_context=20, prefill_buckets=(20,), pages=20, samples=3, shared_tokens=9
)
# Groups that are split, cut short and more than there is room for; a prompt of no whole page.
SHARERS = [dataclasses.replace(s, n=n) for s, n in zip(MIXED, (7, 2, 3, 2), strict=True)]


def test_a_prompt_is_read_once_for_its_samples(tiny):
    engine = Engine(tiny[0], SHARING)
    drawn = engine.generate(tiny[1], PROMPTS, SHARERS)
    for prompt, sampling, completions in zip(PROMPTS, SHARERS, drawn, strict=True):
        for completion in completions:
            check(tiny, prompt, sampling, completion)
    assert emptied(engine) and engine.stats.preemptions > 0


def test_what_is_read_once_is_scaled_and_seen_as_each_slots_own(tiny):
    """int8 keys and values, and a layer that sees the last six tokens."""
    config = dataclasses.replace(tiny[0].config, window=6, local_layers=(True, False))
    once = dataclasses.replace(SHARING, cache_dtype="int8")
    own = dataclasses.replace(once, samples=1)
    sampling = SamplingParams(max_new_tokens=8, n=4, seed=3)
    drawn, expected = (
        Engine(Model(config), c).generate(tiny[1], [PROMPTS[2]], sampling)[0] for c in (once, own)
    )
    for one, other in zip(drawn, expected, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logp, other.logp, atol=1e-5)


def in_slot(slot, prompt, pages, slots=4):
    request = Request(0, np.arange(prompt), SamplingParams(max_new_tokens=1))
    sample = Sample(request, 0, [], 0.0)
    sample.slot, sample.shard, sample.pages, sample.length = slot, slot // slots, pages, prompt
    return sample


def test_who_reads_what_by_hand():
    """Two shards of four slots, pages of 4 tokens, at most 2 of a prompt for 2 sharers; segments of
    a slot's own hold 2 pages."""
    of = shared_shape(slots=4, samples=2, pages=2)
    assert of == SegmentShape(number=3, pages=2, slots=2)
    running = [
        in_slot(0, 9, [5, 6, 7]),
        in_slot(2, 9, [5, 6, 8]),
        in_slot(3, 9, [5, 6, 9]),  # finds no second sharer
        in_slot(1, 3, [4]),  # has no whole page
        in_slot(4, 9, [5, 6, 7]),  # the same numbers in another shard are others' pages
        in_slot(6, 6, [1, 2]),
        in_slot(7, 6, [1, 3]),
    ]
    shared, before = find_shared(running, 2, 4, of, 4)
    assert before == {0: 8, 2: 8, 6: 4, 7: 4}
    pages, slots, first, tokens = joined(shared, of)
    np.testing.assert_array_equal(pages, [[5, 6], [0, 0], [0, 0], [1, 0], [0, 0], [0, 0]])
    np.testing.assert_array_equal(slots[[0, 3]], [[0, 2], [2, 3]])
    assert (slots[[1, 2, 4, 5]] == NOBODY).all() and not first.any()
    np.testing.assert_array_equal(tokens, [8, 0, 0, 4, 0, 0])
    own = find_own(running, before, 2, 4, 2, 4)
    assert most_of(own) == 5
    pages, slots, first, tokens = joined(own, SegmentShape(number=6, pages=2, slots=1))
    # The third sample of [5, 6] in the first shard reads them for itself, and so does slot 4.
    np.testing.assert_array_equal(
        pages.reshape(2, 6, 2),
        [
            [[7, 0], [8, 0], [5, 6], [9, 0], [4, 0], [0, 0]],
            [[5, 6], [7, 0], [2, 0], [3, 0], [0, 0], [0, 0]],
        ],
    )
    np.testing.assert_array_equal(
        slots.reshape(2, 6),
        [[0, 2, 3, 3, 1, NOBODY], [0, 0, 2, 3, NOBODY, NOBODY]],
    )
    np.testing.assert_array_equal(first.reshape(2, 6), [[8, 8, 0, 8, 0, 0], [0, 8, 4, 4, 0, 0]])
    np.testing.assert_array_equal(tokens.reshape(2, 6), [[1, 1, 8, 1, 3, 0], [8, 1, 2, 2, 0, 0]])
    assert shared_shape(4, 1, 2) is shared_shape(4, 2, 0) is None


def test_new_parameters_are_noticed(tiny, engine):
    """A prefix computed with other parameters is not used, whether or not the version says so."""
    model, params = tiny
    prompt, sampling = [3] * 9, SamplingParams(max_new_tokens=6, temperature=0.0)
    other = jax.tree.map(lambda leaf: leaf * 0.9, params)
    for used in (params, other):
        [[one]] = engine.generate(used, [prompt], sampling)
        check((model, used), prompt, sampling, one)


def test_a_sample_goes_on_with_new_parameters(tiny, engine):
    """Taken out after a chunk and resumed: each token has the version that drew it."""
    model, params = tiny
    other = jax.tree.map(lambda leaf: leaf * 0.9, params)
    sampling = SamplingParams(max_new_tokens=10, n=2, seed=3)
    request = engine.submit(PROMPTS[0], sampling)
    told = engine.advance(params, policy_version=4)
    assert [(e.request, e.sample, len(e.drawn.tokens)) for e in told] == [
        (request, 0, 4),
        (request, 1, 4),
    ]
    first, second = engine.take_unfinished()
    assert emptied(engine) and first.request == request
    assert (second.sample, len(second.so_far.tokens)) == (1, 4)
    resumed = engine.resume(second)
    events = []
    while engine.pending:
        events += engine.advance(other, policy_version=5)
    assert {e.request for e in events} == {resumed}
    done = events[-1].completion
    assert done.policy_version.tolist() == [4] * 4 + [5] * 6
    np.testing.assert_array_equal(done.tokens[:4], told[1].drawn.tokens)
    np.testing.assert_array_equal(done.tokens[4:], np.concatenate([e.drawn.tokens for e in events]))
    logits = plain_logits(model, other, [*PROMPTS[0], *done.tokens])[len(PROMPTS[0]) - 1 : -1]
    logp = np.asarray(jax.nn.log_softmax(logits, axis=-1))[np.arange(10), done.tokens]
    np.testing.assert_allclose(done.logp[4:], logp[4:], atol=1e-4)
    with pytest.raises(ValueError, match="requests are pending"):
        engine.submit(PROMPTS[0], sampling)
        engine.generate(params, PROMPTS, sampling)
    assert len(engine.take_unfinished()) == 2 and emptied(engine)


def test_stop_strings_end_where_they_are_complete(tiny, engine, mixed):
    """Token 20 is "t20 ": a string over two tokens is found wherever a chunk ends."""
    speaking = dataclasses.replace(engine)
    speaking.detokenize = lambda ids: "".join(f"t{i} " for i in ids)
    sampling = dataclasses.replace(MIXED[0], n=1)
    tokens = mixed[0][0].tokens.tolist()
    for at in (1, 4, 6):
        string = f"{tokens[at - 1]} t{tokens[at]} "
        [[one]] = speaking.generate(
            tiny[1], [PROMPTS[0]], dataclasses.replace(sampling, stop_strings=("nowhere", string))
        )
        assert string in speaking.detokenize(tokens[: len(one.tokens)])
        assert string not in speaking.detokenize(tokens[: len(one.tokens) - 1])
        assert one.tokens.tolist() == tokens[: len(one.tokens)] and len(one.logp) <= at + 1
        assert one.finish_reason == FINISH_STOP
    with_string = dataclasses.replace(sampling, stop_strings=("x",))
    [[mute]] = engine.generate(tiny[1], [PROMPTS[0]], with_string)
    assert "detokenize" in mute.error


@pytest.mark.parametrize(
    ("prompt", "sampling", "says"),
    [
        ([], SamplingParams(max_new_tokens=2), "no tokens"),
        ([40], SamplingParams(max_new_tokens=2), "outside the vocabulary of 37"),
        ([2**31], SamplingParams(max_new_tokens=2), "outside the vocabulary of 37"),
        ([1] * 30, SamplingParams(max_new_tokens=9), "exceed the engine's max_context=32"),
        ([1], SamplingParams(max_new_tokens=2, stop_ids=(99,)), "stop_ids or logit_bias"),
        ([1], SamplingParams(max_new_tokens=2, stop_ids=tuple(range(9))), "room for 8"),
    ],
)
def test_a_bad_request_is_one_line_and_others_go_on(tiny, engine, prompt, sampling, says):
    [refused], [served] = engine.generate(tiny[1], [prompt, PROMPTS[1]], [sampling, MIXED[1]])
    assert says in refused.error and "\n" not in refused.error
    check(tiny, PROMPTS[1], MIXED[1], served)


@pytest.mark.parametrize("prompt", [3, [[1, 2], [3, 4]], [1.5], "text"], ids=str)
def test_what_is_no_prompt_is_one_line_and_leaves_nothing(tiny, engine, prompt):
    with pytest.raises(ValueError, match="one sequence of token ids") as error:
        engine.generate(tiny[1], [PROMPTS[0], np.array(prompt)], MIXED[0])
    assert "\n" not in str(error.value) and emptied(engine)


def unchecked(**fields) -> SamplingParams:
    """Not made by its own method, which the tests' type checks stop first."""
    params = object.__new__(SamplingParams)
    params.__dict__.update(dataclasses.asdict(SamplingParams(max_new_tokens=8)) | fields)
    return params


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(seed=1.5), "seed=1.5 must be a whole number"),
        (dict(n=2.0), "n=2.0 must be a whole number"),
        (dict(temperature=None), "temperature=None must be a number"),
        (dict(stop_strings="end"), "stop_strings='end': give a sequence of strings"),
        (dict(stop_ids=3), "stop_ids=3: give a sequence"),
        (dict(logit_bias={3: 1.0}), "give pairs of a token id"),
        (dict(logit_bias=((3, 1e39),)), "finite number, within 1e38"),
        (dict(repetition_penalty=1e39), "must be positive, within 1e30"),
    ],
)
def test_parameters_that_mean_nothing_are_one_line(wrong, says):
    with pytest.raises(ValueError, match=says) as error:
        unchecked(**wrong).__post_init__()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", [5, -5, 2**63 + 7], ids=str)
def test_numbers_of_numpy_are_those_numbers(tiny, engine, seed):
    own = np.uint64(seed) if seed >= 2**63 else np.int64(seed)
    prompts = PROMPTS[0], np.array(PROMPTS[0], np.uint16)
    [[one]], [[other]] = (
        engine.generate(tiny[1], [prompt], unchecked(seed=each))
        for prompt, each in zip(prompts, (seed, own), strict=True)
    )
    assert one.tokens.tolist() == other.tokens.tolist()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(pages=3, cache_bytes=4), "set one of them"),
        (dict(prefill_buckets=(8,)), "before max_context=32"),
        (dict(cache_dtype="float8"), "cache_dtype='float8'"),
        (dict(chunk=0), "chunk=0 must be at least 1"),
        (dict(cache_bytes=10), "less than one page of"),
        (dict(top_k_capture=0, replay=True), "set top_k_capture above 0"),
        (dict(top_k_capture=38), "more than the model's vocabulary of 37"),
    ],
)
def test_contradictions_are_one_line(tiny, change, says):
    with pytest.raises(ValueError, match=says) as error:
        Engine(tiny[0], dataclasses.replace(CONFIG, **change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("waiting", "rows"),
    [(1, [1]), (2, [1, 1]), (3, [4]), (5, [4, 1]), (10, [4, 4, 1, 1]), (15, [16]), (17, [16, 1])],
)
def test_few_prompts_do_not_pay_for_all_rows(waiting, rows):
    config = EngineConfig(slots=16, max_context=32, prefill_buckets=(32,), prefill_tokens=512)
    jobs = [
        Prefill(0, np.array([5, i]), [], [i], Prefilled(2, [i]), samples=[]) for i in range(waiting)
    ]
    calls = list(prefill_calls(jobs, config, Shape(shards=1, pages=64, pages_a_sequence=2)))
    assert [len(call.arrays["tokens"]) for call in calls] == rows
    assert [job for call in calls for job in call.jobs.values()] == jobs
    compiled = {len(call.arrays["tokens"]) for call in empty_calls(config, Shape(1, 64, 2))}
    assert compiled == {1, 4, 16}


def test_where_weights_are_dear_to_read_calls_are_few(monkeypatch):
    monkeypatch.setitem(engine_inputs.CALL_TOKENS, "cpu", 240)
    assert engine_inputs.rows_of_calls(10, [1, 4, 16], 32) == [16]
    assert engine_inputs.rows_of_calls(10, [1, 4, 16], 512) == [4, 4, 1, 1]


SMALL = dataclasses.replace(CONFIG, slots=2, max_context=16, prefill_buckets=(16,))


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
def test_a_rounded_cache_is_near_and_repeatable(tiny, cache_dtype):
    """Near the reference, and the same tokens whether a context was decoded or computed again."""
    engine = Engine(tiny[0], dataclasses.replace(SMALL, cache_dtype=cache_dtype))
    sampling = SamplingParams(max_new_tokens=9, n=3, seed=4)
    [plenty] = engine.generate(tiny[1], [PROMPTS[0]], sampling)
    for completion in plenty:
        check(tiny, PROMPTS[0], sampling, completion, atol=0.3)
        with pytest.raises(AssertionError):  # it is rounded
            check(tiny, PROMPTS[0], sampling, completion, atol=1e-4)
    engine._scheduler.shards[0].pages = Pages(5)
    [scarce] = engine.generate(tiny[1], [PROMPTS[0]], sampling)
    assert engine.stats.preemptions > 0
    for one, two in zip(plenty, scarce, strict=True):
        np.testing.assert_array_equal(one.tokens, two.tokens)
        # A number that lies between two steps may fall to either when it is computed again.
        np.testing.assert_allclose(one.logp, two.logp, atol=1e-3)


@pytest.mark.parametrize("cache_dtype", ["model", "int8"])
def test_room_that_grows_within_a_chunk_changes_no_token(tiny, cache_dtype):
    """Samples that end before the room of 16 tokens is full, with it, and after it has grown."""
    sampling = [dataclasses.replace(MIXED[0], max_new_tokens=length) for length in (9, 16, 17, 21)]
    grown, whole = (
        Engine(tiny[0], dataclasses.replace(CONFIG, chunk=chunk, cache_dtype=cache_dtype)).generate(
            tiny[1], PROMPTS, sampling
        )
        for chunk in (32, 4)
    )
    for ours, theirs in zip(grown, whole, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_allclose(one.logp, other.logp, atol=1e-5)


def test_rounding_to_int8_by_hand():
    """Steps of the largest value over 127, of each token and head on its own."""
    k = jnp.array([[[127.0, -63.6], [0.5, 0.25]]])
    v = jnp.array([[[0.0, 0.0], [-2.54, 0.02]]])
    stored = rounded(k, v, jnp.dtype("int8"))
    np.testing.assert_array_equal(stored.k[0], [[127, -64], [127, 64]])
    np.testing.assert_array_equal(stored.v[0], [[0, 0], [-127, 1]])
    np.testing.assert_allclose(stored.k_scale[0], [1.0, 0.5 / 127], rtol=1e-6)
    np.testing.assert_allclose(stored.v_scale[0], [0.0, 0.02], rtol=1e-6)
    back_k, back_v = restored(stored, jnp.dtype("float32"))
    np.testing.assert_allclose(back_k[0], [[127, -64], [0.5, 64 * 0.5 / 127]], rtol=1e-6)
    np.testing.assert_allclose(back_v[0], [[0, 0], [-2.54, 0.02]], rtol=1e-5)


def test_the_cache_budget_is_in_bytes(tiny):
    """2 layers x 4 tokens x 2 x 2 heads x 6 numbers x 4 bytes = 768 a page."""
    engine = Engine(tiny[0], dataclasses.replace(SMALL, cache_bytes=768 * 3 + 700))
    assert engine._scheduler.shards[0].pages.count == 3
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(engine._device._pages)) == 768 * 3


def test_a_real_model_tells_its_story(shared_data):
    """llama2.c's stories260K: all 256 recorded tokens and their log-probabilities."""
    folder = shared_data / "lm" / "stories260K"
    golden = json.loads(gzip.decompress((folder / "golden_greedy.json.gz").read_bytes()))
    params = jax.tree.map(jnp.asarray, read_llama2c(folder / "stories260K.bin", STORIES))
    config = EngineConfig(slots=1, max_context=257, chunk=60, page_size=257, top_k_capture=1)
    engine = Engine(Model(STORIES), dataclasses.replace(config, prefill_buckets=(257,)))
    sampling = SamplingParams(max_new_tokens=256, temperature=0.0)
    [[story]] = engine.generate(params, [[golden["bos"]]], sampling)
    assert story.tokens.tolist() == golden["greedy_ids"][1:]
    np.testing.assert_allclose(story.logp, golden["greedy_logprobs_float64"], atol=3e-5)


def test_what_is_read_follows_the_tokens_in_use(tiny):
    """One long slot of eight: 16 segments and seven, the next larger number is 24; of two pages."""
    config = EngineConfig(slots=8, max_context=512, page_size=16)
    shape = Shape(shards=1, pages=256, pages_a_sequence=32)
    running = [
        in_slot(0, 500, [*range(32)], 8),
        *(in_slot(i, 20, [40, 41], 8) for i in range(1, 8)),
    ]
    reads = reads_of(config, tiny[0].config, shape, ragged=False)
    [own] = SlotRows(8, 1, 1).slots(running, config, shape, reads).segments
    assert own.pages.shape == (24, 2) and own.tokens.sum() == 500 + 7 * 20
    assert reads.own[-1].number == 8 * 16  # where all are as long


def test_numbers_of_segments():
    """At most half as many again as there are, and no more than there can be."""
    assert segment_counts(4, 1) == [4] and segment_counts(4, 2) == [4, 6, 8]
    assert segment_counts(1, 5) == [1, 2, 3, 4, 5]
    assert segment_counts(8, 9) == [8, 12, 16, 24, 32, 48, 64, 72]
    # float32 and a query head a key head: 32 tokens; bfloat16 and 8: 256.
    assert [own_pages(size, 100, 1, 4) for size in (16, 32, 100)] == [2, 1, 1]
    assert own_pages(16, 100, 8, 2) == 16 and own_pages(16, 3, 8, 2) == 3
