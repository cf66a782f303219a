"""Which part of a parameter or a batch each device holds, decided from outside the models."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdjax.core.errors import UserError
from sdjax.core.partition import BATCH
from sdjax.parallel.rules import spec_of


def placer(mesh: Mesh) -> Callable[[np.ndarray, str], jax.Array]:
    """A function that gives every device of all processes its part of an array, which each process holds whole."""

    def place(array: np.ndarray, name: str) -> jax.Array:
        sharding = NamedSharding(mesh, spec_of(name, array.shape, dict(mesh.shape)))
        return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])

    return place


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, P())


def check_batch(batch_size: int, mesh: Mesh, place: str) -> None:
    """Raises a UserError unless the devices of the batch axes divide the batch, which has a row at least."""
    if batch_size < 1:
        raise UserError(f"{place}={batch_size}: a batch has at least one row")
    shards = int(np.prod([mesh.shape[axis] for axis in BATCH]))
    if batch_size % shards:
        nearest = sorted({max(shards, batch_size // shards * shards), -(-batch_size // shards) * shards})
        raise UserError(
            f"{place}={batch_size} is not divisible by the {shards} devices of data x fsdp; "
            f"nearest: {', '.join(map(str, nearest))}"
        )
