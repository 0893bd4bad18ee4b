"""Run by test_flags_aot.py: FSDP's gathers compiled for each TPU under its platform's settings.

Prints a line for each that compiled. The compiler reads its settings once, and ends the process at
one that it does not take: a child for each.
"""

import os
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dppo_jax import platform_flags

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2",
              "7x": "tpu7x:2x2x1"}  # fmt: skip


def compile_for(platform: str) -> None:
    found = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[platform])
    mesh = Mesh(found.devices, ("fsdp",))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    layers = NamedSharding(mesh, PartitionSpec(None, "fsdp"))

    def loss(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()

    weights = jax.ShapeDtypeStruct((2, 256, 256), "bfloat16", sharding=layers)
    x = jax.ShapeDtypeStruct((256, 256), "bfloat16", sharding=rows)
    step = jax.jit(jax.grad(loss), out_shardings=layers).trace(weights, x)
    text = step.lower(lowering_platforms=("tpu",)).compile().as_text()
    assert "all-gather" in text
    print(platform, flush=True)


def main(*more: str) -> None:
    for platform in TOPOLOGIES:
        if child := os.fork():
            os.waitpid(child, 0)
            continue
        platform_flags.apply(platform, os.environ)
        os.environ["LIBTPU_INIT_ARGS"] += "".join(f" --{flag}" for flag in more)
        try:
            compile_for(platform)
        finally:
            os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
