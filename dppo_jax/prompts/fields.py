"""Which fields of a row make an example: published mathematics sets, and anyone's own files."""

import re
from dataclasses import dataclass

from dppo_jax.prompts.examples import Example
from dppo_jax.prompts.rows import Row
from dppo_jax.rewards.extraction import boxed

# What DAPO-Math-17k's own rows put around every problem. The project stores the bare problem and
# leaves the instructions to the template; `prompts.templates.DAPO` is this one.
_DAPO_PROMPT = re.compile(
    r"Solve the following math problem step by step\. The last line of your response should be of"
    r" the form Answer: \$Answer \(without quotes\) where \$Answer is the answer to the problem\."
    r"\n\n(?P<problem>.*)\n\nRemember to put your answer on its own line after \"Answer:\"\.",
    re.DOTALL,
)


@dataclass(frozen=True)
class Fields:
    """Names of fields; dots lead into objects and lists. Where there are several, the first that
    a row has is taken; "" where the set has no such field."""

    prompt: tuple[str, ...]
    answer: tuple[str, ...]
    solution: str = ""  # without an answer field, the answer is the last \\boxed{} of this
    subject: tuple[str, ...] = ()
    level: tuple[str, ...] = ()

    def example(self, split: str, row: Row) -> Example:
        """The row's example; its `answer` is "" where the row has none."""
        solution = row.plain(self.solution) if self.solution and row.has(self.solution) else ""
        if solution and not any(row.has(field) for field in self.answer):
            answer = next(iter(boxed(solution)[-1:]), "")
        else:
            answer = row.plain(_present(self.answer, row))
        prompt = row.text(_present(self.prompt, row)).strip()
        if wrapped := _DAPO_PROMPT.fullmatch(prompt):
            prompt = wrapped["problem"].strip()
        subject, level = (
            next((row.plain(field) for field in fields if row.has(field)), "")
            for fields in (self.subject, self.level)
        )
        return Example(
            f"{split}-{row.number}", prompt, answer, solution, subject, level.removeprefix("Level ")
        )


def _present(fields: tuple[str, ...], row: Row) -> str:
    """The first field that the row has, else the first, whose absence is then an error."""
    return next((field for field in fields if row.has(field)), fields[0])
