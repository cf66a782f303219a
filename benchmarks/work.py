"""Work that is timed: its size, and the prompt and guidance of every call."""

from __future__ import annotations

from typing import NamedTuple

from jax.sharding import Mesh

from sdjax.pipeline.devices import Devices

PROMPT = "a photo of a red heart on a wooden table"
GUIDANCE = 7.5
TOKENS = 77


class Work(NamedTuple):
    """The work to be timed.

    Attributes:
        size: pixels of a side.
        batch: rows.
        steps: of the sampler.
        sampler: its name, None for the checkpoint's.
        mesh: over which it is spread; None for one device.
    """

    size: int
    batch: int
    steps: int
    sampler: str | None
    mesh: Mesh | None = None

    @property
    def devices(self) -> Devices:
        """Sharding of the arrays."""
        return Devices(self.mesh)
