"""The weights that decoding reads: which are in panels, and that they draw the same tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwix import QArray

from dppo_jax.models.config import DecoderConfig
from dppo_jax.models.decoder import Model, full_forward
from dppo_jax.models.products import PANEL, Panels
from dppo_jax.rollout_policy import chooser, int8_weights
from dppo_jax.sampling import weights
from dppo_jax.sampling.engine import Engine, EngineConfig
from dppo_jax.sampling.requests import SamplingParams

WIDE = DecoderConfig(
    vocab_size=50, width=96, layers=2, heads=4, kv_heads=2, head_size=24, mlp_width=150
)
ENGINE = EngineConfig(slots=2, max_context=32, chunk=4, page_size=8, top_k_capture=3)


@pytest.fixture(scope="module")
def wide():
    model = Model(WIDE)
    return model, model.init(jax.random.key(0))


def kinds(weights) -> dict[str, type]:
    return {name: type(param[...]) for name, param in weights.layers[0].items()}


def test_small_wide_matrices_are_in_panels(wide, monkeypatch):
    model, params = wide
    found = kinds(weights.for_decoding(params, model))
    in_panels = {name for name, kind in found.items() if kind is Panels}
    assert in_panels == {"q", "o", "gate", "up", "down"}  # k and v have 48 columns
    assert WIDE.kv_heads * WIDE.head_size < PANEL
    monkeypatch.setattr(weights, "LARGEST", 96 * 96)
    weights.copied.clear_cache()
    smaller = kinds(weights.for_decoding(params, model))
    assert {name for name, kind in smaller.items() if kind is Panels} == {"q", "o"}
    weights.copied.clear_cache()


def test_int8_weights_stay_as_they_are(wide):
    model, params = wide
    choose = chooser(int8_weights(), remembers=False)
    int8, _ = choose((), params, jnp.int32(0), jax.random.key(1))
    found = kinds(weights.for_decoding(int8, model))
    assert found["q"] is QArray and Panels not in found.values()


def test_tokens_and_log_probabilities_are_those_of_the_whole_matrices(wide):
    model, params = wide
    prompt, greedy = [3, 1, 4, 1, 5], SamplingParams(max_new_tokens=12, temperature=0.0)
    [[drawn]] = Engine(model, ENGINE).generate(params, [prompt], greedy)
    ids = jnp.asarray([[*prompt, *drawn.tokens.tolist()]])
    hidden, _ = full_forward(model.bind(params), ids, jnp.ones_like(ids, bool))
    logits = np.asarray(model.bind(params).logits(hidden))[0, len(prompt) - 1 : -1]
    np.testing.assert_array_equal(drawn.tokens, logits.argmax(axis=1))
    np.testing.assert_allclose(drawn.logp, jax.nn.log_softmax(logits).max(axis=1), atol=1e-5)
