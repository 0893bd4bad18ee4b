"""NVIDIA GPUs that are not here, for XLA's own compiler of them, which JAX's CUDA plugin brings.

It wants a card's data as text and neither a card nor a driver (jaxlib 0.10.2). What it measures on
a card otherwise is left at its defaults: cuBLAS takes every product, as Triton's cannot be chosen
unmeasured (some of this package's had no tiles), and cuDNN its first algorithm.
"""

import importlib.util
from collections.abc import MutableMapping, Sequence
from typing import Any

from dppo_jax import platform_flags

# JAX asks cuDNN for its version before it makes a program of its attention.
_PACKAGES = ("jax_plugins.xla_cuda13", "nvidia.cu13", "nvidia.cudnn")
PLUGIN = "jax-cuda13-pjrt"
_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
# NVIDIA's data sheets and CUDA's table of compute capability 9.0; bytes, bytes a second.
_CARDS = {
    "h100": ("NVIDIA H100 80GB HBM3", 84_942_979_072, 3_352_320_000_000),
    "h200": ("NVIDIA H200", 151_397_597_184, 4_800_000_000_000),
}
_HOPPER = """
gpu_device_info {{
  name: "{name}"
  device_memory_size: {memory}
  memory_bandwidth: {bandwidth}
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_interconnect_info {{ active_links: 18 }}
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""


def installed() -> bool:
    """Whether the compiler is here: pip install 'dppo-jax[cuda13]'."""
    return all(map(_found, _PACKAGES))


def _found(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of what it lies in
        return False


def set_flags(environment: MutableMapping[str, str]) -> None:
    """Those of a run on GPUs, and that nothing be measured."""
    environment["XLA_FLAGS"] = _FLAGS
    platform_flags.apply("gpu", environment)


def devices(kind: str, cards: int, of_a_node: int) -> Sequence[Any]:
    """So many of a kind in nodes; in one, where they fill none."""
    from jax.experimental import topologies

    name, memory, bandwidth = _CARDS[kind]
    target = _HOPPER.format(name=name, memory=memory, bandwidth=bandwidth)
    nodes = cards // of_a_node if cards % of_a_node == 0 else 1
    shape = f"1x{nodes}x{cards // nodes}"
    return topologies.get_topology_desc(
        platform="cuda", target_config=target, topology=shape
    ).devices
