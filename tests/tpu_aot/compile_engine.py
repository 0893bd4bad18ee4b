"""Run by test_engine_aot.py: compiles the rollout engine's programs for TPUs that are not here.

`gathered` is the largest array that a step gathers over the mesh, in elements. `step_bytes` is what
the compiled text says of one step of the loop, in which nobody has asked for
filters or penalties. The kernel counts every page of the pool once, and writing tokens to the pool
counts as the pool twice although it is done in place.

python tests/tpu_aot/compile_engine.py v5e:4x4 8 36 151936 decode prefill

The numbers: chips that share a copy of the weights, layers, vocabulary.
"""

import dataclasses
import json
import math
import re
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from compile_step import CONFIGS
from jax.experimental import topologies
from jax.sharding import NamedSharding

from dppo_jax.kernels.chips import CHIPS
from dppo_jax.models.decoder import Model
from dppo_jax.models.hf_config import parse
from dppo_jax.plan.hlo import costs_of
from dppo_jax.sampling import engine_programs
from dppo_jax.sampling.decode_forms import why_not_ragged
from dppo_jax.sampling.engine_config import EngineConfig
from dppo_jax.sampling.engine_inputs import SlotRows, empty_calls, reads_of, shape_of
from dppo_jax.sampling.engine_programs import Programs
from dppo_jax.sampling.paged_cache import RAGGED, RaggedPages, page_bytes
from dppo_jax.sharding import MeshConfig, axes_of, shardings_of, spec_of

sys.path.append(str(Path(__file__).parent.parent / "multidevice"))
from sharded_sampler import gathered, looped  # noqa: E402

BRANCHES = r"branch_computations=\{[^}]*?(%?[\w.\-]+)\}"
SLOTS, CONTEXT, PAGE = 128, 2048, 32  # slots that share a copy of the weights


def main(topology: str, tensor: int, layers: int, vocabulary: int, names: list[str]) -> dict:
    config = parse(CONFIGS["qwen3_8b"])
    config = dataclasses.replace(config, dtype="bfloat16", layers=layers, vocab_size=vocabulary)
    mesh = MeshConfig(data=-1, fsdp=1, tensor=tensor).build(
        topologies.get_topology_desc(topology, platform="tpu").devices
    )
    shards = math.prod(mesh.shape[axis] for axis in axes_of("queries", mesh, "decode"))
    c = EngineConfig(
        slots=SLOTS * shards,
        max_context=CONTEXT,
        page_size=PAGE,
        pages=SLOTS * shards * CONTEXT // PAGE // 2,  # half of what the slots could fill
        prefill_buckets=(512, CONTEXT),
        prefill_tokens=2048 * shards,
        prefix_cache=False,
    )
    assert why_not_ragged(config, jnp.dtype("bfloat16"), tensor) is None
    shape, model = shape_of(c, config, shards), Model(config)

    def array(shape, dtype, *axes):
        sharding = NamedSharding(mesh, spec_of(axes, mesh, "decode"))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def given(leaf):
        return array(leaf.shape, leaf.dtype)

    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=sharding),
        model.abstract_params,
        shardings_of(model.logical_axes, mesh),
    )
    kv = (shards * shape.pages, PAGE, 2 * config.kv_heads, config.head_size)
    pages = [RaggedPages(array(kv, jnp.bfloat16, *RAGGED))] * layers
    hidden = array((c.slots, config.width), jnp.bfloat16, "tokens", "width")
    slots = SlotRows(c.slots, c.stop_ids, c.logit_biases).slots(
        [], c, shape, reads_of(c, config, shape, ragged=True)
    )
    programs = Programs(c.chunk, CONTEXT, c.top_k_capture, False, "model", ragged=True)
    calls = list(empty_calls(c, shape))
    found = {"topology": topology, "chips": mesh.size, "layers": layers, "slots": c.slots}
    programs_of = {
        "decode": lambda: engine_programs.decode_chunk.lower(
            params, pages, hidden, jax.tree.map(given, slots), model=model, programs=programs
        ),
        "prefill": lambda: engine_programs.prefill.lower(
            params,
            pages,
            **jax.tree.map(given, calls[1].arrays),
            model=model,
            max_context=CONTEXT,
            cache_dtype="model",
            record_experts=False,
        ),
    }
    chip = CHIPS[topology.split(":")[0]]
    for name in names:
        began = time.monotonic()
        with jax.set_mesh(mesh):
            compiled = programs_of[name]().compile()
        memory = compiled.memory_analysis()
        # The last branch of a condition is taken where it holds: that all rows are plain.
        text = re.sub(BRANCHES, r"branch_computations={\1}", compiled.as_text())
        # The loop over tokens is the one whose trips depend on data: a trip more is a step more.
        one, two = (costs_of(text, chip, unknown_trips=trips)[0] for trips in (1, 2))
        found[name] = {
            "bytes_a_chip": memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes,
            "temporary_bytes_a_chip": memory.temp_size_in_bytes,
            "step_bytes": two.bytes - one.bytes,
            "gathered": max(map(math.prod, gathered(looped(compiled.as_text()))), default=0),
            "waits": "all-reduce" in looped(compiled.as_text()),  # in a step, for other chips
            "kernels": text.count('custom_call_target="tpu_custom_call"'),
            "seconds": round(time.monotonic() - began, 1),
        }
    # The embedding is untied: a step looks up a row for each slot and reads no more of it.
    read = sum(leaf.size for leaf in jax.tree.leaves(params)) - params["embedding"].size
    weights = 2 * read // tensor
    cache = page_bytes(config, "model", PAGE) * shape.pages // tensor  # every page once
    found["floor"] = {"weights": weights, "cache": cache}
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5:])))
