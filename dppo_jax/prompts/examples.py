"""One problem as text, the form that every data set is stored in and every verifier reads."""

from typing import NamedTuple


class Example(NamedTuple):
    """A problem on the host. The policy sees `prompt` only; the rest is for rewards and tables."""

    id: str  # unique within a data set, the same in every run
    prompt: str
    answer: str  # what the verifier compares with; its form is the task's
    solution: str  # a worked response that a perfect policy could give; "" where there is none
    subject: str = ""  # such as Algebra; "" where it is not known
    level: str = ""  # of difficulty, such as 1 to 5; "" where it is not known


class PromptFileError(ValueError):
    """A data file that cannot be used. The message names the file, the line and the cure."""
