"""Rollouts in another precision than the trainer's: what is rounded, and what mismatch it makes."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwix import QArray, dequantize

from dppo_jax import rollout_policy as rp
from dppo_jax.models.decoder import DecoderConfig, Model
from dppo_jax.sampling.generate import SamplingConfig, generate
from dppo_jax.scoring import mismatch, score

SETTINGS = SamplingConfig(max_new_tokens=5, samples_per_prompt=3, top_k_capture=4)
EXPERTS = DecoderConfig(
    vocab_size=37, width=24, layers=2, heads=4, kv_heads=2, head_size=6, mlp_width=16,
    experts=4, experts_per_token=2,
)  # fmt: skip


def is_quantised(leaf):
    return isinstance(leaf, QArray)


def chosen(policy, params):
    return jax.jit(policy.choose)((), params, jnp.int32(0), jax.random.key(0))[0]


def floating(params):
    """The same parameters with every quantised one as the matrix that it stands for."""
    return jax.tree.map(
        lambda leaf: dequantize(leaf) if is_quantised(leaf) else leaf, params, is_leaf=is_quantised
    )


def test_int8_by_hand():
    """A scale for each output; symmetric; halves go to the even neighbour."""
    weight = jnp.array([[1.0, -2.0], [0.25, 0.5], [-0.5, 4.0]])
    out = chosen(rp.int8_weights(), {"blocks": {"up": weight, "mlp_norm": weight[0]}})
    up = out["blocks"]["up"]
    np.testing.assert_array_equal(out["blocks"]["mlp_norm"], weight[0])
    np.testing.assert_allclose(up.scale, [[1 / 127.5, 4 / 127.5]], rtol=1e-6)
    assert up.qvalue.dtype == jnp.int8 and up.zero_point is None
    np.testing.assert_array_equal(up.qvalue, [[127, -64], [32, 16], [-64, 127]])


@pytest.mark.parametrize("config", [None, EXPERTS], ids=["dense", "experts"])
def test_int8_rounds_the_layers_matrices_alone(config, tiny):
    model, params = tiny if config is None else (m := Model(config), m.init(jax.random.key(0)))
    rounded = chosen(rp.int8_weights(), params)
    for name, weight in params["blocks"].items():
        ours = rounded["blocks"][name]
        if name in ("q", "k", "v", "o", "gate", "up", "down"):
            assert ours.qvalue.dtype == jnp.int8 and ours.qvalue.shape == weight.shape
            assert ours.scale.shape == (*weight.shape[:-2], 1, weight.shape[-1])
            # half a step, and the largest is cut from 127.5 to 127
            assert (jnp.abs(dequantize(ours) - weight) <= 0.501 * ours.scale).all()
        else:
            np.testing.assert_array_equal(ours, weight)
    for name in set(params) - {"blocks"}:
        np.testing.assert_array_equal(rounded[name], params[name])


@functools.cache
def scored(model):
    return jax.jit(functools.partial(score, model, temperature=1.0))


def mean_mismatch(model, params, prompts, mu, settings=SETTINGS):
    rollout = generate(model, mu, prompts, jax.random.key(5), settings=settings)
    metrics = mismatch(scored(model)(params, rollout), rollout)
    return rollout, float(metrics["mismatch/logp_abs_mean"].sum / jnp.sum(rollout.response_mask))


def test_sampling_reads_what_the_integers_stand_for(tiny, prompts):
    """And the mismatch with the trainer grows as the precision falls."""
    model, params = tiny
    int8 = chosen(rp.int8_weights(), params)
    rollout, of_int8 = mean_mismatch(model, params, prompts, int8)
    plain, _ = mean_mismatch(model, params, prompts, floating(int8))
    np.testing.assert_array_equal(rollout.response_tokens, plain.response_tokens)
    np.testing.assert_allclose(rollout.logp_rollout, plain.logp_rollout, atol=1e-4)
    _, of_itself = mean_mismatch(model, params, prompts, params)
    _, of_bfloat16 = mean_mismatch(model, params, prompts, chosen(rp.bfloat16_weights(), params))
    assert of_itself < 1e-5 < 1e-4 < of_bfloat16 < of_int8 < 0.3


def test_experts_are_read_as_matrices_too(prompts):
    model = Model(EXPERTS)
    int8 = chosen(rp.int8_weights(), model.init(jax.random.key(0)))
    ours, plain = (
        generate(model, mu, prompts, jax.random.key(5), settings=SETTINGS)
        for mu in (int8, floating(int8))
    )
    np.testing.assert_array_equal(ours.response_tokens, plain.response_tokens)


def test_activations_of_another_precision(tiny, prompts):
    """The trainer's model in float32, the sampler's in bfloat16; the parameters are the same."""
    model, params = tiny
    settings = dataclasses.replace(SETTINGS, dtype="bfloat16")
    rollout, of_bfloat16 = mean_mismatch(model, params, prompts, params, settings)
    assert 1e-4 < of_bfloat16 < 0.3
    assert rollout.logp_rollout.dtype == jnp.float32


def test_what_int8_cannot_do(tiny):
    with pytest.raises(ValueError, match="make it the last of the chain"):
        rp.chained([rp.int8_weights(), rp.stale(1)])
    chain = rp.chained([rp.noisy_weights(0.0), rp.int8_weights()])
    state = chain.init(tiny[1])
    mu, _ = jax.eval_shape(chain.choose, state, tiny[1], jnp.int32(0), jax.random.key(0))
    assert is_quantised(mu["blocks"]["q"])
    with pytest.raises(ValueError, match="no layer's matrix"):
        rp.int8_weights().choose((), {"w": jnp.ones((2, 2))}, jnp.int32(0), jax.random.key(0))


def test_a_run_with_int8_rollouts(dppo, toy_recipe, tmp_path):
    recipe = tmp_path / "int8.gin"
    recipe.write_text(
        "from __gin__ import dynamic_registration\n"
        "from dppo_jax import rollout_policy\nfrom dppo_jax import train\n"
        f'include "{toy_recipe}"\nSTEPS = 1\n'
        "train.train.rollout_policy = @rollout_policy.int8_weights()\n"
        "train.train.exact_divergence_every = 1\n"
    )
    finished = dppo("train", recipe, "--workdir", tmp_path / "run")
    assert finished.status == 0, finished.err
    (row,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert 1e-6 < row["mismatch/logp_abs_mean"] < 0.05 and row["time/weight_sync"] > 0
    assert row["divergence/exact_tv_mean"] > 0
