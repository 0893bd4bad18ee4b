"""Rows of jsonl, json and parquet files; whatever is wrong with one names the file and the place.

Files that end in .gz are unpacked as they are read. A .json file holds one list of objects.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dppo_jax.prompts.examples import PromptFileError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


class Row(NamedTuple):
    """One object of the file and where it stands."""

    path: Path
    place: str  # such as "line 7" or "row 7", counted from 1
    number: int
    fields: dict[str, Any]

    def text(self, field: str) -> str:
        """The field, which must be a string with something in it."""
        value = self.value(field)
        if not isinstance(value, str) or not value.strip():
            raise self.error(
                f"field {field!r} is {value!r}; it must be a non-empty string{self._has()}"
            )
        return self._encodable(field, value)

    def plain(self, field: str) -> str:
        """The field as text: a whole number loses its .0; "" where it is null, NaN or blank."""
        value = self.value(field)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None or value != value:  # NaN, by which tables leave a number out
            return ""
        if isinstance(value, str):
            return self._encodable(field, value).strip()
        if isinstance(value, int | float):
            return str(value)
        raise self.error(f"field {field!r} is a {type(value).__name__}, not text or a number")

    def _encodable(self, field: str, text: str) -> str:
        """The text, unless it holds half of a character, which JSON can spell and UTF-8 cannot."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self.error(f"field {field!r} is no Unicode text ({error.reason})") from error
        return text

    def value(self, field: str) -> Any:
        """The field; dots lead into objects and lists, as in `prompt.0.content`."""
        if field in self.fields:
            return self.fields[field]
        value: Any = self.fields
        for part in field.split("."):
            if isinstance(value, dict) and part in value:
                value = value[part]
            elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
                value = value[int(part)]
            else:
                raise self.error(f"field {field!r} is missing{self._has()}")
        return value

    def has(self, field: str) -> bool:
        """Whether `value` would find the field."""
        try:
            self.value(field)
        except PromptFileError:
            return False
        return True

    def error(self, problem: str) -> PromptFileError:
        """An error about this row, for the caller to raise."""
        return PromptFileError(f"{self.path}, {self.place}: {problem}")

    def _has(self) -> str:
        return f" (the row has {', '.join(map(repr, self.fields)) or 'no fields'})"


def read_rows(path: Path) -> Iterator[Row]:
    """Yields every row; blank lines are skipped, a file without rows is an error."""
    if not path.is_file() or not path.name.endswith(SUFFIXES):
        problem = "files of rows end so" if path.is_file() else "no such file"
        raise PromptFileError(f"{path}: {problem}; give a file that ends in {', '.join(SUFFIXES)}")
    read = _parquet if path.suffix == ".parquet" else _json
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        read = _jsonl
    empty = True
    for row in read(path):
        yield row
        empty = False
    if empty:
        raise PromptFileError(f"{path}: the file holds no rows; one JSON object a line is expected")


def _jsonl(path: Path) -> Iterator[Row]:
    line = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for line, encoded in enumerate(file, start=1):
                if encoded.strip():
                    value = _decoded(path, f"line {line}", encoded)
                    yield Row(path, f"line {line}", line, _object(path, f"line {line}", value))
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(f"{path}, after line {line}", error) from error


def _json(path: Path) -> Iterator[Row]:
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(str(path), error) from error
    rows = _decoded(path, "the file", content)
    if not isinstance(rows, list):
        raise PromptFileError(f"{path}: a JSON {type(rows).__name__}, not a list of objects")
    for number, value in enumerate(rows, start=1):
        yield Row(path, f"row {number}", number, _object(path, f"row {number}", value))


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(path, f"row {number}", number, fields)
    except (OSError, pyarrow.ArrowException) as error:
        raise _damaged(str(path), error) from error


def _decoded(path: Path, place: str, encoded: bytes) -> Any:
    try:
        return json.loads(encoded)
    except (ValueError, RecursionError) as error:  # bytes that are not UTF-8 are ValueErrors too
        whole = "it must be one whole JSON list"
        if place.startswith("line"):
            whole = "each line must be one whole JSON object"
        raise PromptFileError(f"{path}, {place}: not JSON ({error}); {whole}") from error


def _object(path: Path, place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PromptFileError(
            f"{path}, {place}: a JSON {type(value).__name__}, not an object with fields"
        )
    return value


def _damaged(where: str, error: Exception) -> PromptFileError:
    return PromptFileError(
        f"{where}: cannot be read ({error}); the file is damaged or cut off, get it again"
    )
