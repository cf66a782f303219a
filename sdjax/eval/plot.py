"""A line of labelled points as an SVG file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np

from sdjax.core.files import write_text

WIDTH, HEIGHT, MARGIN = 640, 420, 64
TICKS, SPARE = 5, 0.08  # and the share of the range that is left free at both ends
COLOUR = "#2b62d9"


class PlotAxis(NamedTuple):
    """Values along an axis, and its title."""

    title: str
    values: Sequence[float]

    def ticks(self) -> np.ndarray:
        """Marks from a little before the least value to a little after the largest."""
        low, high = min(self.values), max(self.values)
        spare = SPARE * (high - low) or max(abs(low) * SPARE, SPARE)
        return np.linspace(low - spare, high + spare, TICKS)

    def places(self, values: Sequence[float] | np.ndarray, first: float, last: float) -> np.ndarray:
        """Coordinates of values, between those of the first and the last tick."""
        ticks = self.ticks()
        return first + (np.asarray(values) - ticks[0]) / (ticks[-1] - ticks[0]) * (last - first)


def write_plot(path: Path, x: PlotAxis, y: PlotAxis, labels: Sequence[str]) -> None:
    """Write a plot of points joined in their order, each with its label."""
    left, right, top, bottom = MARGIN, WIDTH - MARGIN // 2, MARGIN // 2, HEIGHT - MARGIN
    points = list(zip(x.places(x.values, left, right), y.places(y.values, bottom, top), strict=True))
    columns = zip(x.places(x.ticks(), left, right), x.ticks(), strict=True)
    rows = zip(y.places(y.ticks(), bottom, top), y.ticks(), strict=True)
    parts = [
        f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#888"/>',
        *(_text(at, bottom + 18, f"{value:.4g}") for at, value in columns),
        *(_text(left - 8, at + 4, f"{value:.4g}", "end") for at, value in rows),
        _text((left + right) / 2, HEIGHT - 14, x.title),
        f'<g transform="rotate(-90 16 {bottom / 2})">{_text(16, bottom / 2, y.title)}</g>',
        f'<polyline points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}" fill="none" stroke="{COLOUR}"/>',
        *(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{COLOUR}"/>' for a, b in points),
        *(_text(a, b - 10, label) for (a, b), label in zip(points, labels, strict=True)),
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"'
    body = "\n".join(parts)
    write_text(path, f'{head} font-size="13">\n<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n')


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
