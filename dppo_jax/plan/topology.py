"""Names of hardware, such as v5p:4x4x4 or h100:8, and their devices."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dppo_jax import platform_flags
from dppo_jax.kernels.chips import CHIPS, ENVIRONMENT, GPU_NODE, GPUS, Chip, Node
from dppo_jax.plan import cuda

# Slices that Google lists for each generation; libtpu takes more.
SLICES = {
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "7x": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
}
# What XLA does for a CPU alone: it widens bfloat16 to float32. Without, it makes no machine code,
# which a plan does not need.
_AS_WRITTEN = "--xla_disable_hlo_passes=all-reduce-promotion,float-normalization-bf16"
CARDS = (1, 8, 16, 32, 64, 128, 256)  # a node has 8


@dataclass(frozen=True)
class Topology:
    """Devices of one kind; a v4 or 7x chip is two of them."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    platform: str  # "tpu" or "gpu"

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def node(self) -> Node | None:
        """What joins some of them, where not all are joined by the same."""
        return GPU_NODE if self.platform == "gpu" else None

    @property
    def estimated(self) -> bool:
        """Whether a CPU's compiler stands in for that of the devices."""
        return self.platform == "gpu" and not cuda.installed()

    def host_of(self, device: Any) -> int:
        """The host of one of its devices."""
        return device.id // GPU_NODE.devices if self.estimated else device.process_index

    def devices(self) -> Sequence[Any]:
        """TPUs by libtpu, GPUs by JAX's CUDA plugin.

        For GPUs without it as many CPU devices, which `prepare` has asked for.
        """
        import jax

        if self.platform == "gpu" and not self.estimated:
            return cuda.devices(self.name.partition(":")[0], self.chips, GPU_NODE.devices)
        if self.platform == "gpu":
            found = jax.devices("cpu")
            if len(found) < self.chips:
                raise ValueError(f"{self.name} needs {self.chips} CPU devices, not {len(found)}")
            return found[: self.chips]
        from jax.experimental import topologies

        generation, _, shape = self.name.partition(":")
        name = f"{self.chip.topology.partition(':')[0]}:{shape}"
        try:
            return topologies.get_topology_desc(topology_name=name, platform="tpu").devices
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"libtpu does not know {self.name} ({reason}); known of {generation}: "
                + ", ".join(SLICES[generation])
            ) from error


def parse(name: str) -> Topology:
    """The topology of a name; ValueError with the known ones where it has none."""
    kind, _, shape = name.partition(":")
    if kind in CHIPS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
        sizes = tuple(int(size) for size in shape.split("x"))
        if len(sizes) == SLICES[kind][0].count("x") + 1:
            return Topology(name, CHIPS[kind], sizes, "tpu")
    if kind in GPUS and re.fullmatch(r"[1-9]\d*", shape):
        return Topology(name, GPUS[kind], (int(shape),), "gpu")
    known = [f"{kind}:{{{','.join(shapes)}}}" for kind, shapes in SLICES.items()]
    known += [f"{kind}:{{{','.join(map(str, CARDS))}}}" for kind in GPUS]
    raise ValueError(f"unknown topology {name!r}; known: {', '.join(known)}")


def prepare(topologies: Sequence[Topology]) -> None:
    """Sets the environment in which they can be compiled for; to be called before JAX is imported.

    ValueError where a TPU is asked for and its compiler is not installed.
    """
    if any(t.platform == "tpu" for t in topologies) and importlib.util.find_spec("libtpu") is None:
        raise ValueError("plans for TPUs need libtpu: pip install 'dppo-jax[plan]'")
    os.environ.update(ENVIRONMENT)
    for kind in {t.name.partition(":")[0] for t in topologies if t.platform == "tpu"}:
        platform_flags.apply(kind, os.environ)  # of several generations, those that are first
    # Errors are raised; XLA writes more of them down, that of the machine code it cannot make too.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    gpus = [t.chips for t in topologies if t.platform == "gpu"]
    if gpus and cuda.installed():
        cuda.set_flags(os.environ)
    else:
        cards = max(gpus, default=1)
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={cards} {_AS_WRITTEN}"
