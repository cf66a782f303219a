"""Estimate of a program's seconds at published peaks (Williams et al. 2009, Roofline)."""

from __future__ import annotations

from typing import NamedTuple

from sdjax.plan.chips import Chip
from sdjax.plan.programs import Figures

ASSUMPTIONS = (
    "Time is the greater of arithmetic and memory traffic, which overlap within a kernel, and then communication, "
    "which compilers overlap in part only: so it is an upper bound of this model; with all three overlapped it is the "
    "lower bound that stands beside it. Neither knows of latencies, of the host, or of waiting for data.",
    "Arithmetic: matrix products and convolutions at the published dense bfloat16 peak. Of one device it is the "
    "greater of its equal share of the traced program and of what its part of the compiled program shows, where "
    "arithmetic that several devices repeat counts and that of hand-written kernels does not.",
    "Memory: every kernel reads its operands and writes its results once at the published bandwidth; what the compiler "
    "keeps in on-chip memory is free; the padding of tiles, and what hand-written kernels read twice, is not counted.",
    "Communication: a device sends what ring algorithms send, over one axis of the torus: one direction of the links "
    "to both neighbours there, at the published bandwidth. Slices too small to close their rings are slower; links "
    "between hosts or slices other than the chips' own are not modelled.",
    "Loops count with every turn, branches as if they were taken; a sampler's scan has one turn a network call.",
)


class Estimate(NamedTuple):
    """Seconds of one call at published peaks.

    Attributes:
        compute, memory, links: of arithmetic, memory traffic, communication; None where nothing is published.
    """

    compute: float | None
    memory: float | None
    links: float | None

    @property
    def seconds(self) -> float | None:
        """With communication that overlaps with nothing; None where a part is not known."""
        if self.compute is None or self.memory is None or self.links is None:
            return None
        return max(self.compute, self.memory) + self.links

    @property
    def least(self) -> float | None:
        """With everything overlapped."""
        parts = [part for part in self if part is not None]
        return max(parts) if len(parts) == 3 else None

    @property
    def bound(self) -> str:
        """Name of the bottleneck."""
        parts = {name: part for name, part in zip(self._fields, self, strict=True) if part is not None}
        return max(parts, key=lambda name: parts[name]) if len(parts) == 3 else "-"


def estimate(figures: Figures, chip: Chip, devices: int, turns: int = 1) -> Estimate:
    """Estimate for `turns` calls of a program."""
    work = max(figures.flops.traced / devices, figures.flops.device)
    sent = sum(moved.nbytes for moved in figures.moved.values())
    bandwidth = None if chip.bandwidth is None else chip.bandwidth * 1e9
    return Estimate(
        *(_over(turns * x, rate) for x, rate in ((work, chip.flops), (figures.traffic, bandwidth), (sent, chip.out)))
    )


def _over(amount: float, rate: float | None) -> float | None:
    return None if rate is None else amount / rate
