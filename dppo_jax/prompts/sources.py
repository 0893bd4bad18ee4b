"""Where a data set's files come from: a folder, one file, or their public home."""

import contextlib
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dppo_jax.prompts.examples import PromptFileError
from dppo_jax.prompts.rows import SUFFIXES

TRAIN_AND_TEST: Mapping[str, Sequence[str]] = {"train": ("train",), "test": ("test",)}
_TIMEOUT_SECONDS = 60


def split_files(source: Path, name: str, stems: Mapping[str, Sequence[str]]) -> dict[str, Path]:
    """The file of each split; `stems` are the splits' file names without their endings.

    A folder holds one file for one split or more. One file makes the split whose stem begins its
    name (the longest such stem), else the first split.
    """
    if source.is_file():
        matches = [(len(s), split) for split in stems for s in stems[split]
                   if source.name.startswith(s)]  # fmt: skip
        return {max(matches)[1] if matches else next(iter(stems)): source}
    if not source.is_dir():
        raise PromptFileError(f"{source}: no such file or folder; {name} is read from its files")
    files = {}
    for split, names in stems.items():
        found = [source / (stem + suffix) for stem in names for suffix in SUFFIXES]
        found = [path for path in found if path.exists()]
        if len(found) > 1:
            raise PromptFileError(f"{found[0]} and {found[1]} both exist; keep one of them")
        if found:
            files[split] = found[0]
    if not files:
        expected = " or ".join(stem for names in stems.values() for stem in names)
        raise PromptFileError(
            f"{source}: no {name} files; expected {expected} with the ending {', '.join(SUFFIXES)}"
        )
    return files


@contextlib.contextmanager
def public_files(name: str, homes: Mapping[str, str]) -> Iterator[dict[str, Path]]:
    """Downloads a file a split to a folder that is removed afterwards.

    `homes` are addresses below the Hugging Face hub, or below $HF_ENDPOINT where that is set.
    """
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for split, home in homes.items():
            url = f"{hub}/{home}"
            suffix = "".join(
                Path(home).suffixes[-2:] if home.endswith(".gz") else [Path(home).suffix]
            )
            files[split] = Path(folder) / f"{split}{suffix}"
            try:
                with (
                    urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as remote,
                    files[split].open("wb") as local,
                ):
                    shutil.copyfileobj(remote, local)
            except (OSError, ValueError) as error:  # URLError is an OSError
                reason = error.reason if type(error) is urllib.error.URLError else error
                if isinstance(error, urllib.error.HTTPError):
                    error.close()
                raise PromptFileError(
                    f"{name}: cannot download {url} ({reason}); get its files and give them:"
                    " --from FILE_OR_DIR"
                ) from error
        yield files
