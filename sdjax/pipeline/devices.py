"""Where a pipeline's arrays go."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from sdjax.core.partition import BATCH
from sdjax.parallel.sharding import batch_sharding, replicated


class Devices(NamedTuple):
    """A mesh, or None for one device."""

    mesh: Mesh | None

    @property
    def shards(self) -> int:
        """Over how many devices a batch is split."""
        return 1 if self.mesh is None else int(np.prod([self.mesh.shape[axis] for axis in BATCH]))

    def rows(self, values: Any) -> Any:
        """One row an image, split over the devices of the batch axes."""
        return jax.device_put(values, None if self.mesh is None else batch_sharding(self.mesh))

    def whole(self, values: Any) -> Any:
        """All of it on every device."""
        return jax.device_put(values, None if self.mesh is None else replicated(self.mesh))

    def everywhere(self, values: Any) -> Any:
        """Arrays of devices, so that every process can read all of them."""
        return values if self.mesh is None else jax.device_put(values, replicated(self.mesh))
