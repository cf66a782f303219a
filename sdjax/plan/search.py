"""Trying mesh shapes and batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tqdm import tqdm

from sdjax.core.errors import UserError
from sdjax.parallel.mesh import AXES, shapes_of, text_of
from sdjax.plan.plans import Plan

MOST_TENSOR = 8
"""Beyond it heads and features no longer divide, and every block waits for its neighbours."""


class Candidate(NamedTuple):
    """A mesh, devices along each of `AXES`, and a batch."""

    shape: tuple[int, ...]
    batch_size: int

    @property
    def sizes(self) -> dict[str, int]:
        """Axes of the mesh, as `make_mesh` takes them."""
        return dict(zip(AXES, self.shape, strict=True))


class Tried(NamedTuple):
    """A candidate and what became of it."""

    candidate: Candidate
    plan: Plan


def candidates(devices: int, batch_sizes: Sequence[int], accumulate: int = 1, most_spatial: int = 1) -> list[Candidate]:
    """All that divide their batch, likely ones first: little tensor and spatial splitting, large batches.

    Args:
        accumulate: parts of a batch that are worked through in turn.
        most_spatial: devices that rows of an image may be split over.

    Raises:
        UserError: no mesh divides any of the batches.
    """
    shapes = [s for s in shapes_of(devices) if s[2] <= MOST_TENSOR and s[3] <= most_spatial]
    found = [
        Candidate(shape, size)
        for shape in shapes
        for size in batch_sizes
        if size // accumulate % (shape[0] * shape[1]) == 0
    ]
    if not found:
        sizes = ", ".join(map(str, batch_sizes))
        raise UserError(f"--batch_sizes {sizes}: no mesh of {devices} devices divides any of them")
    return sorted(found, key=lambda c: (c.shape[2] * c.shape[3], -c.batch_size, -c.shape[1]))


def search(options: Sequence[Candidate], limit: int, plan: Callable[[Candidate], Plan]) -> tuple[list[Tried], int]:
    """Compiles up to `limit` candidates, with a progress bar; returns those, and how many were left out."""
    tried = []
    with tqdm(options[:limit], desc="compiling", unit="plan") as bar:
        for candidate in bar:
            bar.set_postfix_str(f"{text_of(candidate.shape)} batch {candidate.batch_size}")
            tried.append(Tried(candidate, plan(candidate)))
    return tried, len(options) - len(tried)
