"""What the families' variants do, without PyTorch: recorded outputs, and our own forms agree."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import left_padded, numbered_params

from dppo_jax.models.config import DecoderConfig
from dppo_jax.models.decoder import Model, full_forward
from dppo_jax.models.hf_config import parse
from dppo_jax.models.rope import Llama3, Yarn, rotary_table
from dppo_jax.sampling.generate import SamplingConfig, generate
from dppo_jax.scoring import score

RECORDED = json.loads((Path(__file__).parent / "golden/families.json").read_text())
LLAMA = DecoderConfig(
    vocab_size=37, width=24, layers=2, heads=4, kv_heads=2, head_size=6, mlp_width=20
)
# Everything that attention can have, with windows shorter than prompts and responses.
GEMMA = dataclasses.replace(
    LLAMA,
    window=4,
    local_layers=(True, False),
    local_rope_theta=50.0,
    attention_soft_cap=2.0,
    final_soft_cap=3.0,
    attention_scalar=9.0,
    post_norms=True,
    unit_offset_norms=True,
    scaled_embeddings=True,
    qk_norm=True,
    activation="gelu_tanh",
)
EXPERTS = dataclasses.replace(
    LLAMA, window=3, qkv_bias=True, experts=5, experts_per_token=2, mlp_width=8
)


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is not None, reason="test_parity.py does more with PyTorch"
)
@pytest.mark.parametrize("family", [name for name in RECORDED if name != "transformers"])
def test_recorded_logits(family):
    recorded = RECORDED[family]
    model = Model(parse(recorded["config"]))
    tokens, mask = left_padded(model.config.vocab_size)

    @jax.jit
    def logits_of(params):
        decoder = model.bind(params)
        return decoder.logits(full_forward(decoder, jnp.asarray(tokens), jnp.asarray(mask))[0])

    logits = np.asarray(logits_of(numbered_params(model)))
    np.testing.assert_allclose(logits[:, -1, :8], recorded["last_logits"], atol=1e-4)
    for row, real, best in zip(logits, mask, recorded["best"], strict=True):
        assert row[real].argmax(-1).tolist() == best


@pytest.mark.parametrize("config", [GEMMA, EXPERTS], ids=["gemma", "experts"])
def test_sampler_scorer_and_whole_forward_agree(config, prompts):
    """Cache, shared prefix and plain causal attention: one policy, and one gradient."""
    model = Model(config)
    params = numbered_params(model)
    settings = SamplingConfig(
        max_new_tokens=9, samples_per_prompt=2, top_k_capture=3, end_ids=(3, 11)
    )
    rollout = generate(model, params, prompts, jax.random.key(1), settings=settings)
    mask = rollout.response_mask

    def scored(params):
        return score(model, params, rollout, temperature=1.0).logp

    def whole(params):
        decoder = model.bind(params)
        asked, real = (jnp.repeat(x, 2, axis=0) for x in (prompts.tokens, prompts.mask))
        tokens = jnp.concatenate([asked, rollout.response_tokens], axis=1)
        hidden, _ = full_forward(decoder, tokens, jnp.concatenate([real, mask], axis=1))
        logp = jax.nn.log_softmax(decoder.logits(hidden[:, asked.shape[1] - 1 : -1]))
        return jnp.take_along_axis(logp, rollout.response_tokens[..., None], axis=-1)[..., 0]

    def with_gradient(form):
        def loss(params):
            logp = jnp.where(mask, form(params), 0.0)
            return jnp.sum(jnp.sin(logp)), logp

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (_, ours), gradient = with_gradient(scored)
    (_, plain), expected = with_gradient(whole)
    np.testing.assert_allclose(ours, plain, atol=2e-5)
    np.testing.assert_allclose(ours, rollout.logp_rollout, atol=2e-5)
    for mine, theirs in zip(*map(jax.tree.leaves, (gradient, expected)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_rope_scalings_by_hand():
    """At the ends of their ramps both are plain rope and rope slowed by the factor."""
    plain, _ = (np.asarray(x)[1, 0] for x in rotary_table(2, 64, 1e4))
    llama, _ = (np.asarray(x)[1, 0] for x in rotary_table(2, 64, 1e4, Llama3(8.0, 1.0, 4.0, 128)))
    frequency = 1e4 ** (-np.arange(0, 64, 2) / 64)
    turns = 128 * frequency / (2 * np.pi)
    fast, slow = turns > 4, turns < 1
    assert fast.sum() > 3 and slow.sum() > 3
    np.testing.assert_allclose(llama[fast], plain[fast], atol=1e-6)
    np.testing.assert_allclose(llama[slow], np.cos(frequency[slow] / 8), atol=1e-6)
    cos, sin = (np.asarray(x)[1, 0] for x in rotary_table(2, 64, 1e4, Yarn(4.0, 128)))
    amplitude = 0.1 * np.log(4.0) + 1.0
    np.testing.assert_allclose(cos[0], amplitude * np.cos(1.0), atol=1e-6)
    np.testing.assert_allclose(sin[-1], amplitude * np.sin(frequency[-1] / 4), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(window=0), "window=0 must be at least 1"),
        (dict(local_layers=(True, False)), "local layers need a window"),
        (dict(window=2, local_layers=(True,)), "local_layers names 1 layers of layers=2"),
        (dict(final_soft_cap=0.0), "final_soft_cap=0.0 must be above 0"),
        (dict(remat_policy="all"), "remat_policy='all' is not in jax.checkpoint_policies"),
    ],
)
def test_settings_that_make_no_decoder(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LLAMA, **change)
