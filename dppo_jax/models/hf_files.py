"""Safetensors files, tensor by tensor: nothing but the tensor at hand is in memory.

A file is a little-endian 64-bit length, that many bytes of JSON (name -> dtype, shape, two offsets
into the rest), then the numbers. The `safetensors` package reads and writes whole files; here a
tensor is a view of the mapped file, and a torn file is reported by the tensor that it cuts.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors package
LARGEST_FILE = 5_000_000_000  # bytes of numbers in one file that is written


class Stored(NamedTuple):
    """Where a tensor lies."""

    file: Path
    offset: int  # bytes from the beginning of the file
    dtype: np.dtype
    shape: tuple[int, ...]

    def view(self) -> np.ndarray:
        """The tensor, mapped and not read."""
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape or (1,)).reshape(
            self.shape
        )


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a model folder: of its one safetensors file, or of those its index names.

    Raises ValueError, one line that names the tensor or the file, where a file is missing, torn or
    not of this format, or where index and files disagree.
    """
    index = folder / INDEX
    if not index.is_file():
        single = folder / SINGLE
        if not single.is_file():
            raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}")
        return tensors_of(single)
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        listed = {name: str(file) for name, file in weight_map.items()}
        files = sorted(set(listed.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors files") from error
    found: dict[str, Stored] = {}
    for file in files:
        first = next(name for name, where in listed.items() if where == file)
        if Path(file).name != file or not (folder / file).is_file():
            raise ValueError(f"{folder} lacks {file}, which should hold {first}")
        found |= tensors_of(folder / file)
    for name, file in listed.items():
        if name not in found or found[name].file.name != file:
            raise ValueError(f"{folder / file} lacks {name}, which {INDEX} says it holds")
    return {name: found[name] for name in listed} | found


def tensors_of(path: Path) -> dict[str, Stored]:
    """All tensors of one safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, LARGEST_HEADER):
            raise ValueError(f"{path} is no safetensors file, or is cut off inside its header")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            return {name: _stored(path, 8 + length, size, name, x) for name, x in header.items()}
        except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} has a header that is not JSON") from error


def _stored(path: Path, start: int, size: int, name: str, entry: dict) -> Stored:
    try:
        kind, shape = str(entry["dtype"]), tuple(map(int, entry["shape"]))
        begin, end = map(int, entry["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: the header's entry for {name} is damaged") from error
    if kind not in DTYPES:
        raise ValueError(f"{path}: {name} is of type {kind}; known are {', '.join(DTYPES)}")
    dtype = DTYPES[kind]
    if begin < 0 or min(shape, default=1) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{path}: {name} has offsets that do not fit its shape {shape}")
    if start + end > size:
        raise ValueError(f"{path} is cut off: it ends inside or before {name}")
    return Stored(path, start + begin, dtype, shape)


def write_tensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[np.ndarray],
    dtype: str,
    *,
    largest_file: int = LARGEST_FILE,
) -> None:
    """Writes `tensors`, which come in the order of `shapes`, one at a time as they are made.

    One file, or several with an index where the numbers exceed `largest_file` bytes.
    """
    numbers = DTYPES[NAMES[dtype]]
    sizes = {name: math.prod(shape) * numbers.itemsize for name, shape in shapes.items()}
    groups: list[list[str]] = [[]]
    for name, size in sizes.items():
        if groups[-1] and sum(sizes[other] for other in groups[-1]) + size > largest_file:
            groups.append([])
        groups[-1].append(name)
    several = len(groups) > 1
    made, weight_map = iter(tensors), {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors" if several else SINGLE
        weight_map.update(dict.fromkeys(group, file))
        write_file(folder / file, {n: shapes[n] for n in group}, made, numbers, NAMES[dtype])
    if several:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterator[np.ndarray],
    numbers: np.dtype,
    kind: str,
) -> None:
    """Writes one safetensors file; `tensors` come in the order of `shapes`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # what transformers asks for
    begin = 0
    for name, shape in shapes.items():
        end = begin + math.prod(shape) * numbers.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = next(tensors)
            if tensor.shape != shape:
                raise ValueError(f"{name} has shape {tensor.shape}, announced as {shape}")
            np.ascontiguousarray(tensor, dtype=numbers).tofile(file)
