"""Which part of a parameter or a batch each device holds, decided from outside the models."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdjax.core.errors import UserError

BATCH_AXES = ("data", "fsdp")
# Gathering a small array costs more than keeping a copy of it.
SMALLEST_SHARDED = 2**12


def fsdp_spec(shape: tuple[int, ...], shards: int) -> P:
    """Splits the largest dimension that `shards` divides, the last of equals; small arrays stay whole."""
    if shards == 1 or np.prod(shape) < SMALLEST_SHARDED:
        return P()
    candidates = [axis for axis, size in enumerate(shape) if size % shards == 0]
    if not candidates:
        return P()
    widest = max(candidates, key=lambda axis: (shape[axis], axis))
    return P(*("fsdp" if axis == widest else None for axis in range(len(shape))))


def tree_shardings(shapes: Any, mesh: Mesh) -> Any:
    """A sharding for every leaf of a tree of arrays or shapes: parameters, EMA and optimiser state alike."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, fsdp_spec(leaf.shape, mesh.shape["fsdp"])), shapes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples are split over data and fsdp devices."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, P())


def check_batch(batch_size: int, mesh: Mesh, place: str) -> None:
    """Raises a UserError unless the devices of the batch axes divide the batch, which has a row at least."""
    if batch_size < 1:
        raise UserError(f"{place}={batch_size}: a batch has at least one row")
    shards = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    if batch_size % shards:
        nearest = sorted({max(shards, batch_size // shards * shards), -(-batch_size // shards) * shards})
        raise UserError(
            f"{place}={batch_size} is not divisible by the {shards} devices of data x fsdp; "
            f"nearest: {', '.join(map(str, nearest))}"
        )


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of a batch of host arrays, as one global array a leaf."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
