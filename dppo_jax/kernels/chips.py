"""What is known of each accelerator, and the environment in which libtpu compiles without one.

Imports no JAX: the environment must be set before it is imported.
"""

import re
from typing import NamedTuple

GIB = 2**30


class Node(NamedTuple):
    """Devices that the links of one join, and a device's share of the network between nodes."""

    devices: int
    network_bytes: float  # a second, that a device sends


class Chip(NamedTuple):
    """A topology of the generation, and the peaks and the memory of one JAX device in it."""

    topology: str
    bf16_flops: float  # a second
    memory_bytes: float  # a second
    hbm_bytes: float  # that a program may use
    link_bytes: float  # a second, what a device sends to others while it receives as much
    # The tile of a bfloat16 matrix that XLA multiplies, where arguments come in another.
    matrix_tile: tuple[tuple[int, int], ...] | None = None


# Peaks of TPUs are those of `get_tpu_info` in jax.experimental.pallas.tpu (0.10.2); memory is what
# libtpu 0.0.42.1 says is available when a program asks for too much; links are half of the
# bidirectional bandwidth on Google's pages of each generation. As libtpu lists devices for these
# topologies, one is one of two cores of v4 and 7x, and both of v5p.
CHIPS = {
    "v4": Chip("v4:2x2x1", 137.5e12, 0.615e12, 15.25 * GIB, 75e9),
    "v5e": Chip("v5e:2x2", 197e12, 0.82e12, 15.75 * GIB, 200e9),
    "v5p": Chip("v5p:2x2x1", 459e12, 2.46e12, 95.74 * GIB, 600e9),
    "v6e": Chip("v6e:2x2", 920e12, 1.64e12, 31.25 * GIB, 400e9),
    "7x": Chip("tpu7x:2x2x1", 1155e12, 3.7e12, 94.75 * GIB, 300e9, ((16, 128), (2, 1))),
}
# NVIDIA's data sheets: dense bfloat16, SXM. JAX takes 0.75 of a card's memory unless told; XLA's
# allocator with XLA_PYTHON_CLIENT_MEM_FRACTION=0.92, as the launch flags set it, is what counts
# here. Links are NVLink's in one direction. Between nodes: one adapter of 400 Gb/s a card, as in
# NVIDIA's DGX H100 and DGX H200.
MEMORY_FRACTION = 0.92
GPUS = {
    "h100": Chip("", 989e12, 3.35e12, MEMORY_FRACTION * 80e9, 450e9),
    "h200": Chip("", 989e12, 4.8e12, MEMORY_FRACTION * 141e9, 450e9),
}
GPU_NODE = Node(8, 50e9)
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "0",  # a program from the cache hides that memory ran out
    "XLA_FLAGS": "",  # those of the process that asks are for its own backend
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip to fight over, so no lock file is needed
    "TPU_SKIP_MDS_QUERY": "1",  # or libtpu asks a metadata server that is not there
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


def bytes_asked_for(message: str) -> float | None:
    """Bytes a program needs, of libtpu's words when memory has run out; None if it has not."""
    if "memory" not in message.lower():
        return None
    found = re.search(r"Used ([\d.]+)([KMGT]?) of", message)
    found = found or re.search(r"total memory required[^(]*\(([\d.]+)([KMGT]?)\)", message)
    return float(found[1]) * _UNITS[found[2]] if found else None
