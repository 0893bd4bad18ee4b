"""Run by test_experts_aot.py: the experts of one layer, forward and backward, for TPUs not here.

python tests/tpu_aot/compile_experts.py v5p:2x2x2 ragged gathered
"""

import json
import re
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from dppo_jax.models.expert_parallel import expert_mlps_on_mesh
from dppo_jax.sharding import MeshConfig, spec_of

# Qwen/Qwen3-30B-A3B's layer, and tokens of a chip.
WIDTH, INNER, EXPERTS, EACH, TOKENS = 2048, 768, 128, 8, 4096


def loss(y, gates, chosen, gate, up, down, transport):
    out = expert_mlps_on_mesh(y, gates, chosen, gate, up, down, jax.nn.silu, transport=transport)
    return jnp.sum(out.astype(jnp.float32) ** 2)


def main(topology: str, *transports: str) -> list[dict]:
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    mesh = MeshConfig(fsdp=1, expert=-1).build(devices)
    tokens = TOKENS * len(devices)

    def array(shape, dtype, axes, view="compute"):
        sharding = NamedSharding(mesh, spec_of(axes, mesh, view))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    rows, into = ("tokens",), ("experts", "embed", "mlp")
    arguments = (
        array((tokens, WIDTH), jnp.bfloat16, rows),
        array((tokens, EACH), jnp.float32, rows),
        array((tokens, EACH), jnp.int32, rows),
        array((EXPERTS, WIDTH, INNER), jnp.float32, into, "parameters"),
        array((EXPERTS, WIDTH, INNER), jnp.float32, into, "parameters"),
        array((EXPERTS, INNER, WIDTH), jnp.float32, ("experts", "mlp", "embed"), "parameters"),
    )
    found = []
    with jax.set_mesh(mesh):
        for transport in transports:
            step = jax.grad(partial(loss, transport=transport), (0, 1, 3, 4, 5))
            started = time.monotonic()
            compiled = jax.jit(step).lower(*arguments).compile()
            text, memory = compiled.as_text(), compiled.memory_analysis()
            kinds = ("ragged-all-to-all", "all-gather", "all-reduce", "reduce-scatter")
            found.append(
                {
                    "topology": topology,
                    "chips": len(devices),
                    "transport": transport,
                    "argument_bytes": memory.argument_size_in_bytes,
                    "temporary_bytes": memory.temp_size_in_bytes,
                    "collectives": {
                        kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in kinds
                    },
                    "compile_seconds": round(time.monotonic() - started, 1),
                }
            )
    return found


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
