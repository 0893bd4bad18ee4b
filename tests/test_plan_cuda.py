"""Plans for GPUs by their own compiler, where JAX's CUDA plugin is; calls of libraries."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dppo_jax.kernels.chips import GPUS
from dppo_jax.plan import cuda, topology
from dppo_jax.plan.hlo import costs_of

REPOSITORY = Path(__file__).parent.parent
needs_compiler = pytest.mark.skipif(
    not cuda.installed(), reason="needs JAX's CUDA plugin: pip install 'dppo-jax[cuda13]'"
)

# A product of cuBLAS, [2, 8, 16] by [2, 32, 16], and attention over 64 columns with its gradient,
# as XLA writes them; each with room to work.
CALLS = """
ENTRY %main (a: bf16[2,8,16], b: bf16[2,32,16], q: bf16[3,64,4,8]) -> bf16[2,8,32] {
  %a = bf16[2,8,16]{2,1,0} parameter(0)
  %b = bf16[2,32,16]{2,1,0} parameter(1)
  %q = bf16[3,64,4,8]{3,2,1,0} parameter(2)
  %p = (bf16[2,8,32]{2,1,0}, s8[33554432]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["2"],"lhs_batch_dimensions":["0"]}}}
  %f = (bf16[3,4,64,8]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"dimensions": ["3", "4", "64", "64"]}}}
  %g = (bf16[3,4,64,8]{3,1,2,0}, u8[999]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"dimensions": ["3", "4", "64", "64"]}}}
  ROOT %out = bf16[2,8,32]{2,1,0} get-tuple-element(%p), index=0
}
"""  # noqa: E501


def test_what_libraries_multiply_and_their_room():
    total, _ = costs_of(CALLS, GPUS["h100"])
    scores = 3 * 4 * 64 * 64
    # Of scores and values; backward the scores again, and two products for each of theirs.
    assert total.flops == 2 * (2 * 8 * 32 * 16 + (2 + 5) * scores * 8)
    arrays = 2 * (8 * 16 + 32 * 16 + 8 * 32) + 2 * 4 * (3 * 64 * 4 * 8)
    assert total.bytes == 2 * arrays


@needs_compiler
@pytest.mark.parametrize("name", ["h100:1", "h100:8", "h200:16", "h100:12"])
def test_cards_of_every_node(name):
    """A node is a process; what fills no nodes is one."""
    asked = topology.parse(name)
    devices = asked.devices()
    nodes = {device.process_index for device in devices}
    assert (len(devices), len(nodes)) == (asked.chips, asked.chips // 8 if asked.chips > 12 else 1)
    assert {device.device_kind[:11] for device in devices} == {f"NVIDIA {name[:4].upper()}"}


@needs_compiler
def test_the_compilers_agree_on_the_work(tmp_path):
    """By the GPU's compiler as by the CPU's: operations, bytes sent, and arguments."""
    found = []
    hidden = tmp_path / "sitecustomize.py"
    hidden.write_text("from dppo_jax.plan import cuda\ncuda.installed = lambda: False\n")
    for path in (REPOSITORY, f"{tmp_path}:{REPOSITORY}"):
        done = subprocess.run(
            [sys.executable, "-m", "dppo_jax", "plan", "configs/recipes/arithmetic_cpu.gin"]
            + ["--topology", "h100:8", "--over", "configs/mesh/h100_8.gin", "--json"]
            + ["--gin.PROMPTS_PER_STEP=8", "--gin.decoder.DecoderConfig.layers=2"]
            + ["--gin.MAX_NEW_TOKENS=10"],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(path)},
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(done.stdout))
    own, estimated = found
    assert (own["estimated_memory"], estimated["estimated_memory"]) == (False, True)
    for name, program in own["programs"].items():
        other = estimated["programs"][name]
        assert program["arguments"] == other["arguments"]
        assert program["flops"] == pytest.approx(other["flops"], rel=0.05)
        assert program["sent"] == pytest.approx(other["sent"], rel=0.3)
