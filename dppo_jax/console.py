"""What a person watches: one live line a step on a terminal, a line now and then elsewhere."""

import math
import time
from collections.abc import Iterable, Mapping

from rich.console import Console as RichConsole
from rich.live import Live
from rich.table import Table
from rich.text import Text

SECONDS_BETWEEN_LINES = 5.0  # where the output is a file or a pipe

SHADES = ((0.9, "green"), (0.5, "yellow"), (0.1, "dark_orange"), (0.0, "bold red"))


def duration(seconds: float) -> str:
    """Seconds as 0:07, 12:31 or 1:02:03; ? where they are not known."""
    if math.isnan(seconds):
        return "?"
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


class Console:
    """Progress of one run. Quiet where another process of the run does the talking."""

    def __init__(self, *, quiet: bool = False):
        self._rich = RichConsole(quiet=quiet, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._last_line = 0.0

    def say(self, text: str) -> None:
        """A line that stays."""
        self._rich.print(Text(text))

    def step(
        self, label: str, done: int, total: int, fields: Mapping[str, str], seconds_left: float
    ) -> None:
        """Progress `done` of `total`; the last one stays."""
        shown = "  ".join(f"{name} {value}" for name, value in fields.items())
        line = Text(f"{label} {done}/{total}  {shown}  left {duration(seconds_left)}", no_wrap=True)
        if self._rich.is_terminal:
            if self._live is None:
                self._live = Live(console=self._rich, refresh_per_second=8)
                self._live.start()
            self._live.update(line)
        now = time.monotonic()
        if done == total or (
            not self._rich.is_terminal and now - self._last_line >= SECONDS_BETWEEN_LINES
        ):
            self.finish_line()
            self._last_line = now
            self._rich.print(line)

    def finish_line(self) -> None:
        """Ends the live line, so that what follows stands below it."""
        if self._live is not None:
            self._live.update(Text(""))
            self._live.stop()
            self._live = None

    def answer(self, number: int, of: int) -> None:
        """The line above an answer; none where there is but one."""
        if of > 1:
            self._rich.print(
                Text(f"{chr(10) * bool(number)}answer {number + 1} of {of}"), style="dim"
            )

    def pieces(self, pieces: Iterable[tuple[str, float]], *, coloured: bool) -> None:
        """Text with log-probabilities, as it comes, without a line's end."""
        text = Text()
        for part, logp in pieces:
            style = next(style for least, style in SHADES if math.exp(logp) >= least)
            text.append(part, style if coloured else "")
        self._rich.print(text, end="")
        self._rich.file.flush()

    def legend(self) -> None:
        """What the colours of `pieces` mean."""
        text = Text("\n\nprobability  ")
        for least, style in SHADES:
            text.append(f" {least:g} or more " if least else " less ", style)
        self._rich.print(text, end="")

    def table(self, title: str, rows: Mapping[str, str]) -> None:
        """Two columns under a title."""
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column()
        table.add_column(overflow="fold")  # a path is of no use without its end
        for name, value in rows.items():
            table.add_row(name, value)
        self._rich.print(table)
