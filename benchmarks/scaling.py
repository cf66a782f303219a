"""The same sampling on 1, 2, 4, ... devices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from benchmarks.devices import mesh_text
from sdjax.core.errors import UserError
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.sharding import check_batch
from sdjax.pipeline.devices import Devices
from sdjax.plan import report
from sdjax.plan.collectives import KINDS as COLLECTIVES

KINDS = ("weak", "strong")


class Measurement(NamedTuple):
    """A mesh and the rows of a batch over all of it."""

    mesh: Mesh
    batch: int


class Measured(NamedTuple):
    """A measurement.

    Attributes:
        seconds: of a call.
        images: of a call; of a network alone, its rows.
        sent: bytes that each device sends in a call, by the kind of collective.
        row: figures of the table of single runs, by the name of their column.
    """

    seconds: float
    images: int
    sent: dict[str, int]
    row: dict[str, str]

    @property
    def speed(self) -> float:
        """Images a second."""
        return self.images / self.seconds


def points(sizes: Mapping[str, int], batch: int, kind: str, devices: Sequence[Any]) -> list[Measurement]:
    """One device, then every power of two of them, up to all, over which the mesh can be laid.

    Args:
        sizes: devices along each axis; the one of -1 grows.
        batch: rows, of each device where `kind` is "weak", of all together where it is "strong".
        kind: one of `KINDS`.
        devices: all.

    Raises:
        UserError: no axis is -1, or a mesh does not divide its batch.
    """
    if list(sizes.values()).count(-1) != 1:
        raise UserError("--scaling wants a --mesh with one axis that grows, such as data=-1 or data=-1,tensor=2")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    counts = [2**i for i in range(len(devices).bit_length()) if 2**i % fixed == 0 or i == 0]
    found = []
    for count in counts:
        mesh = make_mesh({"data": 1} if count % fixed else sizes, devices[:count])
        rows = batch * count if kind == "weak" else batch
        check_rows(rows, mesh)
        found.append(Measurement(mesh, rows))
    return found


def check_rows(rows: int, mesh: Mesh) -> None:
    """Raises a UserError unless every device of the mesh gets as many rows as the others."""
    if rows != Devices(mesh).min_batch:  # with guidance an image has two
        check_batch(rows, mesh, f"on {mesh_text(mesh)}, --batch")


def rows(measured: Sequence[tuple[Measurement, Measured]]) -> list[dict[str, str]]:
    """A row for each; efficiency is the speed of a device by that of the first, which is alone."""
    alone = measured[0][1].speed
    return [
        {
            "what": found.row["what"],
            "devices": str(mesh.size),
            "mesh": mesh_text(mesh),
            "s a batch": f"{found.seconds:.3g}",
            "images/s": f"{found.speed:.3g}",
            "efficiency": f"{found.speed / (mesh.size * alone):.1%}",
            **{f"{kind}, B": f"{found.sent.get(kind, 0):,}" for kind in COLLECTIVES},
        }
        for (mesh, _), found in measured
    ]


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """The rows as Markdown, below what they are of; kinds of collectives that none has are left out."""
    columns = [name for name in rows[0] if name != "what" and any(row[name] != "0" for row in rows)]
    lines = "\n".join(row["what"] for row in rows)
    return f"{lines}\n\n{report.table(columns, [[row[name] for name in columns] for row in rows])}"
