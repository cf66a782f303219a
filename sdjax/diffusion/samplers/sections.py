"""Uneven choices of timesteps, by how many each of equal sections has (openai/guided-diffusion, respace.py).

Those of DeepFloyd IF, by its names (deep-floyd/IF, deepfloyd_if/pipelines): what is fast for stage I, and for stage II
most of the steps at the last levels.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

SECTIONS = {  # of the timesteps from 0 on, which come last
    "fast27": (10, 10, 3, 2, 2),
    "smart27": (7, 4, 2, 1, 2, 4, 7),
    "smart50": (10, 6, 4, 3, 2, 2, 3, 4, 6, 10),
    "smart100": (*(1,) * 4, *(2,) * 6, 3, 3, 4, 4, 5, 5, 6, 7, 7, 8, 9, 10, 13),
    "smart185": (1, 1, 2, 2, 2, 3, 3, 3, *range(4, 17), 18, 20),
    "super27": (*(1,) * 7, 2, 5, 13),
    "super40": (*(2,) * 6, 3, 4, 6, 15),
    "super100": (4, 4, 6, 6, 8, 8, 10, 10, 14, 30),
}
"""Number of timesteps of each section, by the choice's name."""


def section_timesteps(counts: tuple[int, ...], total: int) -> Int[np.ndarray, " n"]:
    """Descending timesteps of `total`, evenly spaced within each section and its ends among them."""
    ends = np.cumsum([0, *(total // len(counts) + (i < total % len(counts)) for i in range(len(counts)))])
    sections = [
        # Strides are added up one by one, whose rounding decides the halves (respace.py has a loop).
        first + np.round(np.cumsum([0.0, *[(last - first - 1) / max(count - 1, 1)] * (count - 1)]))
        for first, last, count in zip(ends, ends[1:], counts, strict=False)
    ]
    return np.concatenate(sections)[::-1].astype(np.int64)


def steps_of(schedule: str | None) -> int | None:
    """Number of steps that a choice of timesteps has; None where the schedule leaves it open."""
    return sum(SECTIONS[schedule]) if schedule in SECTIONS else None
