"""Compiles splash attention at the sizes of a Qwen3-8B layer, forward and backward, for chips."""

import json
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dppo_jax.kernels.plan import CHIPS
from dppo_jax.models.fused_attention import Columns, row_attention

COLUMNS = Columns(prompt=1024, samples=4, fed=1023)  # 2 prompts a chip
ROWS, HEADS, KEYS, SIZE = 2, 32, 8, 128


def loss(q, k, v, segments):
    out = row_attention("splash", q, k, v, segments, COLUMNS, scale=SIZE**-0.5)
    return jnp.sum(out.astype(jnp.float32))


for name in sys.argv[1:]:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[name].topology)
    mesh = jax.make_mesh((1,), ("chip",), axis_types=(AxisType.Auto,), devices=topology.devices[:1])
    shapes = [(ROWS, COLUMNS.total, heads, SIZE) for heads in (HEADS, KEYS, KEYS)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    arrays.append(jax.ShapeDtypeStruct((ROWS, COLUMNS.total), jnp.int32))
    here = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        program = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), in_shardings=(here,) * 4)
        compiled = program.trace(*arrays).lower(lowering_platforms=("tpu",)).compile()
    scores = ROWS * HEADS * COLUMNS.total**2 * 4
    print(
        json.dumps(
            {
                "chip": name,
                "kernels": compiled.as_text().count("tpu_custom_call"),
                "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
                "of_scores": compiled.memory_analysis().temp_size_in_bytes / scores,
            }
        )
    )
