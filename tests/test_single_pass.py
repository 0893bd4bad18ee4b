"""Loss and gradient in one pass against the two-pass head and the plain form in float64."""

import inspect
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_jax.kernels import tiles
from dppo_jax.kernels.head import fused_loss, head
from dppo_jax.kernels.reference import reference
from dppo_jax.kernels.single_pass import TokenTerms, chunk_tokens, fused_loss_and_grad
from dppo_jax.kernels.tiles import SINGLE_PASS_CHUNKS as CHUNKS

LARGE_VOCABULARY = 151936


@pytest.fixture(scope="module", autouse=True)
def _small_chunks():
    """Tests' few tokens and columns in many chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "SINGLE_PASS_LEAST_TOKENS", 8)
        patch.setitem(tiles.SINGLE_PASS_COLUMNS, "CPU", 128)
        yield


def losses(terms, rows):
    """A capped policy gradient, an entropy bonus and a pull on the stored ids."""
    weight, advantage = rows
    ratio = jnp.minimum(jnp.exp(jax.lax.stop_gradient(terms.logp[:, 0]) + 2), 1.5)
    stored = jnp.sum(jnp.sin(terms.logp[:, 1:]), axis=1)
    return weight * (-advantage * ratio * terms.logp[:, 0] + 0.1 * terms.entropy + 0.05 * stored)


def draw(seed, tokens, width, vocabulary, columns, scale=3.0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(tokens, width))
    unembedding = rng.normal(size=(vocabulary, width)) * scale / width**0.5
    ids = rng.integers(0, vocabulary, size=(tokens, columns))
    ids[:, -1] = ids[:, 0]  # a repeat
    rows = (rng.uniform(size=tokens), rng.normal(size=tokens))
    return hidden, unembedding, jnp.asarray(ids, jnp.int32), rows


def reference64(hidden, unembedding, ids, rows, temperature=1.0, soft_cap=None):
    """The loss sum and its two gradients from all N x V logits, in float64."""
    with jax.enable_x64(True):
        x, w = (jnp.asarray(np.asarray(a, np.float64)) for a in (hidden, unembedding))
        rows = jax.tree.map(jnp.asarray, rows)

        def total(x, w):
            lse, at, entropy = reference(x, w, jnp.asarray(np.asarray(ids)), temperature, soft_cap)
            return losses(TokenTerms(at - lse[:, None], entropy), rows).sum()

        value, grads = jax.jit(jax.value_and_grad(total, (0, 1)))(x, w)
        return float(value), [np.asarray(g) for g in grads]


def differentiated(hidden, unembedding, ids, rows, dtype="float32", **options):
    x, w = (jnp.asarray(a, dtype) for a in (hidden, unembedding))
    rows = jax.tree.map(lambda row: jnp.asarray(row, jnp.float32), rows)
    total = lambda x, w: fused_loss(losses, x, w, ids, rows, **options)  # noqa: E731
    return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(x, w)


def assert_close(got, want, relative):
    """Largest error within `relative` of the largest magnitude (a gradient has zeros)."""
    got, want = np.asarray(got, np.float64), np.asarray(want)
    assert np.isfinite(got).all()
    assert np.abs(got - want).max() <= relative * max(1e-6, np.abs(want).max())


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 3 * 8 * CHUNKS),
    vocabulary=st.sampled_from([2, 37, 128, 129, 300]),
    columns=st.sampled_from([1, 2, 21]),
    temperature=st.sampled_from([1.0, 0.6]),
    soft_cap=st.sampled_from([None, 5.0]),
)
def test_value_and_gradients_are_those_of_the_plain_form(
    tokens, vocabulary, columns, temperature, soft_cap
):
    given_ = draw(tokens, tokens, 5, vocabulary, columns)
    options = {"temperature": temperature, "soft_cap": soft_cap}
    value, grads = reference64(*given_, **options)
    (ours, _), our_grads = differentiated(*given_, **options)
    assert float(ours) == pytest.approx(value, rel=1e-4, abs=1e-4)
    for got, want in zip(our_grads, grads, strict=True):
        assert_close(got, want, 2e-5)


def test_terms_are_those_of_the_head():
    hidden, unembedding, ids, rows = draw(1, 300, 6, 41, 4)
    (_, terms), _ = differentiated(hidden, unembedding, ids, rows)
    x, w = (jnp.asarray(a, jnp.float32) for a in (hidden, unembedding))
    out = head(x, w, ids)
    np.testing.assert_allclose(terms.logp, out.logit_at - out.lse[:, None], atol=3e-6)
    np.testing.assert_allclose(terms.entropy, out.entropy, atol=3e-6)


def test_without_differentiation_the_value_is_the_same():
    hidden, unembedding, ids, rows = draw(2, 40, 6, 41, 4)
    (value, _), _ = differentiated(hidden, unembedding, ids, rows)
    arrays = [jnp.asarray(a, jnp.float32) for a in (hidden, unembedding)]
    plain, _ = fused_loss(losses, *arrays, ids, jax.tree.map(jnp.float32, rows))
    assert float(plain) == pytest.approx(float(value), rel=1e-5)


def test_constant_stored_logits_get_no_gradient():
    hidden, unembedding, ids, rows = draw(3, 40, 6, 41, 4)
    (_, _), grads = differentiated(hidden, unembedding, ids, rows, stored_gradient=False)

    def without_stored(x, w):
        out = head(x, w, ids, stored_gradient=False)
        terms = TokenTerms(out.logit_at - jax.lax.stop_gradient(out.lse)[:, None], out.entropy)
        sampled = (out.logit_at[:, :1] - out.lse[:, None], jax.lax.stop_gradient(terms.logp[:, 1:]))
        return losses(terms._replace(logp=jnp.concatenate(sampled, 1)), rows32).sum()

    rows32 = jax.tree.map(jnp.float32, rows)
    arrays = [jnp.asarray(a, jnp.float32) for a in (hidden, unembedding)]
    for got, want in zip(grads, jax.grad(without_stored, (0, 1))(*arrays), strict=True):
        assert_close(got, want, 2e-5)


def test_bfloat16_states_beside_a_float32_matrix():
    """Statistics in float32 from rounded inputs; the matrix's gradient is not rounded."""
    hidden, unembedding, ids, rows = draw(4, 200, 8, 50, 3)
    x = jnp.asarray(hidden, jnp.bfloat16)
    w = jnp.asarray(unembedding, jnp.float32)
    rows32 = jax.tree.map(jnp.float32, rows)
    total = lambda x, w: fused_loss(losses, x, w, ids, rows32)[0]  # noqa: E731
    value, (d_x, d_w) = jax.jit(jax.value_and_grad(total, (0, 1)))(x, w)
    rounded = w.astype(jnp.bfloat16)
    want, grads = reference64(x.astype(jnp.float32), rounded.astype(jnp.float32), ids, rows)
    assert float(value) == pytest.approx(want, rel=1e-4)
    assert (d_x.dtype, d_w.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(d_x.astype(jnp.float32), grads[0], 2e-2)
    assert_close(d_w, grads[1], 1e-2)


def test_extreme_logits_keep_everything_finite():
    """±1e4, all equal, one-hot and -inf-like rows: what the two-pass head survives."""
    hidden = np.array([[1e4, 0.0], [0.0, 0.0], [-1e4, 1e4], [1.0, 0.0]], np.float32)
    unembedding = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], np.float32)
    ids = jnp.asarray([[0, 1], [1, 2], [1, 0], [0, 0]], jnp.int32)
    rows = (np.ones(4), np.ones(4))
    (value, terms), grads = differentiated(hidden, unembedding, ids, rows)
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in (*terms, *grads))
    np.testing.assert_allclose(terms.entropy[:2], [0.0, np.log(3)], atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_tokens_that_are_not_valid_are_not_there(share):
    """The same as without their rows, and nothing of what they hold gets in."""
    hidden, unembedding, ids, rows = draw(8, 8 * CHUNKS * 2 + 5, 4, 9, 3)
    valid = np.random.default_rng(0).uniform(size=len(hidden)) < share
    (value, terms), (d_x, d_w) = differentiated(
        np.where(valid[:, None], hidden, np.nan), unembedding, ids, rows, valid=jnp.asarray(valid)
    )
    kept = (hidden[valid], unembedding, ids[valid], jax.tree.map(lambda row: row[valid], rows))
    want, grads = reference64(*kept)
    assert float(value) == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert_close(d_w, grads[1], 2e-5)
    assert_close(np.asarray(d_x)[valid], grads[0], 2e-5) if valid.any() else None
    assert not np.asarray(d_x)[~valid].any() and not np.asarray(terms.logp)[~valid].any()


def test_padding_of_the_last_chunk_never_reaches_the_caller():
    """A loss that is infinite in slope where a row holds nothing but padding's zeros."""
    hidden, unembedding, ids, _ = draw(5, 8 * CHUNKS + 3, 4, 9, 1)
    rows = (jnp.ones(len(hidden)),)
    steep = lambda terms, rows: jnp.sqrt(rows[0]) * terms.logp[:, 0]  # noqa: E731
    also = lambda terms, rows: jnp.sqrt(rows[0] * -terms.logp[:, 0] * rows[0])  # noqa: E731
    x, w = (jnp.asarray(a, jnp.float32) for a in (hidden, unembedding))
    for loss in (steep, also):
        total, terms, grads = fused_loss_and_grad(loss, x, w, ids, rows)
        assert np.isfinite(total) and all(np.isfinite(g).all() for g in grads)
        assert terms.logp.shape == (len(hidden), 1) and grads.hidden.shape == x.shape


def test_an_id_outside_the_vocabulary_gives_nan():
    hidden, unembedding, ids, rows = draw(6, 12, 4, 9, 2)
    (value, terms), _ = differentiated(hidden, unembedding, ids.at[3, 1].set(9), rows)
    assert np.isnan(terms.logp[3, 1]) and np.isnan(value)
    assert np.isfinite(np.delete(np.asarray(terms.logp), 3, 0)).all()


def test_no_tokens():
    nothing = jnp.zeros((0, 4)), jnp.ones((9, 4)), jnp.zeros((0, 2), jnp.int32), ()
    loss = lambda terms, rows: terms.logp[:, 0]  # noqa: E731
    total, terms, gradients = fused_loss_and_grad(loss, *nothing)
    assert total == 0 and terms.logp.shape == (0, 2)
    assert gradients.hidden.shape == (0, 4) and not gradients.unembedding.any()


def test_chunks_cover_the_tokens(monkeypatch):
    for tokens in (1, 7, 128, 129, 16384, 20001):
        size = chunk_tokens(tokens)
        assert size % 8 == 0 and CHUNKS * size >= tokens > CHUNKS * (size - 8)
    monkeypatch.setattr(tiles, "SINGLE_PASS_LEAST_TOKENS", 512)
    assert [chunk_tokens(n) for n in (1, 900, 1024, 2048, 16384)] == [8, 904, 512, 512, 1024]


def test_no_array_of_tokens_by_vocabulary(monkeypatch):
    """The compiled program's temporaries at V = 151,936: those of a chunk of tokens."""
    monkeypatch.setattr(tiles, "SINGLE_PASS_LEAST_TOKENS", 512)
    monkeypatch.setitem(tiles.SINGLE_PASS_COLUMNS, "CPU", 2048)
    tokens, width = 2048, 32
    shapes = ((tokens, width), (LARGE_VOCABULARY, width))
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    ids = jax.ShapeDtypeStruct((tokens, 21), jnp.int32)
    rows = (jax.ShapeDtypeStruct((tokens,), jnp.float32),) * 2

    def gradients(x, w, ids, rows):
        return jax.grad(
            lambda x, w: fused_loss(losses, x, w, ids, rows, stored_gradient=False)[0], (0, 1)
        )(x, w)

    compiled = jax.jit(gradients).lower(x, w, ids, rows).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    matrix = LARGE_VOCABULARY * width * 4
    # A chunk's logits, and the sum of the matrix's gradients.
    assert temporary <= 1.1 * chunk_tokens(tokens) * LARGE_VOCABULARY * 4 + matrix
    widest = rf"f32\[{tokens},{LARGE_VOCABULARY}\]"
    assert not re.search(widest, compiled.as_text())


def test_shapes_that_disagree_are_named():
    hidden, unembedding, ids, rows = draw(7, 6, 4, 9, 2)
    x, w = (jnp.asarray(a, jnp.float32) for a in (hidden, unembedding))
    unchecked = inspect.unwrap(fused_loss)  # without the tests' own shape check
    with pytest.raises(ValueError, match=r"widths D .* hidden \(6, 4\), unembedding \(9, 3\)"):
        unchecked(losses, x, w[:, :3], ids, rows)
    with pytest.raises(ValueError, match="temperature"):
        unchecked(losses, x, w, ids, rows, temperature=0.0)


def test_the_update_takes_the_single_pass_and_gets_the_same_gradient(tiny):
    """`make_update` with a token-local objective, and with the same one declared not to be."""
    from test_update import made_batch

    from dppo_jax.objectives import dppo_topk_kl
    from dppo_jax.optimizer import adamw
    from dppo_jax.update import init_state, make_update

    model, params = tiny
    optimizer, objective = adamw(learning_rate=1e-3), dppo_topk_kl()
    assert objective.token_local is not None
    results = []
    for one in (objective, objective._replace(token_local=None)):
        copied = jax.tree.map(jnp.array, params)
        update = make_update(model, one, optimizer, temperature=0.9, microbatches=2)
        results.append(update(init_state(copied, optimizer), made_batch()))
    (_, metrics), (_, two_pass) = results
    assert metrics.keys() == two_pass.keys()
    for name, metric in metrics.items():
        np.testing.assert_allclose(metric, two_pass[name], rtol=2e-5, atol=2e-6, err_msg=name)


def test_tokens_alone_are_what_the_objective_is_told():
    """`by_token` gives every field of a batch, as sequences of one token."""
    from test_update import made_batch

    from dppo_jax.scoring import by_token

    batch = replace(made_batch(), logp_old=made_batch().rollout.logp_rollout)
    rows = by_token(batch)
    tokens = batch.rollout.response_mask.size
    for leaf in jax.tree.leaves(rows):
        assert len(leaf) == tokens
    np.testing.assert_array_equal(rows.logp_old[:, 0], batch.logp_old.reshape(-1))
    np.testing.assert_array_equal(
        rows.rollout.finish_reason, np.repeat(batch.rollout.finish_reason, 5)
    )
