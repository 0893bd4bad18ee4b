"""Run by test_sharded_engine.py in a process of eight CPU devices: both samplers on meshes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from dppo_jax.models.decoder import DecoderConfig, Model
from dppo_jax.records import Prompts
from dppo_jax.sampling.engine import Engine, EngineConfig
from dppo_jax.sampling.engine_programs import decode_chunk
from dppo_jax.sampling.generate import SamplingConfig, generate
from dppo_jax.sampling.requests import SamplingParams
from dppo_jax.sampling.weights import for_decoding
from dppo_jax.sharding import MeshConfig, batch_sharding, shardings_of

MODEL = DecoderConfig(
    vocab_size=16, width=16, layers=2, heads=4, kv_heads=2, head_size=4, mlp_width=24, qk_norm=True
)
CONFIG = EngineConfig(
    slots=8,
    max_context=16,
    chunk=4,
    page_size=4,
    prefill_buckets=(16,),
    prefill_tokens=128,
    top_k_capture=3,
    samples=2,
    shared_tokens=8,
)
MESHES = {
    "fsdp 2 x sequence 2 x tensor 2": MeshConfig(fsdp=2, sequence=2, tensor=2),
    "data 2 x fsdp 2 x tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
    "data 8": MeshConfig(data=8, fsdp=1),
}
START = [1, 2, 3, 4, 5, 6, 7, 8]
PROMPTS = [START, [*START, 9], [3], [2, 1], [*START, 1, 2], [7, 7, 7, 7, 7], [4] * 6, [11]]
SAMPLING = [
    SamplingParams(max_new_tokens=5 + i % 2, n=1 + i % 3, seed=i, stop_ids=(15,)) for i in range(8)
]


def waits(program, *args, **kwargs) -> bool:
    """Whether a device waits for others but to give the results."""
    return "all-reduce" in program.lower(*args, **kwargs).compile().as_text()


def engine_waits(engine: Engine, params) -> bool:
    device = engine._device
    slots = device._rows.slots([], CONFIG, device.shape, device._reads)
    given = params, device._pages, device._hidden, slots
    options = dict(model=device.model, programs=device._programs, weights=device._weights)
    with jax.set_mesh(engine.mesh):
        return waits(decode_chunk, *given, **options)


def lockstep(model: Model, rows: int = 8) -> dict:
    """`generate` on one device, and on eight that have the parameters each."""
    params = parameters(model)
    tokens = jnp.asarray([START[i:] + [0] * i for i in range(rows)])[:, ::-1]
    prompts, key = Prompts(tokens, tokens > 0), jax.random.key(1)
    settings = SamplingConfig(
        max_new_tokens=12, samples_per_prompt=2, top_k_capture=3, end_ids=(2, 5, 9, 15)
    )
    expected = generate(model, params, prompts, key, settings=settings)
    mesh = MESHES["data 8"].build()
    with jax.set_mesh(mesh):
        params = jax.device_put(params, shardings_of(model.logical_axes, mesh))
        prompts = jax.device_put(prompts, batch_sharding(mesh) if rows == 8 else None)
        weights = for_decoding(params, model, 2 * rows)
        given = model, params, prompts, key
        found = generate(*given, settings=settings, weights=weights)
        waiting = waits(generate, *given, settings=settings, weights=weights)
    lengths = np.asarray(expected.response_mask).sum(axis=1).reshape(rows, -1).max(axis=1)
    memories = [
        len({shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards})
        for leaf in jax.tree.leaves(weights)
    ]
    return {
        "same_tokens": np.array_equal(found.response_tokens, expected.response_tokens),
        "same_ends": np.array_equal(found.finish_reason, expected.finish_reason),
        "logp_difference": float(np.abs(found.logp_rollout - expected.logp_rollout).max()),
        "lengths": sorted(set(lengths.tolist())),
        "waits": waiting,
        "memories": memories,
        "panels": weights.unembedding is not None,
    }


def parameters(model: Model):
    return jax.tree.map(lambda leaf: leaf * 1.6, jax.jit(model.init)(jax.random.key(0)))


def main() -> dict:
    model = Model(MODEL)
    params = parameters(model)
    engine = Engine(model, CONFIG)
    expected = engine.generate(params, PROMPTS, SAMPLING)
    wide = Model(dataclasses.replace(MODEL, vocab_size=128, mlp_width=128))
    found: dict = {"lockstep": lockstep(model), "panels": lockstep(wide)}
    found["uneven"] = lockstep(wide, rows=3)  # eight devices do not divide them
    for name, mesh_config in MESHES.items():
        mesh = mesh_config.build()
        placed = jax.device_put(params, shardings_of(model.logical_axes, mesh))
        engine = Engine(model, CONFIG, mesh)
        first = engine.generate(placed, PROMPTS, SAMPLING)
        again = engine.generate(placed, PROMPTS, SAMPLING)  # with a prefix of every prompt known
        compiled = engine.stats.compilations
        engine.generate(placed, PROMPTS, SAMPLING)
        tokens, logp = [], []
        for ours, theirs, others in zip(expected, first, again, strict=True):
            for one, two, three in zip(ours, theirs, others, strict=True):
                tokens.append(one.tokens.tolist() == two.tokens.tolist() == three.tokens.tolist())
                if tokens[-1]:
                    logp.append(float(np.abs(one.logp - two.logp).max()))
        keys = engine._device._pages[0].k
        found[name] = {
            "same_tokens": tokens,
            "logp_difference": max(logp),
            "part_of_the_pages": keys.addressable_shards[0].data.size / keys.size,
            "compiled_again": engine.stats.compilations - compiled,
            "cached_tokens": engine.stats.cached_tokens,
            "held": [shard.pages.held for shard in engine._scheduler.shards],
            "waits": engine_waits(engine, placed),
        }
    try:
        Engine(model, CONFIG, MeshConfig(data=1, fsdp=1, tensor=8).build())
        found["refused"] = ""
    except ValueError as error:
        found["refused"] = str(error)
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
