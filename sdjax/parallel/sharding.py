"""Which part of a parameter or a batch each device holds, decided from outside the models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdjax.core.errors import UserError
from sdjax.core.partition import BATCH
from sdjax.parallel.rules import spec_of


def tree_shardings(shapes: Any, mesh: Mesh) -> Any:
    """A sharding for every leaf of a tree of arrays or shapes: parameters, EMA and optimiser state alike."""

    def sharding(path: jax.tree_util.KeyPath, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, spec_of(path_name(path), leaf.shape, dict(mesh.shape)))

    return jax.tree_util.tree_map_with_path(sharding, shapes)


def path_name(path: jax.tree_util.KeyPath) -> str:
    """Keys, attributes and indices joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def placer(mesh: Mesh) -> Callable[[np.ndarray, str], jax.Array]:
    """A function that gives every device of all processes its part of an array, which each process holds whole."""

    def place(array: np.ndarray, name: str) -> jax.Array:
        sharding = NamedSharding(mesh, spec_of(name, array.shape, dict(mesh.shape)))
        return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])

    return place


def whole_placer(mesh: Mesh) -> Callable[[np.ndarray, str], jax.Array]:
    """A function that gives every device all of an array."""

    def place(array: np.ndarray, name: str) -> jax.Array:
        del name
        return jax.device_put(array, replicated(mesh))

    return place


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples are split over data and fsdp devices."""
    return NamedSharding(mesh, P(BATCH))


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


def rows_of_process(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """Which part of every batch a process reads, and into how many parts it is divided.

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


def shapes_on(shapes: Any, shardings: Any) -> Any:
    """Shapes of arrays that would live as `shardings` says: one for every leaf, or one for all."""

    def on(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda leaf: on(leaf, shardings), shapes)
    return jax.tree.map(on, shapes, shardings)


def device_bytes(shapes: Any) -> int:
    """What one device holds of a tree of arrays, or of shapes that have a sharding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)
    )
