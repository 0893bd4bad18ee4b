"""Run by test_sharded_experts.py with eight CPU devices: experts with and without a mesh."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np

from dppo_jax.models.config import DecoderConfig
from dppo_jax.models.decoder import Model
from dppo_jax.records import Prompts
from dppo_jax.sampling.generate import SamplingConfig, generate
from dppo_jax.scoring import score
from dppo_jax.sharding import MeshConfig, shardings_of

CONFIG = DecoderConfig(
    vocab_size=16, width=16, layers=1, heads=4, kv_heads=2, head_size=4, mlp_width=12,
    experts=6, experts_per_token=2, normalised_gates=True,
)  # fmt: skip


def main() -> dict:
    model = Model(CONFIG)
    params = jax.tree.map(lambda leaf: 2 * leaf, jax.jit(model.init)(jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (8, 3), 0, 16)
    prompts = Prompts(tokens, jnp.ones_like(tokens, bool))
    settings = SamplingConfig(max_new_tokens=4, samples_per_prompt=2, top_k_capture=3)
    key = jax.random.key(2)
    rollout = generate(model, params, prompts, key, settings=settings)

    def loss(params, rollout):
        return jnp.sum(jnp.sin(score(model, params, rollout, temperature=1.0).logp))

    alone = jax.jit(jax.value_and_grad(loss))(params, rollout)
    mesh = MeshConfig(data=1, fsdp=4, tensor=2).build()
    with jax.set_mesh(mesh):
        split = jax.device_put(params, shardings_of(model.logical_axes, mesh))
        again = generate(model, split, prompts, key, settings=settings)
        program = jax.jit(jax.value_and_grad(loss)).lower(split, rollout).compile()
        together = program(split, rollout)
    differences = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), alone, together
    )
    sorts = re.findall(r"= \(?s32\[(\d+)\][^=]*\bsort\(", program.as_text())
    return {
        "difference": max(jax.tree.leaves(differences)),
        "largest": max(float(np.abs(np.asarray(x)).max()) for x in jax.tree.leaves(alone)),
        "same_tokens": bool((again.response_tokens == rollout.response_tokens).all()),
        "sorted": sorted({int(length) for length in sorts}),
        "tokens": 8 * 3 + 16 * 3,  # prompts, and what responses feed
        "experts_stored": split["blocks"]["gate"].addressable_shards[0].data.size
        / split["blocks"]["gate"].size,
    }


if __name__ == "__main__":
    print(json.dumps(main()))
