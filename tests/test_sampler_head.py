"""The sampler's head: which tokens the filters keep, how often each is drawn, what is recorded."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_jax.kernels import drawing, streamed_sampler, tiles
from dppo_jax.kernels.columns import LONG, top_k, top_k_by_groups
from dppo_jax.kernels.drawing import draw, inverse_cdf, numbers
from dppo_jax.kernels.filters import Filters, threshold
from dppo_jax.kernels.sampler import sample
from dppo_jax.kernels.streamed_sampler import streamed

# One program a shape, where operation by operation each would be compiled for itself.
drawn = jax.jit(draw, static_argnums=(2, 3, 4))
threshold_of = jax.jit(threshold, static_argnums=1)


def kept64(logits, filters):
    """The kept set of one row by its definition, in float64: sort, cut, renormalise, cut, cut.

    Also the least distance of a mass from top_p, or of a logit from min_p's: what is nearer than
    float32 resolves may fall on either side.
    """
    z = np.asarray(logits, np.float64)
    kept = np.ones(len(z), bool)
    slack = np.inf
    if filters.top_k:
        kept &= z >= np.sort(z)[::-1][min(filters.top_k, len(z)) - 1]
    if filters.top_p < 1:
        p = np.where(kept, np.exp(z - z.max()), 0.0)
        p /= p.sum()
        levels = np.unique(z[kept])[::-1]
        before = np.array([p[z > level].sum() for level in levels])
        slack = np.abs(before - filters.top_p).min()
        kept &= z >= levels[before < filters.top_p].min()
    if filters.min_p:
        least = z.max() + np.log(filters.min_p)
        slack = min(slack, np.abs(z[np.isfinite(z)] - least).min())
        kept &= z >= least
    return kept, slack


def rows_of(seed, batch, vocab, kind):
    rng = np.random.default_rng(seed)
    if kind == "ties":  # few different values, of both signs, zeros of both signs among them
        z = rng.integers(-3, 3, size=(batch, vocab)) * 0.7
        z[rng.random(z.shape) < 0.2] = -0.0
    elif kind == "wide":
        z = rng.normal(size=(batch, vocab)) * 30
    else:
        z = rng.normal(size=(batch, vocab)) * 2
        z[:, 1:][rng.random((batch, vocab - 1)) < 0.2] = -np.inf
    return z.astype(np.float32)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    vocab=st.sampled_from([1, 2, 7, 33]),
    kind=st.sampled_from(["ties", "wide", "with -inf"]),
    top_k=st.sampled_from([0, 1, 3, 20, 100]),
    top_p=st.sampled_from([1.0, 0.999, 0.95, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
)
def test_the_kept_set_is_that_of_float64(seed, vocab, kind, top_k, top_p, min_p):
    filters = Filters(top_k, top_p, min_p)
    z = rows_of(seed, 6, vocab, kind)
    kept = z >= np.asarray(threshold_of(jnp.asarray(z), filters))[:, None]
    for ours, row in zip(kept, z, strict=True):
        expected, slack = kept64(row, filters)
        assert ours[np.argmax(row)]
        if slack > 1e-5 or min_p == 1.0:
            np.testing.assert_array_equal(ours & np.isfinite(row), expected & np.isfinite(row))


def test_kept_sets_by_hand():
    """Probabilities 0.4, 0.2, 0.2, 0.1, 0.1 in mixed order."""
    z = jnp.log(jnp.array([[0.2, 0.4, 0.1, 0.2, 0.1]]))

    def kept(**filters):
        return np.flatnonzero(z[0] >= threshold_of(z, Filters(**filters))[0]).tolist()

    assert kept() == kept(top_k=5) == kept(top_k=9) == [0, 1, 2, 3, 4]
    assert kept(top_k=1) == kept(top_p=0.4) == kept(min_p=0.6) == [1]
    assert kept(top_k=2) == kept(top_k=3) == [0, 1, 3]  # the tie is kept whole
    assert kept(top_p=0.41) == kept(top_p=0.7) == kept(min_p=0.3) == [0, 1, 3]
    assert kept(top_p=0.81) == kept(min_p=0.2) == [0, 1, 2, 3, 4]
    # 0.4 is half of what the three hold: top-p renormalises
    assert kept(top_k=3, top_p=0.49) == [1] and kept(top_k=3, top_p=0.51) == [0, 1, 3]


def test_filters_that_mean_nothing_are_refused():
    for wrong, message in (
        (dict(top_k=-1), "top_k=-1"),
        (dict(top_p=0.0), "top_p=0.0"),
        (dict(top_p=1.5), "top_p=1.5"),
        (dict(min_p=-0.1), "min_p=-0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            Filters(**wrong)
    assert not Filters().on and Filters(top_k=1).on and Filters(top_p=0.9).on


FILTERS = [
    Filters(),
    Filters(top_k=6),
    Filters(top_p=0.8),
    Filters(min_p=0.1),
    Filters(top_k=9, top_p=0.9, min_p=0.05),
]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    k=st.integers(1, 6),
    more=st.integers(0, 40),
    size=st.sampled_from([1, 4, 7]),
    kind=st.sampled_from(["ties", "wide", "masked"]),
)
def test_the_top_k_by_groups_is_the_top_k(seed, k, more, size, kind):
    z = jnp.asarray(rows_of(seed, 3, k * size + more, kind))
    by_groups, whole = jax.jit(lambda z: (top_k_by_groups(z, k, size), jax.lax.top_k(z, k)))(z)
    jax.tree.map(np.testing.assert_array_equal, by_groups, tuple(whole))


@pytest.mark.parametrize(("columns", "groups"), [(5 * LONG, True), (5 * LONG - 1, False)])
def test_long_rows_are_searched_by_groups_on_a_cpu(columns, groups):
    z = jnp.asarray(rows_of(0, 2, columns, "ties"))
    found, whole = top_k(z, 5), jax.lax.top_k(z, 5)
    jax.tree.map(np.testing.assert_array_equal, found, tuple(whole))
    assert ("reduce_max" in str(jax.make_jaxpr(lambda z: top_k(z, 5))(z))) == groups
    assert top_k(z, 0)[0].shape == (2, 0)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_frequencies_are_the_recorded_distribution(filters):
    """Chi-square of 40,000 draws at temperature 0.8 against float64; nothing outside the set."""
    vocab, draws = 23, 40_000
    z = np.random.default_rng(1).normal(size=vocab).astype(np.float32) * 1.5
    kept, slack = kept64(z / 0.8, filters)
    assert slack > 1e-3
    p = np.where(kept, np.exp(z.astype(np.float64) / 0.8), 0)
    p /= p.sum()
    logits = jnp.broadcast_to(jnp.asarray(z), (draws, vocab))
    out = drawn(logits, numbers(jax.random.key(3), draws), 0.8, 4, filters)
    counts = np.bincount(np.asarray(out.token), minlength=vocab)
    assert (counts[~kept] == 0).all()
    chi2 = ((counts - draws * p)[kept] ** 2 / (draws * p[kept])).sum()
    assert chi2 < kept.sum() + 4 * (2 * kept.sum()) ** 0.5  # four standard deviations
    np.testing.assert_allclose(np.exp(out.logp), p[np.asarray(out.token)], rtol=2e-5)
    np.testing.assert_allclose(out.entropy[0], -(p[kept] * np.log(p[kept])).sum(), rtol=1e-5)
    best = np.argsort(-p, kind="stable")[:4]
    np.testing.assert_array_equal(out.topk_ids[0], best)
    np.testing.assert_allclose(np.exp(out.topk_logp[0]), p[best], rtol=2e-5)


@pytest.mark.parametrize("filters", [Filters(), Filters(top_p=0.5)], ids=str)
def test_temperature_zero_takes_the_first_of_the_most_likely(filters):
    logits = jnp.array([[0.0, 2.0, 2.0, -1.0], [-jnp.inf, -3.0, -4.0, -3.0]])
    out = drawn(logits, numbers(jax.random.key(0), 2), 0.0, 2, filters)
    np.testing.assert_array_equal(out.token, [1, 1])
    assert out.token.dtype == out.topk_ids.dtype == jnp.int32
    if not filters.on:
        np.testing.assert_allclose(out.logp, jax.nn.log_softmax(logits)[:, 1], rtol=1e-6)


@pytest.mark.parametrize("temperature", [1e-8, 1e-20, 1e-37])
@pytest.mark.parametrize("rows", [False, True])
def test_a_temperature_near_zero_takes_the_most_likely(temperature, rows):
    """Quotients of 1e30 and more have no neighbours, so that a rounded one may be far from all."""
    logits = 3 * jax.random.normal(jax.random.key(0), (64, 37))
    asked = jnp.full((64,), temperature) if rows else temperature
    out = jax.jit(lambda x: draw(x, numbers(jax.random.key(3), 64), asked, 5))(logits)
    np.testing.assert_array_equal(out.token, logits.argmax(1))
    np.testing.assert_array_equal(out.logp, 0)


def test_greedy_rows_under_a_soft_cap_take_the_largest():
    """At these sizes XLA fuses the cap into every reader, so that no difference to the largest need
    be 0: an earlier head, which looked for one, gave ids outside the vocabulary here."""
    take = jax.jit(partial(sample, temperature=0.0, top_k_capture=4, soft_cap=30.0))
    for seed in range(5):
        of_hidden, of_matrix = jax.random.split(jax.random.key(seed))
        hidden = 3 * jax.random.normal(of_hidden, (3, 48))
        unembedding = jax.random.normal(of_matrix, (101, 48)) / 2
        out = take(hidden, unembedding, jax.random.key(9))
        largest = jnp.argmax(hidden @ unembedding.T, axis=1)
        np.testing.assert_array_equal(out.token, largest)
        np.testing.assert_array_equal(out.topk_ids[:, 0], largest)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_the_head_draws_from_float32_logits(dtype, soft_cap):
    hidden = jax.random.normal(jax.random.key(0), (3, 8), dtype)
    unembedding = jax.random.normal(jax.random.key(1), (29, 8), dtype)
    ours = sample(
        hidden, unembedding, jax.random.key(2), temperature=0.7, top_k_capture=4, soft_cap=soft_cap
    )
    logits = np.asarray(hidden, np.float64) @ np.asarray(unembedding, np.float64).T
    if soft_cap is not None:
        logits = soft_cap * np.tanh(logits / soft_cap)
    want = drawn(jnp.asarray(logits, jnp.float32), numbers(jax.random.key(2), 3), 0.7, 4)
    assert ours.logp.dtype == ours.topk_logp.dtype == ours.entropy.dtype == jnp.float32
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, want)


def test_inverse_cdf_has_the_right_frequencies():
    """Chi-square over 60,000 draws from a distribution with zeros and rare tokens."""
    rng = np.random.default_rng(0)
    weights = rng.exponential(size=23) ** 3
    weights[[0, 5, 22]] = 0
    p = (weights / weights.sum()).astype(np.float32)
    draws = 60_000
    picked = inverse_cdf(jnp.broadcast_to(p, (draws, 23)), numbers(jax.random.key(0), draws))
    counts = np.bincount(np.asarray(picked), minlength=23)
    assert (counts[p == 0] == 0).all()
    expected = p[p > 0] * draws
    chi2 = ((counts[p > 0] - expected) ** 2 / expected).sum()
    assert chi2 < 45.3  # the 0.999 quantile at 19 degrees of freedom is 43.8


def test_inverse_cdf_never_leaves_the_support():
    """Uniforms at the ends of [0, 1) with total mass below and above one."""
    for total in (0.3, 1.0, 1.7):
        p = jnp.array([[0.0, total, 0.0, 0.0, 0.0]] * 4096, jnp.float32)
        assert (np.asarray(inverse_cdf(p, numbers(jax.random.key(1), 4096))) == 1).all()


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of at most 128 columns, so that small vocabularies need several."""
    monkeypatch.setattr(drawing, "COLUMNS", 128)


def head_of(logits):
    """Inputs of the head whose logits are exactly the given rows."""
    return jnp.asarray(logits, jnp.float32), jnp.eye(np.shape(logits)[1])


@pytest.mark.parametrize("vocab", [1, 37, 128, 129, 300, 512])
@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_the_streamed_form_records_what_the_plain_form_does(small_chunks, vocab, temperature):
    """Ragged vocabularies, batches and bins; ties, of which the first come first."""
    rng = np.random.default_rng(vocab)
    logits = rng.normal(size=(5, vocab)).astype(np.float32) * 4
    logits[2] = np.round(logits[2])
    logits[4] = 1.5
    k = min(vocab, 6)
    key = numbers(jax.random.key(0), 5)
    ours, exact, _ = jax.jit(streamed, static_argnames=("temperature", "top_k_capture", "bins"))(
        *head_of(logits), key, temperature=temperature, top_k_capture=k, bins=24
    )
    want = drawn(jnp.asarray(logits), key, temperature, k)
    assert exact[0] and (not exact[4] or vocab <= 96)  # 24 bins of 4 keep all there is
    np.testing.assert_array_equal(ours.topk_ids, want.topk_ids)
    np.testing.assert_allclose(ours.topk_logp, want.topk_logp, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.entropy, want.entropy, rtol=1e-5, atol=1e-5)
    logp = np.asarray(jax.nn.log_softmax(logits / (temperature or 1.0)))
    np.testing.assert_allclose(
        ours.logp, logp[np.arange(5), np.asarray(ours.token)], rtol=1e-5, atol=1e-5
    )
    assert ours.token.dtype == ours.topk_ids.dtype == jnp.int32
    np.testing.assert_array_equal(ours.token, want.token)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("temperature", [1e-3, 1e-8, 1e-20, 1e-37])
def test_the_streamed_form_at_low_temperatures(small_chunks, temperature, rows):
    """Far from 0, where a quotient by the temperature has no digits left for differences."""
    rng = np.random.default_rng(5)
    logits = (30 + rng.normal(size=(5, 300)) / 100).astype(np.float32)
    below = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    with np.errstate(over="ignore"):
        p = np.exp(below / temperature)
    asked = jnp.full((5,), temperature) if rows else temperature
    run = jax.jit(lambda *args: streamed(*args, temperature=asked, top_k_capture=6, bins=24))
    ours, exact, complete = run(*head_of(logits), numbers(jax.random.key(0), 5))
    assert exact.all() and complete.all()
    logp = np.log(np.maximum(p / p.sum(axis=1, keepdims=True), 1e-300))
    drawn_logp = logp[np.arange(5), np.asarray(ours.token)]
    np.testing.assert_allclose(ours.logp, drawn_logp, rtol=1e-5, atol=1e-5)
    top = np.take_along_axis(logp, np.asarray(ours.topk_ids), axis=1)
    likely = top > -80  # beyond, float32 may hold nothing
    np.testing.assert_allclose(ours.topk_logp[likely], top[likely], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        ours.entropy, -(p / p.sum(1, keepdims=True) * logp).sum(1), atol=1e-5
    )
    if temperature < 1e-3:
        np.testing.assert_array_equal(ours.token, logits.argmax(axis=1))


def test_rows_that_the_candidates_would_miss(small_chunks):
    """The six largest in one bin of depth 4: told, and repaired. So with -inf among the K."""
    logits = np.random.default_rng(0).normal(size=(3, 300))
    logits[0, 7 + 24 * np.arange(6)] = [9, 8, 7, 6, 5, 4]
    logits[2, 5:] = -np.inf
    options = dict(temperature=1.0, top_k_capture=6, bins=24)
    run = jax.jit(lambda *args: streamed(*args, **options))
    # an identity matrix would multiply the infinities by 0
    hidden, matrix = jnp.eye(3), jnp.asarray(np.where(np.isinf(logits), -1e30, logits).T, "float32")
    ours, exact, _ = run(hidden, matrix, numbers(jax.random.key(1), 3))
    np.testing.assert_array_equal(exact, [False, True, False])
    want = drawn(matrix.T, numbers(jax.random.key(1), 3), 1.0, 6)
    np.testing.assert_array_equal(ours.topk_ids, want.topk_ids)
    np.testing.assert_allclose(ours.topk_logp[:2], want.topk_logp[:2], rtol=1e-5, atol=1e-5)
    # the same without the row that fails takes no second pass
    alone, exact, _ = run(hidden[1:2], matrix, numbers(jax.random.key(1), 1))
    assert exact.all()
    np.testing.assert_array_equal(alone.topk_ids[0], want.topk_ids[1])


def test_streamed_frequencies(small_chunks):
    """Chi-square of 40,000 draws over three chunks, one of them nearly impossible."""
    vocab, draws = 300, 40_000
    z = np.random.default_rng(1).normal(size=vocab) * 2
    z[128:256] -= 12
    p = np.exp(z) / np.exp(z).sum()
    hidden, matrix = jnp.ones((draws, 1)), jnp.asarray(z[:, None], jnp.float32)
    out, *_ = jax.jit(lambda key: streamed(
        hidden, matrix, key, temperature=1.0, top_k_capture=1, bins=32
    ))(numbers(jax.random.key(5), draws))  # fmt: skip
    counts = np.bincount(np.asarray(out.token), minlength=vocab)
    usual = p * draws >= 5
    observed = np.append(counts[usual], counts[~usual].sum())
    expected = np.append(p[usual], p[~usual].sum()) * draws
    chi2 = ((observed - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations


STREAMED = [
    (Filters(top_k=5), False),
    (Filters(top_k=12, top_p=0.9, min_p=0.01), False),
    (Filters(top_p=0.999), False),  # more than the candidates: the batch is mended
    (Filters(top_p=0.9), True),
    (Filters(top_k=6, top_p=0.8), True),
]


@pytest.mark.parametrize(("filters", "replay"), STREAMED, ids=str)
def test_the_streamed_form_filters_as_the_plain_form(small_chunks, monkeypatch, filters, replay):
    """What is recorded, and the tokens drawn, of kept ones; 24 bins of 4 for 300 columns."""
    monkeypatch.setattr(streamed_sampler, "BINS", 24)
    logits = np.random.default_rng(7).normal(size=(6, 300)).astype(np.float32) * 4
    logits[4:] /= 8
    options = dict(temperature=0.8, top_k_capture=8, filters=filters, replay=replay)
    ours, want = (
        jax.jit(lambda x, w, key, form=form: sample(x, w, key, form=form, **options))(
            *head_of(logits), jax.random.key(3)
        )
        for form in ("streamed", "plain")
    )
    z = logits / 0.8
    kept = z >= np.asarray(threshold_of(jnp.asarray(z), filters))[:, None]
    if replay:
        kept &= z >= np.sort(z, axis=1)[:, -8, None]
        np.testing.assert_array_equal(ours.kept_count, want.kept_count)
        np.testing.assert_array_equal(ours.kept_count, kept.sum(axis=1))
    logp = np.where(kept, z, -np.inf)
    logp = np.asarray(jax.nn.log_softmax(logp))
    token = np.asarray(ours.token)
    np.testing.assert_array_equal(token, want.token)
    np.testing.assert_allclose(ours.logp, logp[np.arange(6), token], rtol=1e-4, atol=1e-5)
    assert kept[np.arange(6), token].all()
    there = np.isfinite(want.topk_logp)
    np.testing.assert_array_equal(np.isfinite(ours.topk_logp), there)
    np.testing.assert_array_equal(ours.topk_ids[there], want.topk_ids[there])
    np.testing.assert_allclose(ours.topk_logp[there], want.topk_logp[there], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.entropy, want.entropy, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("replay", [False, True])
def test_streamed_filtered_frequencies(small_chunks, replay):
    """Chi-square of 5,000 draws from a nucleus that lies over two chunks."""
    vocab, draws = 160, 5_000
    z = np.random.default_rng(1).normal(size=vocab) * 2.5
    hidden, matrix = jnp.ones((draws, 1)), jnp.asarray(z[:, None], jnp.float32)
    out = jax.jit(lambda key: sample(
        hidden, matrix, key, temperature=1.0, top_k_capture=16, filters=Filters(top_p=0.9),
        replay=replay, form="streamed",
    ))(jax.random.key(5))  # fmt: skip
    kept, slack = kept64(z, Filters(top_p=0.9))
    assert slack > 1e-4 and kept.sum() > 16
    if replay:
        kept &= z >= np.sort(z)[-16]
    p = np.where(kept, np.exp(z), 0) / np.exp(z[kept]).sum()
    counts = np.bincount(np.asarray(out.token), minlength=vocab)
    assert (counts[~kept] == 0).all()
    chi2 = ((counts - draws * p)[kept] ** 2 / (draws * p[kept])).sum()
    assert chi2 < kept.sum() + 4 * (2 * kept.sum()) ** 0.5  # four standard deviations


def test_the_form_is_chosen_by_platform_and_vocabulary(monkeypatch):
    hidden = jnp.ones((2, 4))
    options = dict(temperature=1.0, top_k_capture=3)

    def loops(vocab, filters=Filters()):  # noqa: B008  frozen
        def head(x, w, key):
            return sample(x, w, key, filters=filters, **options)

        matrix = jax.ShapeDtypeStruct((vocab, 4), "float32")
        return "cond[" in str(jax.make_jaxpr(head)(hidden, matrix, jax.random.key(0)))

    assert not loops(50_000)
    monkeypatch.setattr(tiles, "target", lambda: tiles.Target("tpu", "TPU v5e", True))
    assert loops(50_000) and not loops(1024) and loops(50_000, Filters(top_p=0.9))


@pytest.mark.parametrize("options", [{}, dict(filters=Filters(top_p=0.9), replay=True)], ids=str)
def test_the_streamed_form_never_holds_the_logits(options):
    batch, vocab, width = 64, 151936, 32
    shapes = [jax.ShapeDtypeStruct(s, "float32") for s in ((batch, width), (vocab, width))]

    def head(x, w):
        return sample(
            x, w, jax.random.key(0), temperature=0.9, top_k_capture=20, form="streamed", **options
        )

    compiled = jax.jit(head).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < batch * vocab * 4 / 2
    assert f"[{batch},{vocab}]" not in compiled.as_text()
