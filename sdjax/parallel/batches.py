"""Batches over a mesh: the rows that each process reads, as one global array."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdjax.core.errors import UserError
from sdjax.ops.partition import BATCH
from sdjax.parallel.mesh import AXES
from sdjax.parallel.sharding import replicated


def replicated_put(mesh: Mesh) -> Callable[[np.ndarray, str], jax.Array]:
    """A function that gives every device all of an array."""

    def place(array: np.ndarray, name: str) -> jax.Array:
        del name
        return jax.device_put(array, replicated(mesh))

    return place


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples are split over data and fsdp devices."""
    return NamedSharding(mesh, P(BATCH))


def rows_of_process(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """Shard of every batch that a process reads, and the number of shards.

    Processes whose devices hold the same rows, because tensor or spatial axes span them, read the same part.

    Args:
        mesh: of all processes.
        process: which one; None for this.

    Raises:
        UserError: two processes share some of their rows and not all.
    """
    shards = int(np.prod([mesh.shape[axis] for axis in BATCH]))
    held: dict[int, set[int]] = {}
    for device, (part,) in batch_sharding(mesh).devices_indices_map((shards,)).items():
        held.setdefault(device.process_index, set()).add(part.indices(shards)[0])
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(len(rows) for rows in parts) != shards or len({len(rows) for rows in parts}) != 1:
        raise UserError(
            f"{dict(mesh.shape)} over {len(held)} processes: some of them share a part of their rows; choose data x "
            "fsdp so that the processes divide it, or it the processes"
        )
    mine = tuple(sorted(held[jax.process_index() if process is None else process]))
    return parts.index(mine), len(parts)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of a batch of host arrays, as one global array a leaf."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def local_mesh() -> Mesh:
    """This process's own devices, along the data axis: for work that processes share without talking."""
    devices = jax.local_devices()
    shape = (len(devices), *[1] * (len(AXES) - 1))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
