"""Where the seconds of a step go, and how many are left."""

import time


class Pace:
    """Time left at the pace of the steps so far, without the first, which compiles."""

    def __init__(self):
        self._steps = -1

    def seconds_left(self, steps_left: int) -> float:
        """Call it once after each step; NaN after the first."""
        self._steps += 1
        if self._steps == 0:
            self._since = time.monotonic()
            return float("nan")
        return (time.monotonic() - self._since) / self._steps * steps_left


class Stopwatch:
    """Seconds of each part of a step, under `time/`."""

    def __init__(self):
        self.seconds: dict[str, float] = {"time/step": 0.0}
        self._last = time.monotonic()

    def lap(self, part: str) -> None:
        """Gives the time since the last lap to `part`."""
        now = time.monotonic()
        self.seconds[f"time/{part}"] = self.seconds.get(f"time/{part}", 0.0) + now - self._last
        self.seconds["time/step"] += now - self._last
        self._last = now
