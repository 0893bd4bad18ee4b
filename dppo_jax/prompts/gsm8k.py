"""GSM8K, grade-school maths word problems, from the dataset's own files.

Rows hold `question` and `answer`; the answer is worked in words and ends in `#### 1,234`. The
prompt is the question as it stands and the solution the answer as it stands, calculator marks
`<<6*7=42>>` included. Source: Cobbe et al. 2021, arXiv:2110.14168.
"""

from pathlib import Path

from dppo_jax.prompts.examples import Example, PromptFileError
from dppo_jax.prompts.jsonl import SUFFIXES, Row, read_rows
from dppo_jax.rewards.numbers import number_text, parse_number


def examples(source: Path) -> dict[str, list[Example]]:
    """The splits in `source`, a folder with train and test files or one file.

    A folder holds `train` and/or `test` with the ending .jsonl or .jsonl.gz. One file makes
    `test` if its name begins with test, else `train`.
    """
    return {
        split: [_example(split, row) for row in read_rows(path)]
        for split, path in _files(source).items()
    }


def _files(source: Path) -> dict[str, Path]:
    if source.is_file():
        return {"test" if source.name.startswith("test") else "train": source}
    if not source.is_dir():
        raise PromptFileError(
            f"{source}: no such file or folder; GSM8K is read from its jsonl files"
        )
    files = {}
    for split in ("train", "test"):
        found = [source / (split + suffix) for suffix in SUFFIXES]
        found = [path for path in found if path.exists()]
        if len(found) > 1:
            raise PromptFileError(f"{found[0]} and {found[1]} both exist; keep one of them")
        if found:
            files[split] = found[0]
    if not files:
        raise PromptFileError(
            f"{source}: no GSM8K files; expected train or test with the ending"
            f" {' or '.join(SUFFIXES)}"
        )
    return files


def _example(split: str, row: Row) -> Example:
    answer = row.text("answer")
    _, marker, final = answer.rpartition("####")
    number = parse_number(final) if marker else None
    if number is None:
        raise row.error(f"the answer ends in {answer[-40:]!r}; it must end in '#### ' and a number")
    return Example(f"{split}-{row.line}", row.text("question"), number_text(number), answer)
