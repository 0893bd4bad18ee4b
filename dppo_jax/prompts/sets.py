"""The published data sets by name: their files, their public homes, the fields of their rows.

The homes are addresses below the Hugging Face hub. Rows of other copies of the same sets (as the
papers' repositories ship them) differ in field names only, and are read too.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dppo_jax.prompts import gsm8k
from dppo_jax.prompts.examples import Example, PromptFileError
from dppo_jax.prompts.fields import Fields
from dppo_jax.prompts.rows import Row, read_rows
from dppo_jax.prompts.sources import TRAIN_AND_TEST, public_files, split_files

Splits = dict[str, list[Example]]
Dropped = dict[str, dict[str, int]]  # split -> reason -> rows
Unfit = Callable[[Sequence[Example]], Mapping[str, str]]
"""Examples -> the ids of those whose answers are of no use, and why."""

LARGEST_UNFIT_SHARE = 0.01


class Read(NamedTuple):
    """What files hold."""

    splits: Splits
    dropped: Dropped
    unfit: dict[str, str]  # the ids of rows without an answer that can be used, and why


class PublicSet(NamedTuple):
    """A data set of files: `stems` and `homes` give names and addresses for each split."""

    stems: Mapping[str, Sequence[str]]
    homes: Mapping[str, str]
    example: Callable[[str, Row], Example]


_PROBLEM = Fields(("problem", "question"), ("answer",), "solution")
_MATH = Fields(
    ("problem",), ("answer",), "solution", ("subject", "type"), ("level", "difficulty")
)  # MATH's difficulty, where a copy calls it so, is its level
_DAPO = Fields(("prompt.0.content", "prompt"), ("reward_model.ground_truth", "answer"))

PUBLIC: dict[str, PublicSet] = {
    "gsm8k": PublicSet(TRAIN_AND_TEST, gsm8k.HOMES, gsm8k.example),
    "math": PublicSet(  # Hendrycks et al. 2021, arXiv:2103.03874
        {"train": ("train", "math_train_answers"), "test": ("test", "math_test_5000")},
        {
            split: "datasets/DigitalLearningGmbH/MATH-lighteval/resolve/main/data/"
            f"{split}-00000-of-00001.parquet"
            for split in ("train", "test")
        },
        _MATH.example,
    ),
    "math500": PublicSet(  # the 500 test problems of Lightman et al. 2023, arXiv:2305.20050
        {"test": ("test", "math500")},
        {"test": "datasets/HuggingFaceH4/MATH-500/resolve/main/test.jsonl"},
        _MATH.example,
    ),
    "dapo_math_17k": PublicSet(  # Yu et al. 2025, arXiv:2503.14476; the home repeats each problem
        {"train": ("train", "dapo_math_17k", "dapo-math-17k")},
        {
            "train": "datasets/BytedTsinghua-SIA/DAPO-Math-17k/resolve/main/data/"
            "dapo-math-17k.parquet"
        },
        _DAPO.example,
    ),
    "aime24": PublicSet(
        {"test": ("test", "aime24")},
        {"test": "datasets/HuggingFaceH4/aime_2024/resolve/main/data/train-00000-of-00001.parquet"},
        _PROBLEM.example,
    ),
    "aime25": PublicSet(
        {"test": ("test", "aime25")},
        {"test": "datasets/math-ai/aime25/resolve/main/test.jsonl"},
        _PROBLEM.example,
    ),
    "amc": PublicSet(
        {"test": ("test", "amc")},
        {
            "test": "datasets/AI-MO/aimo-validation-amc/resolve/main/data/"
            "train-00000-of-00001.parquet"
        },
        _PROBLEM.example,
    ),
    "sanity_math_1k5": PublicSet(  # the sanity test of arXiv:2602.04879: 1,460 problems of MATH
        {"train": ("train", "precision_rl_sanity_math_1k5", "sanity_math_1k5")},
        {
            "train": "datasets/sail/Sanity-Test-R1D-1.5B/resolve/main/data/"
            "train-00000-of-00001.parquet"
        },
        _PROBLEM.example,
    ),
}


def read_public(name: str, source: Path | None, unfit: Unfit | None = None) -> Read:
    """The examples of a published set from a file or folder, or where None from its home."""
    known = PUBLIC[name]
    if source is None:
        with public_files(name, known.homes) as files:
            return _read(files, known.example, unfit)
    if source.is_file() and (other := _set_of(source.name)) not in (name, None):
        raise PromptFileError(
            f"{source}: by its name this is {other}, not {name}; rename it if not"
        )
    return _read(split_files(source, name, known.stems), known.example, unfit)


def _set_of(file: str) -> str | None:
    """The published set whose file this is by its name; None where several may have such a one."""
    stems = [
        (stem, name) for name, each in PUBLIC.items() for s in each.stems.values() for stem in s
    ]
    found = {name for stem, name in stems if file.startswith(stem)}
    return found.pop() if len(found) == 1 else None


def read_own(
    name: str, source: Path, fields: Fields, split: str | None, unfit: Unfit | None = None
) -> Read:
    """The examples of anyone's files: a folder with train and test files, or one file.

    One file makes `split`, else `test` where its name begins so and `train` where not.
    """
    if split is not None and source.is_dir():
        raise PromptFileError(f"{source} is a folder: its file names say the splits, not --split")
    files = {split: source} if split else split_files(source, name, TRAIN_AND_TEST)
    return _read(files, fields.example, unfit)


def _read(
    files: Mapping[str, Path], example: Callable[[str, Row], Example], unfit: Unfit | None
) -> Read:
    """Every row of every file; of equal problems one stays, of contradicting ones none.

    Train loses what is also in test. An answer that is null or blank, or that `unfit` finds of no
    use, leaves its row out; where more than 1 % of a file's rows are so, PromptFileError.
    """
    read = Read({}, {}, {})
    for split in sorted(files, key=lambda split: split != "test"):  # test first
        tested = {row.prompt for row in read.splits.get("test", [])}
        first: dict[str, Example] = {}
        times: Counter[str] = Counter()  # of each problem
        contradicting = set()
        useless: dict[str, str] = {}
        for row in (example(split, row) for row in read_rows(files[split])):
            if not row.answer:
                useless[row.id] = "no answer"
                continue
            times[row.prompt] += 1
            if first.setdefault(row.prompt, row).answer != row.answer:
                contradicting.add(row.prompt)
        reasons = Counter({"no answer": len(useless)})
        found = unfit(list(first.values())) if unfit else {}
        useless |= found
        if len(useless) > LARGEST_UNFIT_SHARE * (rows := len(first) + reasons["no answer"]):
            few = "; ".join(f"{row} ({why})" for row, why in list(useless.items())[:3])
            raise PromptFileError(
                f"{files[split]}: {len(useless)} of {rows} problems have no answer that can be"
                f" used: {few}; remove them, or name the field and verifier that fit"
            )
        read.unfit.update(useless)
        kept = read.splits[split] = []
        for problem, row in first.items():
            if problem in contradicting:
                reasons["contradicting answers"] += times[problem]
            elif problem in tested:
                reasons["also in test"] += times[problem]
            elif row.id in found:
                reasons["unfit answer"] += times[problem]
            else:
                kept.append(row)
                reasons["duplicate"] += times[problem] - 1
        if not kept:
            raise PromptFileError(f"{files[split]}: no usable row is left of {times.total()}")
        if counted := {reason: count for reason, count in reasons.items() if count}:
            read.dropped[split] = counted
    return read
