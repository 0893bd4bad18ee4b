"""Whether a run may write where it was told to, and no other process does."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dppo_jax.multihost import is_writer


def check_writable(directory: Path) -> None:
    """Raises ValueError where no file could be made in it, or in the folder to make it in."""
    whole = directory.absolute()
    home = next(folder for folder in (whole, *whole.parents) if folder.exists())
    try:
        tempfile.TemporaryFile(dir=home).close()
    except OSError as error:
        raise ValueError(
            f"{directory} cannot be written, {home} refuses it ({error.strerror}): "
            "choose another --workdir"
        ) from error


@contextlib.contextmanager
def claim(directory: Path) -> Iterator[None]:
    """Makes the directory, and this process's own meanwhile or until the process ends.

    Two runs would take each other's half-written checkpoints away. A lock of the folder itself
    leaves no file behind; a file system without locks has none.
    """
    if not is_writer():
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    folder = os.open(directory, os.O_RDONLY)
    try:
        _lock(folder, directory)
        yield
    finally:
        os.close(folder)


def _lock(folder: int, directory: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"{directory}: another process trains there; end it, or choose another --workdir"
        ) from error
    except OSError:
        pass
