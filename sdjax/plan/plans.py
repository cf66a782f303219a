"""A plan: all programs of a task on one mesh, whether they fit, and how fast they would be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh
from tqdm import tqdm

from sdjax.parallel.mesh import text_of
from sdjax.plan.chips import GIB, Chip
from sdjax.plan.programs import Figures, Program, Refused, compile_program
from sdjax.plan.roofline import Estimate, estimate
from sdjax.plan.topology import Target


class PlannedProgram(NamedTuple):
    """One program of a plan, compiled; `estimate` is of all its turns, None where it was refused."""

    name: str
    turns: int
    result: Figures | Refused
    estimate: Estimate | None


class Plan(NamedTuple):
    """Programs that one batch goes through one after another.

    Attributes:
        chip: what each of the devices is.
        devices: their number.
        mesh: as text, "data=2,fsdp=8".
        images: of a batch, over all devices.
    """

    chip: Chip
    devices: int
    mesh: str
    images: int
    parts: tuple[PlannedProgram, ...]

    @property
    def refused(self) -> PlannedProgram | None:
        """The first program that the compiler could not fit into memory."""
        return next((part for part in self.parts if isinstance(part.result, Refused)), None)

    @property
    def peak(self) -> float | None:
        """Bytes on each device of the program that needs most; None where a compiler refused and does not say."""
        needs = [p.result.needed if isinstance(p.result, Refused) else p.result.memory.peak for p in self.parts]
        return None if None in needs else max(needs)  # pyright: ignore[reportArgumentType]

    @property
    def free(self) -> float | None:
        """Bytes left on each device, negative where there are too few; None where they are not known."""
        part = self.refused
        refusal: Any = part.result if part else None
        if refusal is not None:
            return None if refusal.needed is None else refusal.available - refusal.needed
        return None if self.chip.usable is None or self.peak is None else self.chip.usable * GIB - self.peak

    @property
    def fits(self) -> bool | None:
        """None where the devices' memory is not known."""
        return False if self.refused else None if self.free is None else self.free >= 0

    @property
    def seconds(self) -> float | None:
        """Seconds of a batch; see `Estimate.seconds`."""
        return self._sum("seconds")

    @property
    def least(self) -> float | None:
        """Least seconds of a batch; see `Estimate.least`."""
        return self._sum("least")

    @property
    def speed(self) -> float | None:
        """Images a second."""
        return self.images / self.seconds if self.seconds else None

    @property
    def utilisation(self) -> float | None:
        """Fraction of the peak of all devices, by the mathematics alone: recomputation does not count (MFU)."""
        if not self.seconds or self.chip.flops is None:
            return None
        model = sum(p.turns * p.result.flops.model for p in self.parts if isinstance(p.result, Figures))
        return model / (self.seconds * self.chip.flops * self.devices)

    def _sum(self, name: str) -> float | None:
        seconds = [None if part.estimate is None else getattr(part.estimate, name) for part in self.parts]
        known = [each for each in seconds if each is not None]
        return sum(known) if known and len(known) == len(seconds) else None


def make_plan(programs: Sequence[Program], images: int, target: Target, mesh: Mesh) -> Plan:
    """Compiles the programs in turn, up to the first that does not fit."""
    parts: list[PlannedProgram] = []
    for program in tqdm(programs, desc="compiling", unit="program", leave=False):
        result = compile_program(program, target, mesh)
        known = isinstance(result, Figures)
        timed = estimate(result, target.chip, mesh.size, program.turns) if known else None
        parts.append(PlannedProgram(program.name, program.turns, result, timed))
        if not known:
            break
    sizes = text_of(tuple(mesh.shape.values()))
    return Plan(target.chip, mesh.size, sizes, images, tuple(parts))
