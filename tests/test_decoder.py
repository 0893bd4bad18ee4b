"""The decoder against a plain float64 form of it, and against a real model's recorded outputs."""

import dataclasses
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax.models.decoder import DecoderConfig, Model, full_forward, response_states
from dppo_jax.models.llama2c import read_llama2c
from dppo_jax.records import Prompts
from dppo_jax.sampling.generate import SamplingConfig, generate

LLAMA = DecoderConfig(
    vocab_size=31,
    width=12,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=6,  # heads * head_size is not the width
    mlp_width=20,
    norm_eps=1e-5,
)
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True, rope_theta=1e6, tied_embeddings=False)
QWEN2 = dataclasses.replace(LLAMA, qkv_bias=True, kv_heads=1)
ALL_HEADS = dataclasses.replace(LLAMA, kv_heads=4, layers=1)
STORIES = DecoderConfig(
    vocab_size=512,
    width=64,
    layers=5,
    heads=8,
    kv_heads=4,
    head_size=8,
    mlp_width=172,
    norm_eps=1e-5,
)


def plain_logits(config, params, tokens):
    """Logits [S, V] in float64 of one unpadded sequence: a loop over layers and heads."""
    c, p = config, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * scale

    def rope(x):  # [S, d]: the pair (i, i + d/2) turns by position / theta^(2i/d)
        half = c.head_size // 2
        turned = np.empty_like(x)
        for i in range(half):
            angle = np.arange(len(x)) / c.rope_theta ** (2 * i / c.head_size)
            a, b = x[:, i], x[:, i + half]
            turned[:, i] = a * np.cos(angle) - b * np.sin(angle)
            turned[:, i + half] = a * np.sin(angle) + b * np.cos(angle)
        return turned

    x = p["embedding"][tokens]
    future = np.triu(np.full((len(tokens), len(tokens)), -np.inf), 1)
    for layer in range(c.layers):
        w = {name: leaf[layer] for name, leaf in p["blocks"].items()}
        y = norm(x, w["attention_norm"])
        q, k, v = (y @ w[n] + (w[f"{n}_bias"] if c.qkv_bias else 0) for n in "qkv")
        heads = []
        for h in range(c.heads):
            own = slice(h * c.head_size, (h + 1) * c.head_size)
            group = h // (c.heads // c.kv_heads)
            shared = slice(group * c.head_size, (group + 1) * c.head_size)
            q_h, k_h = q[:, own], k[:, shared]
            if c.qk_norm:
                q_h, k_h = norm(q_h, w["q_norm"]), norm(k_h, w["k_norm"])
            scores = rope(q_h) @ rope(k_h).T / np.sqrt(c.head_size) + future
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, shared])
        x = x + np.concatenate(heads, -1) @ w["o"]
        y = norm(x, w["mlp_norm"])
        gate = y @ w["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["up"])) @ w["down"]
    head = p["embedding"] if c.tied_embeddings else p["unembedding"]
    return norm(x, p["final_norm"]) @ head.T


def scattered(config, seed=0):
    """Parameters that none of the initial values survive in, norms and biases included."""
    model = Model(config)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, jnp.float32),
        model.abstract_params,
    )
    return model, params


@jax.jit
def logits_of(decoder, tokens, mask):
    hidden, _ = full_forward(decoder, tokens, mask)
    return hidden @ decoder.unembedding_matrix().T


def left_padded(config, lengths, columns, seed=1):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(config.vocab_size, size=(len(lengths), columns))
    mask = np.arange(columns) >= columns - np.asarray(lengths)[:, None]
    return tokens, mask


@pytest.mark.parametrize(
    "config", [LLAMA, QWEN3, QWEN2, ALL_HEADS], ids=["llama", "qwen3", "qwen2", "all_heads"]
)
def test_forward_is_that_of_the_plain_form(config):
    model, params = scattered(config)
    tokens, mask = left_padded(config, [7, 4, 1], 7)
    ours = logits_of(model.bind(params), jnp.asarray(tokens), jnp.asarray(mask))
    for row in range(3):
        plain = plain_logits(config, params, tokens[row][mask[row]])
        np.testing.assert_allclose(ours[row][mask[row]], plain, rtol=2e-5, atol=2e-5)


def test_rows_of_padding_alone_stay_finite():
    """A filler row of a batch must not make NaN in a gradient that sums over rows."""
    model, params = scattered(LLAMA)
    tokens, mask = left_padded(LLAMA, [3, 0], 4)

    def loss(params):
        return jnp.sum(logits_of(model.bind(params), jnp.asarray(tokens), jnp.asarray(mask)) ** 2)

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))


@pytest.mark.parametrize("experts", [0, 4])
def test_responses_of_one_token_are_predicted_by_the_prompt(experts):
    """With one column for responses, none of which is fed."""
    mixture = dict(experts=experts, experts_per_token=2) if experts else {}
    model, params = scattered(dataclasses.replace(LLAMA, **mixture))
    tokens, mask = map(jnp.asarray, left_padded(LLAMA, [5, 2], 5))
    answers, here = jnp.zeros((4, 1), jnp.int32), jnp.asarray([[True], [True], [True], [False]])

    def states(params):
        return response_states(model.bind(params), tokens, mask, answers, here)[0]

    def last(params):
        hidden, _ = full_forward(model.bind(params), tokens, mask)
        return jnp.repeat(hidden[:, -1:], 2, axis=0)

    for ours, theirs in zip(
        jax.tree.leaves((states(params), jax.grad(lambda p: jnp.sum(states(p) ** 2))(params))),
        jax.tree.leaves((last(params), jax.grad(lambda p: jnp.sum(last(p) ** 2))(params))),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_remat_changes_no_gradient():
    tokens, mask = left_padded(QWEN3, [5, 2], 5)

    def gradient(remat):
        model, params = scattered(dataclasses.replace(QWEN3, remat=remat))

        def loss(params):
            hidden, _ = full_forward(model.bind(params), jnp.asarray(tokens), jnp.asarray(mask))
            return jnp.sum(jnp.sin(hidden) * mask[..., None])

        return jax.jit(jax.value_and_grad(loss))(params)

    for ours, theirs in zip(*map(jax.tree.leaves, (gradient(False), gradient(True))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_bfloat16_activations_keep_float32_parameters():
    """Close to float32, with outputs of the asked type and float32 gradients."""
    model, params = scattered(dataclasses.replace(LLAMA, dtype="bfloat16"))
    tokens, mask = (jnp.asarray(x) for x in left_padded(LLAMA, [6, 3], 6))

    def loss(params):
        hidden, _ = full_forward(model.bind(params), tokens, mask)
        assert hidden.dtype == jnp.bfloat16
        return jnp.sum(hidden.astype(jnp.float32))

    gradients = jax.jit(jax.grad(loss))(params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradients))
    ours = np.asarray(logits_of(model.bind(params), tokens, mask), np.float32)
    exact = np.asarray(logits_of(Model(LLAMA).bind(params), tokens, mask))
    real = np.asarray(mask)
    error = np.abs(ours - exact)[real].mean() / np.abs(exact)[real].mean()
    assert error < 0.03


def test_sharding_names_fit_the_parameters():
    for config in (LLAMA, QWEN3, QWEN2):
        model = Model(config)
        is_axes = lambda node: isinstance(node, tuple)  # noqa: E731
        axes = jax.tree.leaves_with_path(model.logical_axes, is_leaf=is_axes)
        params = jax.tree.leaves_with_path(model.abstract_params)
        assert [path for path, _ in axes] == [path for path, _ in params]
        assert all(
            len(names) == leaf.ndim for (_, names), (_, leaf) in zip(axes, params, strict=True)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kv_heads=3), "heads=4 is not a multiple of kv_heads=3"),
        (dict(head_size=5), "head_size=5 must be even"),
        (dict(dtype="float16"), "'float32' or 'bfloat16'"),
    ],
)
def test_sizes_that_make_no_decoder(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LLAMA, **change)


# ---- llama2.c's stories260K, whose outputs were recorded in float64 ---------------------------


@pytest.fixture(scope="module")
def stories(shared_data):
    folder = shared_data / "lm" / "stories260K"
    golden = json.loads(gzip.decompress((folder / "golden_greedy.json.gz").read_bytes()))
    params = jax.tree.map(jnp.asarray, read_llama2c(folder / "stories260K.bin", STORIES))
    return Model(STORIES), params, golden


def test_logits_of_a_real_model(stories):
    model, params, golden = stories
    tokens = jnp.asarray(golden["greedy_ids"])[None]
    logits = np.asarray(logits_of(model.bind(params), tokens, jnp.ones_like(tokens, bool)))[0]
    np.testing.assert_allclose(logits[0], golden["logits_after_bos_float64"], atol=3e-5)
    np.testing.assert_allclose(logits[-1], golden["logits_last_float64"], atol=3e-5)


def test_greedy_sampling_of_a_real_model(stories):
    """All 256 tokens of the recorded story, and their log-probabilities."""
    model, params, golden = stories
    begin = Prompts(jnp.array([[golden["bos"]]]), jnp.ones((1, 1), bool))
    settings = SamplingConfig(
        max_new_tokens=256, samples_per_prompt=1, temperature=0.0, top_k_capture=1
    )
    rollout = generate(model, params, begin, jax.random.key(0), settings=settings)
    assert rollout.response_tokens[0].tolist() == golden["greedy_ids"][1:]
    np.testing.assert_allclose(
        rollout.logp_rollout[0], golden["greedy_logprobs_float64"], atol=3e-5
    )


def llama2c_bytes(config, max_length=4, shared=True, seed=0):
    c = config
    rng = np.random.default_rng(seed)
    keys, queries = c.kv_heads * c.head_size, c.heads * c.head_size
    per_layer = 2 * c.width + 2 * c.width * (queries + keys) + 3 * c.width * c.mlp_width
    size = c.vocab_size * c.width + c.layers * per_layer + c.width + max_length * c.head_size
    size += 0 if shared else c.vocab_size * c.width
    vocab = c.vocab_size if shared else -c.vocab_size
    header = [c.width, c.mlp_width, c.layers, c.heads, c.kv_heads, vocab, max_length]
    return np.array(header, "<i4").tobytes() + rng.normal(size=size).astype("<f4").tobytes()


SQUARE = dataclasses.replace(LLAMA, width=24)


@pytest.mark.parametrize("shared", [True, False])
def test_a_file_is_read_to_its_last_number(tmp_path, shared):
    path, config = tmp_path / "m.bin", dataclasses.replace(SQUARE, tied_embeddings=shared)
    raw = llama2c_bytes(config, shared=shared)
    path.write_bytes(raw)
    params = read_llama2c(path, config)
    expected = Model(config).abstract_params
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, expected)
    if not shared:
        np.testing.assert_array_equal(
            params["unembedding"].ravel(), np.frombuffer(raw, "<f4")[-31 * 24 :]
        )
    path.write_bytes(raw[:-4])
    with pytest.raises(ValueError, match="is cut off"):
        read_llama2c(path, config)


@pytest.mark.parametrize(
    ("contents", "change", "message"),
    [
        (None, {}, "no such file"),
        (b"", {}, "too short"),
        (b"\0" * 27, {}, "too short"),
        (llama2c_bytes(SQUARE)[:400], {}, "is cut off"),
        (llama2c_bytes(SQUARE), dict(layers=3), "has layers=2, the recipe layers=3"),
        (llama2c_bytes(SQUARE), dict(vocab_size=32), "has vocab_size=31, the recipe vocab_size=32"),
        (llama2c_bytes(SQUARE), dict(tied_embeddings=False), "tied_embeddings=True"),
        (llama2c_bytes(SQUARE), dict(kv_heads=1), "kv_heads=2, the recipe kv_heads=1"),
        (b"\0" * 64, {}, "has width=0"),
        (b"PK\3\4" * 16, {}, "the recipe width=24"),
    ],
)  # fmt: skip
def test_files_that_are_not_this_model(tmp_path, contents, change, message):
    path = tmp_path / "m.bin"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(ValueError, match=message) as error:
        read_llama2c(path, dataclasses.replace(SQUARE, **change))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
