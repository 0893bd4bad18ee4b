"""Compiler settings for each platform, as data with a line on why; set before JAX is imported.

`dppo` sets them for the accelerator that is installed, `dppo plan` for the one that it compiles
for. What is set already wins. For shells and job files:

    eval "$(python -m dppo_jax.platform_flags v5p)"
"""

import shlex
import sys
from collections.abc import Mapping, MutableMapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple


class Setting(NamedTuple):
    """A flag of the compiler, or an environment variable where `flag` is empty."""

    variable: str
    flag: str
    value: str
    why: str


_TPU, _XLA = "LIBTPU_INIT_ARGS", "XLA_FLAGS"
COLLECTIVES_TPU = (
    Setting(
        _TPU, "xla_tpu_enable_latency_hiding_scheduler", "true",
        "orders operations so that transfers run behind matrix products",
    ),
    Setting(
        _TPU, "xla_enable_async_all_gather", "true",
        "FSDP gathers a layer's weights while the one before computes",
    ),
    Setting(
        _TPU, "xla_enable_async_collective_permute", "true",
        "ring attention sends keys on while it attends to those it has",
    ),
    Setting(
        _TPU, "xla_tpu_overlap_compute_collective_tc", "true",
        "lets a core drive transfers and compute at once",
    ),
)  # fmt: skip
# Newer libtpu (0.0.50 does) ends the process where these are set for another generation.
_FUSION_V5E = (
    Setting(
        _TPU, "xla_tpu_enable_async_collective_fusion", "true",
        "fuses a transfer with the product that it hides behind",
    ),
    Setting(
        _TPU, "xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true",
        "the same for gathers, which are most of FSDP's transfers",
    ),
    Setting(
        _TPU, "xla_tpu_enable_async_collective_fusion_multiple_steps", "true",
        "lets one transfer hide behind several products",
    ),
)  # fmt: skip
SLICES = (
    Setting(
        _TPU, "xla_tpu_enable_data_parallel_all_reduce_opt", "true",
        "between slices, gradients of several layers are summed in one transfer over the network",
    ),
    Setting(
        _TPU, "xla_tpu_data_parallel_opt_different_sized_ops", "true",
        "the same for gradients of different sizes",
    ),
)  # fmt: skip


def _vmem(kib: int) -> Setting:
    why = "default 16 or 32 MiB: a fusion of a larger tile reads its weights less often"
    return Setting(_TPU, "xla_tpu_scoped_vmem_limit_kib", str(kib), why)


_GPU = (
    Setting(
        _XLA, "xla_gpu_enable_latency_hiding_scheduler", "true",
        "orders operations so that NCCL transfers run behind matrix products",
    ),
    Setting(
        _XLA, "xla_gpu_enable_pipelined_all_gather", "true",
        "starts the gather of the next layer's weights within the loop over layers",
    ),
    Setting(
        _XLA, "xla_gpu_enable_pipelined_reduce_scatter", "true",
        "ends the scatter of a layer's gradients within the next turn of that loop",
    ),
    Setting(
        _XLA, "xla_gpu_all_gather_combine_threshold_bytes", str(2**27),
        "fewer, larger transfers: the small ones of a layer go together",
    ),
    Setting(
        _XLA, "xla_gpu_reduce_scatter_combine_threshold_bytes", str(2**27),
        "the same for gradients",
    ),
    Setting(
        "XLA_PYTHON_CLIENT_MEM_FRACTION", "", "0.92",
        "JAX takes three quarters of a card's memory unless told; NCCL and cuBLAS need the rest",
    ),
)  # fmt: skip
# Half of a core's vector memory or more, as much as Marin and Google's own recipes give: 128 MiB
# on v5e and v6e, 64 on v5p and 7x. v4 has 16 in all: its default stays.
SETTINGS: dict[str, tuple[Setting, ...]] = {
    "cpu": (),
    "tpu": (*COLLECTIVES_TPU, *SLICES),  # of any generation
    "v4": (*COLLECTIVES_TPU, *SLICES),
    "v5e": (*COLLECTIVES_TPU, *_FUSION_V5E, *SLICES, _vmem(65_536)),
    "v5p": (*COLLECTIVES_TPU, *SLICES, _vmem(50_000)),
    "v6e": (*COLLECTIVES_TPU, *SLICES, _vmem(98_304)),
    "7x": (*COLLECTIVES_TPU, *SLICES, _vmem(50_000)),
    "gpu": _GPU,
}


CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
# What TPU_ACCELERATOR_TYPE calls them.
GENERATIONS = {
    "v4": "v4", "v5litepod": "v5e", "v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "tpu7x": "7x",
}  # fmt: skip
_PCI = Path("/sys/bus/pci/devices")
_GOOGLE = "0x1ae0"
_CHIPS = {"0x005e": "v4", "0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e", "0x0076": "7x"}


def apply(platform: str, environment: MutableMapping[str, str]) -> None:
    """Adds a platform's settings to the environment, but for those that are in it already.

    ValueError for a platform that is not in `SETTINGS`.
    """
    if platform not in SETTINGS:
        raise ValueError(f"unknown platform {platform!r}; known: {', '.join(SETTINGS)}")
    for variable, flag, value, _ in SETTINGS[platform]:
        given = environment.get(variable, "")
        if not flag:
            environment[variable] = given or value
        elif flag not in [word.lstrip("-").partition("=")[0] for word in given.split()]:
            environment[variable] = f"{given} --{flag}={value}".lstrip()


def here(environment: Mapping[str, str]) -> str:
    """The platform of this machine; of TPUs the generation, where environment or PCI bus tell it.

    GKE sets the variable; in a container on a TPU VM there are the PCI ids of the chips alone.
    """
    asked = environment.get("JAX_PLATFORMS", "").partition(",")[0]
    if asked in ("cpu", "tpu"):
        found = asked
    elif asked in ("cuda", "gpu") or any(map(find_spec, CUDA_PLUGINS)):
        found = "gpu"
    else:
        found = "tpu" if find_spec("libtpu") else "cpu"
    if found != "tpu":
        return found
    kind = environment.get("TPU_ACCELERATOR_TYPE", "").partition("-")[0]
    return GENERATIONS.get(kind) or _on_pci_bus(_PCI) or found


def _on_pci_bus(devices: Path) -> str | None:
    """The generation of the first TPU chip among the PCI devices."""
    for vendor in sorted(devices.glob("*/vendor")):
        if vendor.read_text().strip() == _GOOGLE:
            chip = vendor.with_name("device").read_text().strip()
            if chip in _CHIPS:
                return _CHIPS[chip]
    return None


def main(platform: str) -> None:
    """Prints the settings for a shell."""
    found: dict[str, str] = {}
    apply(platform, found)
    for variable, value in found.items():
        print(f"export {variable}={shlex.quote(value)}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
