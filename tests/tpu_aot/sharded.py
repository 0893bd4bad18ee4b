"""Run by test_head_aot.py: the head on four v5e chips, compiled; prints what crosses them."""

import json
import re
import sys
from functools import partial
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding

from dppo_jax.sharding import MeshConfig, head_layout

sys.path.append(str(Path(__file__).parent.parent / "multidevice"))
from sharded_head import looped, single_pass, two_pass  # noqa: E402

TOKENS, WIDTH, VOCABULARY, COLUMNS = 4096, 512, 65536, 21  # the sampled token's and the top 20


def compiled(mesh, tokens, width, vocabulary, form):
    """A form's loss and both gradients on a mesh of a topology's devices."""
    with jax.set_mesh(mesh):
        layout = head_layout(tokens, vocabulary)

        def array(shape, dtype, spec):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

        x = array((tokens, width), "bfloat16", layout.rows)
        w = array((vocabulary, width), "bfloat16", layout.stored)
        ids = array((tokens, COLUMNS), "int32", layout.rows)
        rows = array((tokens,), "float32", layout.rows)
        step = jax.jit(jax.value_and_grad(partial(form, layout), (0, 1)))
        return step.trace(x, w, ids, rows).lower(lowering_platforms=("tpu",)).compile()


def main() -> list[dict]:
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = MeshConfig(data=1, fsdp=2, tensor=2).build(devices)
    found = []
    for form in (single_pass, two_pass):
        program = compiled(mesh, TOKENS, WIDTH, VOCABULARY, form)
        text = program.as_text()
        kinds = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all")
        found.append(
            {
                "form": form.__name__,
                "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
                "loops": text.count(" while("),
                "collectives": {
                    kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in kinds
                },
                "looped_gathers": len(re.findall(r" all-gather(?:-start)?\(", looped(text))),
                "whole_logits": bool(re.search(rf"\[\d+,{VOCABULARY}\]", text)),
            }
        )
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
