"""Run by test_step_aot.py: an update of two microbatches on four chips.

python tests/tpu_aot/compile_microbatches.py data dppo_binary_tv

Prints the parameters' bytes, and what a chip sends in all-reduces.
"""

import dataclasses
import json
import sys

import jax
from compile_step import compiled_step, config_of, mesh_of

from dppo_jax import objectives
from dppo_jax.kernels.chips import CHIPS
from dppo_jax.plan.hlo import costs_of

SMALL = dict(vocab_size=4096, width=512, layers=1, heads=4, kv_heads=4, mlp_width=1024)


def main(axis: str, method: str) -> dict:
    config = dataclasses.replace(config_of("qwen3_8b"), **SMALL)
    mesh = mesh_of("v5e:2x2", **{"fsdp": 1} | {axis: 4})
    objective = getattr(objectives, method)()
    params, step = compiled_step(config, mesh, objective, 2, prompt=64, response=192)
    return {
        "parameters": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)),
        "sent": costs_of(step.as_text(), CHIPS["v5e"])[0].collectives["all-reduce"].bytes,
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
