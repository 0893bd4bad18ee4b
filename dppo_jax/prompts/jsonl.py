"""Rows of a .jsonl or .jsonl.gz file; whatever is wrong with one names the file and the line."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dppo_jax.prompts.examples import PromptFileError

SUFFIXES = (".jsonl", ".jsonl.gz")


class Row(NamedTuple):
    """One object of the file and where it stands."""

    path: Path
    line: int  # counted from 1, as editors do
    fields: dict[str, Any]

    def text(self, field: str) -> str:
        """The field, which must be a string with something in it."""
        value = self.fields.get(field)
        if not isinstance(value, str) or not value.strip():
            found = "is missing" if field not in self.fields else f"is {value!r}"
            raise self.error(
                f"field {field!r} {found}; it must be a non-empty string"
                f" (the row has {', '.join(map(repr, self.fields)) or 'no fields'})"
            )
        return value

    def error(self, problem: str) -> PromptFileError:
        """An error about this row, for the caller to raise."""
        return PromptFileError(f"{self.path}, line {self.line}: {problem}")


def read_rows(path: Path) -> Iterator[Row]:
    """Yields every row; blank lines are skipped, a file without rows is an error."""
    if not path.is_file():
        raise PromptFileError(f"{path}: no such file; give a .jsonl or .jsonl.gz file")
    line, rows = 0, 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for line, encoded in enumerate(file, start=1):
                if encoded.strip():
                    yield Row(path, line, _object(path, line, encoded))
                    rows += 1
    except (OSError, EOFError, zlib.error) as error:
        raise PromptFileError(
            f"{path}, after line {line}: cannot be read ({error}); the file is damaged or cut off,"
            " get it again"
        ) from error
    if not rows:
        raise PromptFileError(f"{path}: the file holds no rows; one JSON object a line is expected")


def _object(path: Path, line: int, encoded: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(encoded)
    except (ValueError, RecursionError) as error:  # bytes that are not UTF-8 are ValueErrors too
        raise PromptFileError(
            f"{path}, line {line}: not JSON ({error}); each line must be one whole JSON object"
        ) from error
    if not isinstance(fields, dict):
        raise PromptFileError(
            f"{path}, line {line}: a JSON {type(fields).__name__}, not an object with fields"
        )
    return fields
