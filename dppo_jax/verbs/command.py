"""What the verbs share: how one is added to the parser, and how JAX is started for it."""

import argparse
import glob
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dppo_jax import clusters
from dppo_jax.clusters import Cluster

GIN = "any --gin.NAME=VALUE overrides the recipe"
GIVEN = ("workdir", "console", "configuration")  # what `train` gets from here, not from a recipe


class Failure(Exception):
    """A run that failed, told in one line: exit status 1."""


def add_verb(
    parent: Any, name: str, run: Callable, summary: str, example: str
) -> argparse.ArgumentParser:
    """A parser for `dppo ... name`, which calls run(options)."""
    sub = parent.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    sub.set_defaults(verb=run)
    return sub


def add_hosts(parser: argparse.ArgumentParser) -> None:
    """Flags of a verb that runs as one process a host."""
    hosts = parser.add_argument_group(
        "many hosts",
        "the same command on every host; JAX finds the others by itself on TPU pods and in Slurm",
    )
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="process 0 (DPPO_COORDINATOR)")
    hosts.add_argument("--processes", type=int, metavar="N", help="how many (DPPO_PROCESSES)")
    hosts.add_argument("--process-id", type=int, metavar="I", help="0 to N-1 (DPPO_PROCESS_ID)")
    hosts.add_argument(
        "--host-timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="how long to wait for the others (default: 300)",
    )


def cluster_of(options: argparse.Namespace) -> Cluster | None:
    """The other processes that the flags of `add_hosts` or the environment tell of."""
    if not hasattr(options, "coordinator"):
        return None
    return clusters.cluster_of(
        options.coordinator, options.processes, options.process_id, options.host_timeout
    )


def start_jax(options: argparse.Namespace | None = None, cpu_devices: int = 1) -> None:
    """Sets what the compiler should know of the platform, and keeps compiled programs for the next
    call and, on a CPU, freed memory for the next step.

    Joins the other processes where `options` tell of some. A CPU becomes `cpu_devices` devices,
    at most one a core; what XLA_FLAGS say of that wins.
    """
    if _cpu_only():
        count, flags = "--xla_force_host_platform_device_count", os.environ.get("XLA_FLAGS", "")
        if cpu_devices > 1 and count not in flags:
            devices = min(cpu_devices, os.cpu_count() or 1)
            os.environ["XLA_FLAGS"] = f"{flags} {count}={devices}".strip()
        # Before jax is imported: the allocator's settings bind only what has not been set up yet.
        from dppo_jax.allocator import keep_freed_memory

        keep_freed_memory()
    from dppo_jax import platform_flags

    platform_flags.apply(platform_flags.here(os.environ), os.environ)
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path.home() / ".cache" / "dppo_jax" / "programs"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if options is not None and (cluster := cluster_of(options)):
        from dppo_jax import hosts

        hosts.start(cluster)


def _cpu_only() -> bool:
    """Whether JAX will run on the CPU: it was told to, or there is nothing else for it.

    libtpu alone is no TPU: `dppo plan` compiles with it anywhere.
    """
    asked = os.environ.get("JAX_PLATFORMS")
    if asked:
        return asked == "cpu"
    plugins = ["jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin"]
    if any(glob.glob(files) for files in ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")):
        plugins.append("libtpu")
    return not any(map(importlib.util.find_spec, plugins))
