"""Trees of parameters and optimiser state over a mesh: their shardings, and what a device holds of them."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from sdjax.parallel.sharding import spec_of


def tree_shardings(shapes: Any, mesh: Mesh) -> Any:
    """A sharding for every leaf of a tree of arrays or shapes: parameters, EMA and optimiser state alike."""

    def sharding(path: jax.tree_util.KeyPath, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, spec_of(path_name(path), leaf.shape, dict(mesh.shape)))

    return jax.tree_util.tree_map_with_path(sharding, shapes)


def path_name(path: jax.tree_util.KeyPath) -> str:
    """Keys, attributes and indices joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shapes_on(shapes: Any, shardings: Any) -> Any:
    """Shapes of arrays that would live as `shardings` says: one for every leaf, or one for all."""

    def on(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda leaf: on(leaf, shardings), shapes)
    return jax.tree.map(on, shapes, shardings)


def device_bytes(shapes: Any) -> int:
    """Bytes that one device holds of a tree of arrays, or of shapes that have a sharding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)
    )
