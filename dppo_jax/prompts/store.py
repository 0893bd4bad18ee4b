"""Data sets on disk: TFDS array_record files, written and read without TensorFlow.

`prepare` and `prepare_own` write a data set once; `load` opens a split of it for random access.
The files lie in `data_dir/NAME/VERSION/` and are ordinary TFDS: `tfds.builder_from_directory`
reads them too. Only `prepare` without a source, of a published set, uses the network.
"""

import contextlib
import difflib
import hashlib
import io
import operator
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from dppo_jax.prompts import arithmetic, stories
from dppo_jax.prompts.examples import Example, PromptFileError
from dppo_jax.prompts.fields import Fields
from dppo_jax.prompts.sets import PUBLIC, Dropped, Read, Splits, Unfit, read_own, read_public

VERSION = "1.1.0"  # of the files' layout and of the data sets that the project makes itself

_MADE_HERE: dict[str, Callable[..., Splits]] = {
    "arithmetic": arithmetic.examples,
    "stories": stories.examples,
}
NAMES = (*_MADE_HERE, *PUBLIC)


class Prepared(NamedTuple):
    """What `prepare` left on disk."""

    name: str
    path: Path
    splits: dict[str, int]  # examples in each
    dropped: Dropped  # rows left out of each split, by reason
    unfit: dict[str, str]  # those without an answer that can be used, by id, and why
    fingerprint: str  # of every example in every split
    reused: bool  # the same examples were there already


def prepare(
    name: str,
    data_dir: str | Path,
    source: str | Path | None = None,
    unfit: Unfit | None = None,
    **options: int,
) -> Prepared:
    """Writes data set `name` below `data_dir`, or finds that it is there already.

    `source` is the file or folder that a published set is read from; where None it is downloaded
    from its public home. `unfit` finds the examples that a verifier cannot judge; they are left out
    and told. `options` are those of the `examples` function of a set that the project makes
    (arithmetic: smallest, largest, held_out, seed). Every row is read and checked before anything
    is written, and the files appear by one rename. If the folder holds other examples
    under this name, PromptFileError: a run that resumes must not find its held-out set changed.
    """
    if name in PUBLIC:
        if options:
            raise ValueError(f"{name} has no options, got {', '.join(options)}")
        if source is unfit is None and (path := _path(name, data_dir)).exists():
            return _found(name, path)
        return _store(name, data_dir, read_public(name, Path(source) if source else None, unfit))
    if name not in _MADE_HERE:
        raise ValueError(_unknown(name, NAMES))
    if source is not None or unfit is not None:
        raise ValueError(f"{name} is made by the project itself; it takes no --from, no --verifier")
    return _store(name, data_dir, Read(_MADE_HERE[name](**options), {}, {}))


def prepare_own(
    name: str,
    data_dir: str | Path,
    source: str | Path,
    fields: Fields,
    split: str | None = None,
    unfit: Unfit | None = None,
) -> Prepared:
    """`prepare` for anyone's jsonl, json or parquet files, under a name of their choice."""
    if name in NAMES or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        problem = "is a set of the project" if name in NAMES else "is no name for a data set"
        raise ValueError(f"{name!r} {problem}; choose a name of a-z, 0-9 and _ that is not taken")
    if split is not None and not re.fullmatch(r"[a-z][a-z0-9_]*", split):
        raise ValueError(f"--split {split!r}: a name of a-z, 0-9 and _, as train or test")
    return _store(name, data_dir, read_own(name, Path(source), fields, split, unfit))


def _found(name: str, path: Path) -> Prepared:
    info = _open(path).info
    sizes = {split: each.num_examples for split, each in info.splits.items()}
    return Prepared(name, path, sizes, {}, {}, str((info.metadata or {})["fingerprint"]), True)


def _store(name: str, data_dir: str | Path, read: Read) -> Prepared:
    splits, fingerprint = read.splits, _fingerprint(read.splits)
    path = _path(name, data_dir)
    reused = path.exists()
    if not reused:
        try:
            _write(name, data_dir, splits, fingerprint)
        except OSError as error:
            # Another process may have prepared it meanwhile: a rename cannot replace its folder.
            if not path.exists():
                reason = error.strerror or error
                raise PromptFileError(
                    f"{name} cannot be written to {data_dir} ({reason}): choose another data folder"
                ) from error
    metadata = _open(path).info.metadata or {}
    if metadata.get("fingerprint") != fingerprint:
        raise PromptFileError(
            f"{path} holds other {name} examples than were asked for; remove that folder to prepare"
            " it anew, or choose another data folder"
        )
    sizes = {split: len(examples) for split, examples in splits.items()}
    return Prepared(name, path, sizes, read.dropped, read.unfit, fingerprint, reused)


class PromptSource(Sequence[Example]):
    """One split on disk; an example is read when it is first asked for, and kept."""

    def __init__(self, records: Sequence[dict[str, bytes]]):
        self._records = records
        self._read: dict[int, Example] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:  # an Example; slices are not supported
        row = operator.index(index)
        if not -len(self) <= row < len(self):
            raise IndexError(f"example {row} of {len(self)}")
        row %= len(self)
        if row not in self._read:
            record = self._records[row]
            self._read[row] = Example(*(record[field].decode() for field in Example._fields))
        return self._read[row]


def load(name: str, data_dir: str | Path, split: str) -> PromptSource:
    """Opens a split that `prepare` wrote; what the project makes itself is made if missing."""
    path = _path(name, data_dir)
    if not path.exists() and name in _MADE_HERE:
        prepare(name, data_dir)
    if not path.exists():
        if name not in NAMES:
            raise ValueError(_unknown(name, [*dict.fromkeys((*NAMES, *_prepared(data_dir)))]))
        raise PromptFileError(
            f"{path}: {name} is not prepared; run: dppo data prepare {name} [--from FILE_OR_DIR]"
        )
    builder = _open(path)
    if split not in builder.info.splits:
        raise PromptFileError(
            f"{path}: no split {split!r}; there is {', '.join(sorted(builder.info.splits))}"
        )
    return PromptSource(builder.as_data_source(split))


def splits_of(name: str, data_dir: str | Path) -> list[str]:
    """The splits of a data set that is prepared, or made by the project itself."""
    path = _path(name, data_dir)
    return sorted(_open(path).info.splits) if path.exists() else []


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


def _unknown(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    meant = f" (did you mean {near[0]}?)" if near else ""
    return (
        f"no data set is called {name!r}{meant}; there are {', '.join(names)}; your own:"
        " dppo data prepare NAME --jsonl FILE --prompt-field FIELD --answer-field FIELD"
    )


def _prepared(data_dir: str | Path) -> list[str]:
    folder = Path(data_dir).expanduser()
    return sorted(path.parent.name for path in folder.glob(f"*/{VERSION}"))


def _fingerprint(splits: Splits) -> str:
    digest = hashlib.sha256()
    for split in sorted(splits):
        for example in splits[split]:
            digest.update(repr((split, *example)).encode())
    return digest.hexdigest()[:16]


def _path(name: str, data_dir: str | Path) -> Path:
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
