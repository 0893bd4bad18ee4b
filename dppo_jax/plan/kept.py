"""Numbers of compiled programs, kept: a plan that is asked again compiles what has changed."""

import hashlib
import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dppo_jax.kernels.chips import ENVIRONMENT
from dppo_jax.plan.topology import Topology

# Whose change changes numbers: compilers, their settings, and what reads their programs.
_COMPILERS = ("jax", "jaxlib", "libtpu")
_READERS = ("assigned.py", "hlo.py", "hlo_text.py")


class Kept:
    """One JSON file a program, named by all that decides its numbers."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._here = [f"{name} {_version(name)}" for name in _COMPILERS]
        self._here += [(Path(__file__).parent / name).read_text() for name in _READERS]

    def name_of(self, text: str, topology: Topology, *more: object) -> str:
        """For a program as it is given to the compiler, and whatever else its numbers hang on."""
        settings = [f"{name}={os.environ.get(name)}" for name in (*ENVIRONMENT, "LIBTPU_INIT_ARGS")]
        parts = [text, repr(topology), *map(repr, more), *settings, *self._here]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]

    def read(self, name: str, code: bool) -> dict[str, Any] | None:
        """Of the whole compilation, or where no `code` is asked for of its first part too."""
        files = [self._file(name, whole) for whole in (True, code)]
        return next((json.loads(file.read_text()) for file in files if file.exists()), None)

    def write(self, name: str, code: bool, numbers: dict[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._file(name, code)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(numbers))
        part.replace(file)

    def _file(self, name: str, code: bool) -> Path:
        return self._folder / f"{name}{'' if code else '.memory'}.json"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
