"""Memory as XLA assigns it, from what it writes down while it compiles; and compiling no further.

PJRT's `temp_size_in_bytes` is more than a TPU's program takes where there are loops: 512 MiB for
one that carries three arrays of 128 (libtpu 0.0.42.1), of which XLA assigns, and at the peak PJRT
itself counts, 384.

Machine code is most of a TPU compilation and decides no byte of arguments, temporaries and output.
A compilation cannot be stopped, so whoever calls `measured` should be a process that ends then:
`in_child` makes one.
"""

import multiprocessing
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax

_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (.+):$", re.MULTILINE)
_ASSIGNMENT = "*after_optimizations-buffer-assignment.txt"
_PROGRAM = (  # as a TPU's compiler names it, a CPU's, and a GPU's
    "*.after_optimizations_after_buffer_assignment.txt", "*.cpu_after_optimizations.txt",
    "*_gpu_after_optimizations.txt",
)  # fmt: skip
_SECONDS = 0.5  # between two looks


def compiled(lowered: Any) -> tuple[dict[str, float], Any]:
    """Bytes of a device by kind, and the program, compiled."""
    with tempfile.TemporaryDirectory() as folder:
        program = lowered.compile(compiler_options={"xla_dump_to": folder})
        (written,) = Path(folder).glob(_ASSIGNMENT)
        found = sizes_of(written.read_text())
    memory = program.memory_analysis()
    assert memory is not None, "every backend that JAX ships reports a program's memory"
    return found | {"code": float(memory.generated_code_size_in_bytes)}, program


def measured(lowered: Any) -> tuple[dict[str, float], str]:
    """Bytes of a device by kind, and the program's HLO text, while it is still being compiled.

    Raises what the compiler raises where it does not come so far.
    """
    failed: list[Exception] = []

    def compile_to(folder: str) -> None:
        try:
            lowered.compile(compiler_options={"xla_dump_to": folder})
        except jax.errors.JaxRuntimeError as error:
            failed.append(error)

    folder = tempfile.mkdtemp()
    try:
        return _until_assigned(compile_to, folder, failed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _until_assigned(
    compile_to: Callable[[str], None], folder: str, failed: list[Exception]
) -> tuple[dict[str, float], str]:
    running = threading.Thread(target=compile_to, args=(folder,), daemon=True)
    running.start()
    size = -1
    while True:
        alive = running.is_alive()
        names = (_ASSIGNMENT, *_PROGRAM)
        written = [file for name in names for file in Path(folder).glob(name)]
        before, size = size, sum(file.stat().st_size for file in written)
        if len(written) == 2 and (size == before or not alive):  # both are there, and whole
            assignment, program = written
            return sizes_of(assignment.read_text()), program.read_text()
        if failed:
            raise failed[0]
        if not alive:
            raise RuntimeError(f"XLA wrote no assignment of memory to {folder}")
        time.sleep(_SECONDS)


def sizes_of(assignment: str) -> dict[str, float]:
    """Bytes in HBM of what XLA lists as a program's allocations; constants count as code."""
    found = dict.fromkeys(("arguments", "temporaries", "output", "code"), 0.0)
    for size, told in _ALLOCATION.findall(assignment):
        words = told.split(", ")
        if any(word.startswith("color") for word in words):  # a memory on the chip
            continue
        kinds = {
            "arguments": any(word.startswith("parameter") for word in words),
            "temporaries": "preallocated-temp" in words,
            "output": "maybe-live-out" in words,
            "code": "constant" in words,
        }
        for name, is_it in kinds.items():
            if is_it:
                found[name] += float(size)
                break
    return found


class Ended(RuntimeError):
    """A process that ended before it had answered."""


def in_child(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The function's dict from a process that ends with it; a ValueError of its own goes on.

    To be called before JAX has made a backend in this process.
    """
    fork = multiprocessing.get_context("fork")
    reads, writes = fork.Pipe(duplex=False)
    child = fork.Process(target=_answer, args=(function, writes))
    child.start()
    writes.close()
    try:
        answer = reads.recv()
    except EOFError:
        answer = None
    child.join()  # which ends what is still being compiled
    if isinstance(answer, ValueError):
        raise answer
    if answer is None:
        raise Ended(f"a compilation ended with status {child.exitcode}: see above")
    return answer


def _answer(function: Callable[[], dict[str, Any]], writes: Connection) -> None:
    try:
        writes.send(function())
    except ValueError as error:
        writes.send(error)
