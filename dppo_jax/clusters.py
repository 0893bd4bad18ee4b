"""What a process is told of the others of its run, before jax is imported."""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

VARIABLES = ("DPPO_COORDINATOR", "DPPO_PROCESSES", "DPPO_PROCESS_ID")


@dataclass(frozen=True)
class Cluster:
    """What this process is told of the others; None where JAX is to find it out by itself."""

    coordinator: str | None = None  # HOST:PORT of process 0
    processes: int | None = None
    process_id: int | None = None
    timeout: float = 300.0  # seconds to wait for the others

    def __post_init__(self):
        told = (self.coordinator, self.processes, self.process_id)
        if told.count(None) not in (0, 3):
            raise ValueError(
                "give all three of --coordinator HOST:PORT, --processes N and --process-id I"
                f" (or {', '.join(VARIABLES)}), or none where JAX knows the cluster"
            )
        if self.coordinator is None or self.processes is None or self.process_id is None:
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise ValueError(f"coordinator {self.coordinator!r} is not HOST:PORT")
        if not 0 <= self.process_id < self.processes:
            raise ValueError(
                f"process id {self.process_id} of {self.processes} processes: "
                "they are numbered from 0"
            )


def cluster_of(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    timeout: float | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Cluster | None:
    """The cluster that flags or the environment tell of; None for a process on its own.

    Flags win over DPPO_COORDINATOR, DPPO_PROCESSES and DPPO_PROCESS_ID. Where neither says
    anything, a known cluster (several tasks of Slurm or Open MPI, a TPU host) is left to JAX.
    """

    def number(given: int | None, name: str) -> int | None:
        text = environment.get(name)
        if given is not None or not text:
            return given
        if not text.isdigit():
            raise ValueError(f"{name}={text!r} is not a number")
        return int(text)

    told = (
        coordinator or environment.get(VARIABLES[0]) or None,
        number(processes, VARIABLES[1]),
        number(process_id, VARIABLES[2]),
    )
    limit = 300.0 if timeout is None else timeout
    if told.count(None) == 3 and not _on_known_cluster(environment):
        return None
    return Cluster(*told, timeout=limit)


def _on_known_cluster(environment: Mapping[str, str]) -> bool:
    def several(name: str) -> bool:
        return environment.get(name, "").isdigit() and int(environment[name]) > 1

    if "SLURM_STEP_NODELIST" in environment and several("SLURM_NTASKS"):
        return True
    if "OMPI_MCA_orte_hnp_uri" in environment and several("OMPI_COMM_WORLD_SIZE"):
        return True
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or several("MEGASCALE_NUM_SLICES"):
        return True
    if environment.get("JAX_PLATFORMS", "").split(",")[0] in ("cpu", "cuda"):
        return False
    chips = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    return chips and importlib.util.find_spec("libtpu") is not None


def slurm_devices(environment: Mapping[str, str]) -> list[int] | None:
    """All GPUs of a node that runs one task; JAX would take one of them."""
    tasks, nodes = (environment.get(f"SLURM_{name}") for name in ("NTASKS", "STEP_NUM_NODES"))
    if tasks is None or tasks != nodes or "SLURM_GPUS_ON_NODE" not in environment:
        return None
    return list(range(int(environment["SLURM_GPUS_ON_NODE"])))


class Preempted(BaseException):
    """The run was asked to stop, and did so with nothing half-written."""

    @classmethod
    def behind(cls, directory: Path, step: int, steps: int) -> "Preempted":
        """Stopped behind a checkpoint."""
        return cls(
            f"asked to stop: {directory} has a checkpoint of step {step} of {steps}; the same"
            " command with the same --workdir goes on from it"
        )
