"""What the verbs share: how one is added to the parser, and how JAX is started for it."""

import argparse
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def start_jax() -> None:
    """Keeps compiled programs for the next call and, on a CPU, freed memory for the next step."""
    if _cpu_only():
        # Before jax is imported: the allocator's settings bind only what has not been set up yet.
        from dppo_jax.allocator import keep_freed_memory

        keep_freed_memory()
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path.home() / ".cache" / "dppo_jax" / "programs"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _cpu_only() -> bool:
    """Whether JAX will run on the CPU: it was told to, or there is nothing else for it."""
    plugins = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")
    asked = os.environ.get("JAX_PLATFORMS")
    return asked == "cpu" if asked else not any(map(importlib.util.find_spec, plugins))
