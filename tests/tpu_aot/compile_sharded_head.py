"""Run by test_head_aot.py: the head with its vocabulary over the chips of a slice, compiled.

Prints a line of JSON for each shape and form: the memory that a device needs beside arguments and
results, as a share of all of its tokens' float32 logits over the whole vocabulary.
"""

import json
import sys

from jax.experimental import topologies
from sharded import compiled

from dppo_jax.kernels.head import fused_loss, head
from dppo_jax.kernels.plan import SHAPES
from dppo_jax.kernels.single_pass import TokenTerms
from dppo_jax.sharding import MeshConfig


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
        for form in (single_pass, two_pass):
            program = compiled(mesh, tokens, width, vocabulary, form)
            temporary = program.memory_analysis().temp_size_in_bytes
            found = dict(
                topology=topology, devices=len(devices), form=form.__name__,
                tokens=tokens, width=width, vocabulary=vocabulary,
                temporary_share=temporary / (4 * tokens * vocabulary),
            )  # fmt: skip
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
