"""Devices that hold a pipeline's arrays."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdjax.ops.partition import BATCH, fitting
from sdjax.parallel.sharding import replicated


class Devices(NamedTuple):
    """A mesh, or None for one device."""

    mesh: Mesh | None

    @property
    def shards(self) -> int:
        """Number of devices that a batch is split over."""
        return 1 if self.mesh is None else int(np.prod([self.mesh.shape[axis] for axis in BATCH]))

    @property
    def min_batch(self) -> int:
        """Images that keep every device busy: guidance makes two rows of each."""
        return self.shards // 2 if self.shards % 2 == 0 else self.shards

    def mesh_context(self) -> AbstractContextManager[Any]:
        """Context in which networks split their activations over the mesh."""
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def shard_batch(self, values: Any) -> Any:
        """Put arrays with one row an image on as many devices of the batch axes as divide them."""
        return self._put(values, lambda mesh, array: fitting(dict(mesh.shape), array.shape[:1], (BATCH,)))

    def replicate(self, values: Any) -> Any:
        """Put all of each array on every device."""
        return self._put(values, lambda mesh, array: P())

    def all_gather(self, values: Any) -> Any:
        """Arrays of devices, so that every process can read all of them."""
        return values if self.mesh is None else jax.device_put(values, replicated(self.mesh))

    def _put(self, values: Any, spec: Callable[[Mesh, Any], P]) -> Any:
        mesh = self.mesh
        if mesh is None:
            return jax.device_put(values)

        def put(value: Any) -> jax.Array:
            array = value if isinstance(value, jax.Array) else np.asarray(value)
            sharding = NamedSharding(mesh, spec(mesh, array))
            if isinstance(array, jax.Array):
                return jax.device_put(array, sharding)
            return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])

        return jax.tree.map(put, values)
