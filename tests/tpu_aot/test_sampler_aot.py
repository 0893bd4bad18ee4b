"""The streamed sampler's head and the exact divergences through libtpu's compiler: do they fit?"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from dppo_jax.kernels.plan import ENVIRONMENT

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]

# libtpu reads its environment when JAX starts: a process of its own.
PROGRAM = """
import json, sys
import jax
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from dppo_jax.kernels.divergences import Policy, divergences
from dppo_jax.kernels.plan import CHIPS
from dppo_jax.kernels.filters import Filters
from dppo_jax.kernels.sampler import sample

def sampler(x, w, key, **options):
    key = jax.random.wrap_key_data(key)
    return sample(x, w, key, temperature=0.7, top_k_capture=20, **options)

def replayed(x, w, key):
    return sampler(x, w, key, filters=Filters(top_p=0.9), replay=True)

def exact(x, w, y, v):
    return divergences(Policy(x, w), Policy(y, v))

chip, tokens, batch, width, vocabulary = sys.argv[1], *map(int, sys.argv[2:])
devices = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip].topology).devices
mesh = jax.make_mesh((1,), ("chip",), axis_types=(AxisType.Auto,), devices=devices[:1])
here = NamedSharding(mesh, PartitionSpec())
def array(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=here)
matrix = array(vocabulary, width)
programs = {
    "sampler": (sampler, (array(batch, width), matrix, array(2, dtype="uint32"))),
    "replayed": (replayed, (array(batch, width), matrix, array(2, dtype="uint32"))),
    "exact": (exact, (array(tokens, width), matrix) * 2),
}
with jax.set_mesh(mesh):
    for name, (program, arguments) in programs.items():
        traced = jax.jit(program).trace(*arguments)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
        print(json.dumps({
            "name": name,
            "streamed": "cond[" in str(traced.jaxpr),
            "temporary": compiled.memory_analysis().temp_size_in_bytes,
        }))
"""


@pytest.mark.usefixtures("least_effort")
def test_neither_holds_the_logits():
    """v5e: 256 rows of the sampler, 8192 tokens of the divergences, Qwen3-0.6B's matrix."""
    tokens, batch, width, vocabulary = 8192, 256, 1024, 151936
    sizes = map(str, (tokens, batch, width, vocabulary))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "v5e", *sizes],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    sampler, replayed, exact = rows
    print(*rows, sep="\n")
    for form in (sampler, replayed):
        assert form["streamed"], "the form is not chosen for a TPU"
        assert form["temporary"] < 0.5 * batch * vocabulary * 4
    assert exact["temporary"] < 0.1 * tokens * vocabulary * 4
