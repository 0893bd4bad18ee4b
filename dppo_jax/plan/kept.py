"""What compilers said of programs, kept: a plan that is asked again compiles what has changed."""

import gzip
import hashlib
import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dppo_jax.kernels.chips import ENVIRONMENT
from dppo_jax.plan import cuda
from dppo_jax.plan.topology import Topology

# Whose change changes what is kept: compilers, their settings, and what asks them.
_COMPILERS = ("jax", "jaxlib", "libtpu", cuda.PLUGIN)
_ASKS = "assigned.py"


class Kept:
    """Two files a program, named by all that decides what a compiler makes of it.

    Its bytes and seconds as JSON, and its HLO text, of which costs are counted when it is read.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._here = [f"{name} {_version(name)}" for name in _COMPILERS]
        self._here.append((Path(__file__).parent / _ASKS).read_text())

    def name_of(self, text: str, topology: Topology, *more: object) -> str:
        """For a program as it is given to the compiler, and whatever else it hangs on."""
        settings = [f"{name}={os.environ.get(name)}" for name in (*ENVIRONMENT, "LIBTPU_INIT_ARGS")]
        parts = [text, repr(topology), *map(repr, more), *settings, *self._here]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]

    def read(self, name: str, code: bool) -> tuple[dict[str, Any], str] | None:
        """Of the whole compilation, or where no `code` is asked for of its first part too."""
        for file in (self._file(name, whole) for whole in (True, code)):
            if file.exists():
                text = gzip.decompress(file.with_suffix(".hlo.gz").read_bytes()).decode()
                return json.loads(file.read_text()), text
        return None

    def write(self, name: str, code: bool, numbers: dict[str, Any], text: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._file(name, code)
        # What `read` looks for comes last.
        _put(file.with_suffix(".hlo.gz"), gzip.compress(text.encode(), 6))
        _put(file, json.dumps(numbers).encode())

    def _file(self, name: str, code: bool) -> Path:
        return self._folder / f"{name}{'' if code else '.memory'}.json"


def _put(file: Path, content: bytes) -> None:
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(file)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
