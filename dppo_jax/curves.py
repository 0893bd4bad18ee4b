"""Curves over training steps as an SVG text, without a plotting library."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

# Okabe and Ito's eight colours, told apart with any colour vision; the dashes repeat them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999933")
DASHES = ("", "6 3", "2 2")
WIDTH, HEIGHT = 420, 260  # of a panel's axes, in pixels
LEFT, TOP, GAP, LEGEND_LINE = 60, 34, 90, 18


class Panel(NamedTuple):
    """One pair of axes: curves by name, each a list of runs, each a value a step (NaN: none)."""

    title: str
    curves: Mapping[str, Sequence[Sequence[float]]]


def draw(panels: Sequence[Panel]) -> str:
    """The panels side by side: a line for the mean of a curve's runs, a band for their range."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    width = LEFT + len(panels) * (WIDTH + GAP)
    height = TOP + HEIGHT + 50 + LEGEND_LINE * len(names)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for index, panel in enumerate(panels):
        parts.append(f'<g transform="translate({LEFT + index * (WIDTH + GAP)} {TOP})">')
        parts += _axes(panel, names)
        parts.append("</g>")
    for index, name in enumerate(names):
        y = TOP + HEIGHT + 50 + LEGEND_LINE * index
        parts.append(f'<path d="M{LEFT} {y}h30" {_stroke(index)}/>')
        parts.append(f'<text x="{LEFT + 38}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _axes(panel: Panel, names: Sequence[str]) -> list[str]:
    summaries = {name: _summary(runs) for name, runs in panel.curves.items()}
    finite = np.concatenate([s[np.isfinite(s)] for s in summaries.values()] or [np.zeros(0)])
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if high == low:
        low, high = low - 0.5, high + 0.5
    steps = max((s.shape[1] for s in summaries.values()), default=1)

    def x(step: float | int) -> float:
        return round(WIDTH * step / max(1, steps - 1), 1)

    def y(value: float | int) -> float:
        return round(HEIGHT * (high - value) / (high - low), 1)

    parts = [
        f'<text x="{WIDTH / 2}" y="-12" text-anchor="middle" font-size="14">'
        f"{escape(panel.title)}</text>",
        f'<path d="M0 0V{HEIGHT}H{WIDTH}" fill="none" stroke="black"/>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT + 34}" text-anchor="middle">step</text>',
    ]
    for value in _ticks(low, high):
        parts.append(f'<path d="M0 {y(value)}H{WIDTH}" stroke="#dddddd"/>')
        parts.append(f'<text x="-6" y="{y(value) + 4}" text-anchor="end">{value:g}</text>')
    for step in _ticks(0, steps - 1):
        if step == int(step):
            parts.append(
                f'<text x="{x(step)}" y="{HEIGHT + 16}" text-anchor="middle">{step:g}</text>'
            )
    for name, (mean, least, most) in summaries.items():
        seen = [i for i in range(len(mean)) if math.isfinite(mean[i])]
        if not seen:
            continue
        index = names.index(name)
        band = [f"{x(i)},{y(most[i])}" for i in seen]
        band += [f"{x(i)},{y(least[i])}" for i in reversed(seen)]
        colour = COLOURS[index % len(COLOURS)]
        parts.append(f'<polygon points="{" ".join(band)}" fill="{colour}" opacity="0.15"/>')
        line = " ".join(f"{x(i)},{y(mean[i])}" for i in seen)
        parts.append(f'<polyline points="{line}" {_stroke(index)}/>')
    return parts


def _summary(runs: Sequence[Sequence[float]]) -> np.ndarray:
    """Mean, least and greatest a step [3, steps] of the runs that came that far."""
    padded = np.full((len(runs), max(map(len, runs), default=0)), np.nan)
    for row, run in zip(padded, runs, strict=True):
        row[: len(run)] = run
    here = np.isfinite(padded)
    count = here.sum(axis=0)
    mean = np.where(here, padded, 0).sum(axis=0) / np.where(count, count, np.nan)
    least, most = (
        np.where(count, f(np.where(here, padded, fill), axis=0), np.nan)
        for f, fill in ((np.min, np.inf), (np.max, -np.inf))
    )
    return np.stack([mean, least, most])


def _ticks(low: float | int, high: float | int) -> list[float]:
    """About five round numbers within the range."""
    if high <= low:
        return [float(low)]
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    size = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough * 0.999)
    first = math.ceil(low / size - 1e-9)
    return [round(i * size, 12) for i in range(first, math.floor(high / size + 1e-9) + 1)]


def _stroke(index: int) -> str:
    dash = DASHES[index // len(COLOURS) % len(DASHES)]
    colour = COLOURS[index % len(COLOURS)]
    return f'fill="none" stroke="{colour}" stroke-width="1.6" stroke-dasharray="{dash}"'
