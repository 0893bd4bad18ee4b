"""GSM8K, grade-school maths word problems, from the dataset's own files.

Rows hold `question` and `answer`; the answer is worked in words and ends in `#### 1,234`. The
prompt is the question as it stands and the solution the answer as it stands, calculator marks
`<<6*7=42>>` included. Source: Cobbe et al. 2021, arXiv:2110.14168.
"""

from dppo_jax.prompts.examples import Example
from dppo_jax.prompts.rows import Row
from dppo_jax.rewards.numbers import number_text, parse_number

HOMES = {
    split: f"datasets/openai/gsm8k/resolve/main/main/{split}-00000-of-00001.parquet"
    for split in ("train", "test")
}


def example(split: str, row: Row) -> Example:
    """One row of the data set's files; its answer is "" where no `#### ` and number end it."""
    solution = row.text("answer")
    _, marker, final = solution.rpartition("####")
    number = parse_number(final) if marker else None
    answer = "" if number is None else number_text(number)
    return Example(f"{split}-{row.number}", row.text("question"), answer, solution)
