"""The weights that decoding reads: which are in panels, and that they draw the same tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwix import QArray

from dppo_jax.kernels import panels
from dppo_jax.kernels.panels import Panels
from dppo_jax.models.config import DecoderConfig
from dppo_jax.models.decoder import Model, full_forward
from dppo_jax.records import Prompts
from dppo_jax.rollout_policy import chooser, int8_weights
from dppo_jax.sampling import weights
from dppo_jax.sampling.engine import Engine, EngineConfig
from dppo_jax.sampling.generate import SamplingConfig, generate
from dppo_jax.sampling.requests import SamplingParams

WIDE = DecoderConfig(
    vocab_size=128, width=128, layers=2, heads=4, kv_heads=2, head_size=24, mlp_width=150
)
ENGINE = EngineConfig(slots=2, max_context=32, chunk=4, page_size=8, top_k_capture=3)
MANY = panels.FEW + 1


@pytest.fixture(scope="module")
def wide():
    model = Model(WIDE)
    return model, model.init(jax.random.key(0))


def in_panels(made: weights.Weights, kind: type) -> set[str]:
    """The matrices of a layer that are panels, in one array or in a tuple."""
    layer = {name: param[...] for name, param in made.layers[0].items()}
    cut = {name: matrix for name, matrix in layer.items() if isinstance(matrix, Panels)}
    assert all(isinstance(matrix.parts, kind) for matrix in cut.values())
    return set(cut)


def test_panels_are_together_for_few_rows_and_apart_for_more(wide):
    model, params = wide
    few = weights.for_decoding(params, model, panels.FEW)
    assert in_panels(few, jax.Array) == {"o", "down"}  # q has 96 columns, gate and up 150
    assert few.unembedding.columns == 128 and not few.outside
    many = weights.for_decoding(params, model, MANY)
    assert in_panels(many, tuple) == {"q", "o", "gate", "up", "down"}  # k and v have 48 columns
    assert many.unembedding is None and "embedding" in many.outside


def test_a_vocabulary_that_is_no_panels_is_read_where_it_lies():
    config = dataclasses.replace(WIDE, vocab_size=100)
    model = Model(config)
    made = weights.for_decoding(model.init(jax.random.key(0)), model, 1)
    assert made.unembedding is None and "embedding" in made.outside


def test_int8_weights_stay_as_they_are(wide):
    model, params = wide
    choose = chooser(int8_weights(), remembers=False)
    int8, _ = choose((), params, jnp.int32(0), jax.random.key(1))
    made = weights.for_decoding(int8, model, 1)
    assert type(made.layers[0]["q"][...]) is QArray and not in_panels(made, object)


@pytest.mark.parametrize("slots", [2, MANY])
@pytest.mark.parametrize(
    "options", [{}, {"final_soft_cap": 5.0, "tied_embeddings": False}, {"vocab_size": 100}]
)
def test_tokens_and_log_probabilities_are_those_of_the_whole_matrices(slots, options):
    model = Model(dataclasses.replace(WIDE, **options))
    params, engine = model.init(jax.random.key(0)), dataclasses.replace(ENGINE, slots=slots)
    prompt, greedy = [3, 1, 4, 1, 5], SamplingParams(max_new_tokens=12, temperature=0.0)
    [[drawn]] = Engine(model, engine).generate(params, [prompt], greedy)
    ids = jnp.asarray([[*prompt, *drawn.tokens.tolist()]])
    hidden, _ = full_forward(model.bind(params), ids, jnp.ones_like(ids, bool))
    logits = np.asarray(model.bind(params).logits(hidden))[0, len(prompt) - 1 : -1]
    np.testing.assert_array_equal(drawn.tokens, logits.argmax(axis=1))
    np.testing.assert_allclose(drawn.logp, jax.nn.log_softmax(logits).max(axis=1), atol=1e-5)


def test_lockstep_sampling_draws_the_same_with_them(wide):
    model, params = wide
    ids = jax.random.randint(jax.random.key(1), (3, 4), 0, WIDE.vocab_size)
    asked, key = Prompts(ids, jnp.ones_like(ids, bool)), jax.random.key(2)
    settings = SamplingConfig(max_new_tokens=6, samples_per_prompt=2, top_k_capture=3)
    plain = generate(model, params, asked, key, settings=settings)
    made = weights.for_decoding(params, model, 6)
    assert made.unembedding is not None
    drawn = generate(model, params, asked, key, settings=settings, weights=made)
    np.testing.assert_array_equal(drawn.response_tokens, plain.response_tokens)
    np.testing.assert_allclose(drawn.logp_rollout, plain.logp_rollout, atol=1e-5)
