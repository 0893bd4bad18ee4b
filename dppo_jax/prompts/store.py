"""Data sets on disk: TFDS array_record files, written and read without TensorFlow or a network.

`prepare` writes a data set once; `load` opens a split of it for random access. The files lie in
`data_dir/NAME/VERSION/` and are ordinary TFDS: `tfds.builder_from_directory` reads them too.
"""

import contextlib
import hashlib
import io
import operator
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from dppo_jax.prompts import arithmetic, gsm8k, stories
from dppo_jax.prompts.examples import Example, PromptFileError

VERSION = "1.0.0"  # of the files' layout and of the data sets that the project makes itself

Splits = dict[str, list[Example]]
_MADE_HERE: dict[str, Callable[..., Splits]] = {
    "arithmetic": arithmetic.examples,
    "stories": stories.examples,
}
_FROM_FILES: dict[str, Callable[[Path], Splits]] = {"gsm8k": gsm8k.examples}
NAMES = (*_MADE_HERE, *_FROM_FILES)


class Prepared(NamedTuple):
    """What `prepare` left on disk."""

    name: str
    path: Path
    splits: dict[str, int]  # examples in each
    fingerprint: str  # of every example in every split
    reused: bool  # the same examples were there already


def prepare(
    name: str, data_dir: str | Path, source: str | Path | None = None, **options: int
) -> Prepared:
    """Writes data set `name` below `data_dir`, or finds that it is there already.

    `source` is the file or folder that data sets from files are read from; `options` are those of
    the data set's `examples` function (arithmetic: smallest, largest, held_out, seed). Every row
    is read and checked before anything is written, and the files appear by one rename. If the
    folder holds other examples under this name, PromptFileError: a run that resumes must not find
    its held-out set changed.
    """
    splits = _examples(name, source, options)
    _refuse_leaks(splits)
    fingerprint = _fingerprint(splits)
    path = _path(name, data_dir)
    reused = path.exists()
    if not reused:
        try:
            _write(name, data_dir, splits, fingerprint)
        except OSError:
            # Another process may have prepared it meanwhile: a rename cannot replace its folder.
            if not path.exists():
                raise
    metadata = _open(path).info.metadata or {}
    if metadata.get("fingerprint") != fingerprint:
        raise PromptFileError(
            f"{path} holds other {name} examples than were asked for; remove that folder to prepare"
            " it anew, or choose another data folder"
        )
    sizes = {split: len(examples) for split, examples in splits.items()}
    return Prepared(name, path, sizes, fingerprint, reused)


class PromptSource(Sequence[Example]):
    """One split on disk; examples are read when they are asked for."""

    def __init__(self, records: Sequence[dict[str, bytes]]):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:  # an Example; slices are not supported
        row = operator.index(index)
        if not -len(self) <= row < len(self):
            raise IndexError(f"example {row} of {len(self)}")
        record = self._records[row % len(self)]
        return Example(*(record[field].decode() for field in Example._fields))


def load(name: str, data_dir: str | Path, split: str) -> PromptSource:
    """Opens a split that `prepare` wrote; what the project makes itself is made if missing."""
    path = _path(name, data_dir)
    if not path.exists() and name in _MADE_HERE:
        prepare(name, data_dir)
    if not path.exists():
        raise PromptFileError(
            f"{path}: {name} is not prepared; run: dppo data prepare {name}"
            + (" --from FILE_OR_DIR" if name in _FROM_FILES else "")
        )
    builder = _open(path)
    if split not in builder.info.splits:
        raise PromptFileError(
            f"{path}: no split {split!r}; there is {', '.join(sorted(builder.info.splits))}"
        )
    return PromptSource(builder.as_data_source(split))


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Examples in memory to array_record files; one class for all data sets."""

    VERSION = tfds.core.Version(VERSION)
    # Nothing is downloaded, so there are no checksums to look for; and the look would import
    # importlib_resources, which TFDS 4.9.10 does not declare (tensorflow/datasets#11212).
    url_infos = None

    def __init__(self, name: str, data_dir: str, splits: Splits, fingerprint: str):
        self.name = name
        self._splits = splits
        self._fingerprint = fingerprint
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({field: np.str_ for field in Example._fields}),
            metadata=tfds.core.MetadataDict(fingerprint=self._fingerprint),
            disable_shuffling=True,  # rows keep their order; the pipeline shuffles
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        return {split: self._generate_examples(rows) for split, rows in self._splits.items()}

    def _generate_examples(self, rows: list[Example]) -> Iterator[tuple[int, dict]]:
        for key, row in enumerate(rows):
            yield key, row._asdict()


def _examples(name: str, source: str | Path | None, options: dict[str, int]) -> Splits:
    if name in _FROM_FILES:
        if source is None:
            raise ValueError(f"{name} is read from files; give them: --from FILE_OR_DIR")
        if options:
            raise ValueError(f"{name} has no options, got {', '.join(options)}")
        return _FROM_FILES[name](Path(source))
    if name not in _MADE_HERE:
        raise ValueError(f"no data set is called {name!r}; there are {', '.join(NAMES)}")
    if source is not None:
        raise ValueError(f"{name} is made by the project itself and takes no --from")
    return _MADE_HERE[name](**options)


def _refuse_leaks(splits: Splits) -> None:
    trained = {example.prompt: example.id for example in splits.get("train", [])}
    for example in splits.get("test", []):
        if example.prompt in trained:
            raise PromptFileError(
                f"test example {example.id} has the prompt of train example"
                f" {trained[example.prompt]}; remove it from one of them"
            )


def _fingerprint(splits: Splits) -> str:
    digest = hashlib.sha256()
    for split in sorted(splits):
        for example in splits[split]:
            digest.update(repr((split, *example)).encode())
    return digest.hexdigest()[:16]


def _path(name: str, data_dir: str | Path) -> Path:
    if name not in NAMES:
        raise ValueError(f"no data set is called {name!r}; there are {', '.join(NAMES)}")
    return Path(data_dir).expanduser() / name / VERSION


def _write(name: str, data_dir: str | Path, splits: Splits, fingerprint: str) -> None:
    """One TFDS build. Its messages and bars would spoil `--json` output, so they go nowhere."""
    tfds.disable_progress_bar()
    root = os.fspath(Path(data_dir).expanduser())
    with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
        _Builder(name, root, splits, fingerprint).download_and_prepare(
            download_dir=downloads,  # stays empty, but TFDS makes it
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )


def _open(path: Path) -> tfds.core.DatasetBuilder:
    if not (path / "dataset_info.json").is_file():  # TFDS renames whole folders; copies may stop
        raise PromptFileError(
            f"{path} is not a whole data set; remove that folder and prepare it anew"
        )
    return tfds.builder_from_directory(path)
