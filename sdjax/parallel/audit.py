"""Audit of bytes: parameters that are sharded over a mesh, and those that every device replicates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import PartitionSpec as P

from sdjax.core.errors import UserError
from sdjax.core.tree import flatten
from sdjax.ops.partition import FSDP
from sdjax.parallel.sharding import spec_of

LIMIT = 0.01
"""The share of a large model's bytes that may stay whole on every device under FSDP."""


class AuditEntry(NamedTuple):
    """One parameter.

    Attributes:
        spec: which axes split its dimensions.
        nbytes: of the whole of it.
        parts: into how many it is split.
    """

    name: str
    shape: tuple[int, ...]
    spec: P
    nbytes: int
    parts: int


class Audit(NamedTuple):
    """All parameters of a model on a mesh."""

    entries: list[AuditEntry]

    @property
    def total(self) -> int:
        """Bytes of the model."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def per_device(self) -> int:
        """Bytes of it that one device holds."""
        return sum(entry.nbytes // entry.parts for entry in self.entries)

    @property
    def replicated(self) -> int:
        """Bytes of the parameters that every device holds whole."""
        return sum(entry.nbytes for entry in self.entries if entry.parts == 1)

    @property
    def share(self) -> float:
        """Fraction of the model's bytes that is replicated."""
        return self.replicated / max(self.total, 1)


def audit(shapes: Mapping[str, Any], sizes: Mapping[str, int]) -> Audit:
    """Sharding of every parameter of a tree.

    Args:
        shapes: of arrays or of `jax.ShapeDtypeStruct`s.
        sizes: devices along each axis of the mesh.
    """
    entries = []
    for name, leaf in flatten(shapes).items():
        spec = spec_of(name, leaf.shape, sizes)
        parts = int(np.prod([sizes[axis] for axis in spec if axis is not None]))
        entries.append(AuditEntry(name, leaf.shape, spec, int(np.prod(leaf.shape)) * leaf.dtype.itemsize, parts))
    return Audit(entries)


def check(found: Audit, sizes: Mapping[str, int], name: str) -> None:
    """Refuses an FSDP mesh that leaves more than `LIMIT` of a model whole on every device.

    Raises:
        UserError: naming the largest parameter that is not split.
    """
    if sizes.get(FSDP, 1) > 1 and found.share > LIMIT:
        worst = max((entry for entry in found.entries if entry.parts == 1), key=lambda entry: entry.nbytes)
        raise UserError(
            f"{found.share:.1%} of {name} is on every device whole, more than {LIMIT:.0%}; the largest is {worst.name} "
            f"{list(worst.shape)}, which {sizes[FSDP]} fsdp devices do not divide; choose a smaller fsdp"
        )
