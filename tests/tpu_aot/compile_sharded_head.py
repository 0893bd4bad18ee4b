"""Run by test_head_aot.py: the head with its vocabulary over the chips of a slice, compiled.

Prints a line of JSON for each shape and form: the memory that a device needs beside arguments and
results, as a share of all of its tokens' float32 logits over the whole vocabulary.
"""

import json
import sys
from functools import partial

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding

from dppo_jax.kernels.head import fused_loss, head
from dppo_jax.kernels.plan import SHAPES
from dppo_jax.kernels.single_pass import TokenTerms
from dppo_jax.sharding import MeshConfig, head_layout

COLUMNS = 21  # the sampled token and the top 20


def losses(terms, rows):
    return -rows * terms.logp[:, 0] + 0.1 * terms.entropy


def single_pass(layout, x, w, ids, rows):
    return fused_loss(losses, x, w, ids, rows, layout=layout, stored_gradient=False)[0]


def two_pass(layout, x, w, ids, rows):
    out = head(x, w, ids, layout=layout, stored_gradient=False)
    return losses(TokenTerms(out.logit_at - out.lse[:, None], out.entropy), rows).sum()


def main(topology: str):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = MeshConfig(data=1, fsdp=1, tensor=len(devices)).build(devices)
    for tokens, width, vocabulary in SHAPES:
        with jax.set_mesh(mesh):
            layout = head_layout()

            def array(shape, dtype, spec):
                return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

            x = array((tokens, width), "bfloat16", layout.rows)
            w = array((vocabulary, width), "bfloat16", layout.stored)
            ids = array((tokens, COLUMNS), "int32", layout.rows)
            rows = array((tokens,), "float32", layout.rows)
            for form in (single_pass, two_pass):
                step = jax.jit(jax.value_and_grad(partial(form, layout), (0, 1)))
                traced = step.trace(x, w, ids, rows)
                compiled = traced.lower(lowering_platforms=("tpu",)).compile()
                temporary = compiled.memory_analysis().temp_size_in_bytes
                found = dict(
                    topology=topology, devices=len(devices), form=form.__name__,
                    tokens=tokens, width=width, vocabulary=vocabulary,
                    temporary_share=temporary / (4 * tokens * vocabulary),
                )  # fmt: skip
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
