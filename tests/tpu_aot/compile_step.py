"""Run by test_step_aot.py: compiles one DPPO training step for TPUs that are not here.

python tests/tpu_aot/compile_step.py qwen3_8b v5p:4x4x4
"""

import dataclasses
import json
import re
import sys
import time

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dppo_jax.models.config import DecoderConfig
from dppo_jax.models.decoder import Model
from dppo_jax.models.hf_config import parse
from dppo_jax.objectives import dppo_binary_tv
from dppo_jax.optimizer import adamw
from dppo_jax.records import Batch, Objective, Rollout, TrainState
from dppo_jax.sharding import MeshConfig, batch_sharding, shardings_of
from dppo_jax.update import make_update

# What decides the program, of config.json of Qwen/Qwen3-8B-Base and Qwen/Qwen3-30B-A3B-Base.
SHARED = dict(
    vocab_size=151_936, num_attention_heads=32, head_dim=128, rms_norm_eps=1e-6,
    rope_theta=1_000_000, tie_word_embeddings=False,
)  # fmt: skip
CONFIGS = {
    "qwen3_8b": SHARED
    | dict(
        architectures=["Qwen3ForCausalLM"],
        hidden_size=4096,
        num_hidden_layers=36,
        num_key_value_heads=8,
        intermediate_size=12_288,
    ),
    "qwen3_30b_a3b": SHARED
    | dict(
        architectures=["Qwen3MoeForCausalLM"],
        hidden_size=2048,
        num_hidden_layers=48,
        num_key_value_heads=4,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    ),
}
# Of a microbatch, which has a prompt a chip: its samples, and tokens of prompt and of response.
SAMPLES, PROMPT, RESPONSE, STORED = 2, 512, 1536, 20


def config_of(name: str) -> DecoderConfig:
    return dataclasses.replace(parse(CONFIGS[name]), dtype="bfloat16", remat=True)


def mesh_of(topology: str, **sizes: int) -> Mesh:
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    return MeshConfig(**sizes).build(devices)


def compiled_step(
    config: DecoderConfig,
    mesh: Mesh,
    objective: Objective,
    microbatches: int = 1,
    prompt: int = PROMPT,
    response: int = RESPONSE,
):
    """The parameters' shapes, and the compiled update."""
    model, optimizer = Model(config), adamw(learning_rate=1e-6)
    whole, rows = NamedSharding(mesh, PartitionSpec()), batch_sharding(mesh)

    def array(shape, dtype, sharding=rows):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    params = jax.tree.map(
        lambda leaf, sharding: array(leaf.shape, leaf.dtype, sharding),
        model.abstract_params,
        shardings_of(model.logical_axes, mesh),
    )
    opt_state = optax.tree.map_params(
        optimizer,
        lambda leaf, param: array(leaf.shape, leaf.dtype, param.sharding),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda leaf: array(leaf.shape, leaf.dtype, whole),
    )
    prompts = mesh.size * microbatches
    asked, answered = (prompts, prompt), (prompts * SAMPLES, response)
    rollout = Rollout(
        prompt_tokens=array(asked, jnp.int32),
        prompt_mask=array(asked, jnp.bool_),
        response_tokens=array(answered, jnp.int32),
        response_mask=array(answered, jnp.bool_),
        logp_rollout=array(answered, jnp.float32),
        topk_ids=array((*answered, STORED), jnp.int32),
        topk_logp_rollout=array((*answered, STORED), jnp.float32),
        entropy_rollout=array(answered, jnp.float32),
        finish_reason=array(answered[:1], jnp.int32),
    )
    state = TrainState(params, opt_state, array((), jnp.int32, whole))
    batch = Batch(rollout, array(answered, jnp.float32))
    update = make_update(model, objective, optimizer, temperature=1.0, microbatches=microbatches)
    with jax.set_mesh(mesh):
        return params, update.lower(state, batch).compile()


def main(name: str, topology: str) -> dict:
    mesh, started = mesh_of(topology), time.monotonic()
    params, compiled = compiled_step(config_of(name), mesh, dppo_binary_tv())
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return {
        "model": name,
        "topology": topology,
        "chips": mesh.size,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "tokens_a_chip": PROMPT + SAMPLES * RESPONSE,
        "state_bytes_a_chip": memory.alias_size_in_bytes,
        "temporary_bytes_a_chip": memory.temp_size_in_bytes,
        "bytes_a_chip": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        "kernels": sorted(set(re.findall(r"splash_mha_[a-z]+|ragged_dot", text))),
        "compile_seconds": round(time.monotonic() - started, 1),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
