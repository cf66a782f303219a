"""Sharding hints: models annotate activations with mesh axes, applied where a mesh is set and the dimension divides.

`jax.set_mesh(mesh)` around a call is what makes the wishes count; without it, or with one device, they mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

DATA, FSDP, TENSOR, SPATIAL = "data", "fsdp", "tensor", "spatial"
BATCH = (DATA, FSDP)
"""Examples are split over both: FSDP is data parallelism whose parameters are split, too."""

Axes: TypeAlias = str | tuple[str, ...] | None
"""The mesh axes that one dimension of an array is split over."""


def fitting(sizes: dict[str, int], shape: Sequence[int], wishes: Sequence[Axes]) -> P:
    """The spec that grants every wish that the shape allows.

    Args:
        sizes, shape: devices along each axis of the mesh, and the array's shape.
        wishes: for each dimension; of several axes the first ones are granted whose product divides it.
    """
    return P(*(_granted(sizes, length, wish) for length, wish in zip(shape, wishes, strict=True)))


def _granted(sizes: dict[str, int], length: int, wish: Axes) -> Axes:
    granted: tuple[str, ...] = ()
    for axis in (wish,) if isinstance(wish, str) else wish or ():
        if sizes.get(axis, 1) > 1 and length % sizes[axis] == 0:
            granted, length = (*granted, axis), length // sizes[axis]
    return (granted or None) if len(granted) != 1 else granted[0]


def constrain(x: Array, *wishes: Axes) -> Array:
    """x, split as wished over the mesh that is set."""
    sizes = mesh_sizes()
    return x if not sizes else jax.lax.with_sharding_constraint(x, fitting(sizes, x.shape, wishes))


def constrain_image(x: Array, channels: Axes = None) -> Array:
    """Images [b h w c], split by examples, rows, and channels as wished."""
    return constrain(x, BATCH, SPATIAL, None, channels)


def per_shard(
    function: Callable[..., Array], arrays: Sequence[Array | None], wishes: Sequence[Sequence[Axes]]
) -> Array:
    """`function` of the arrays, each device on its own part of them, without communication.

    Args:
        function: its result has the shape of the first array, and is split like it.
        arrays: None where an argument is not given.
        wishes: of each.
    """
    sizes = mesh_sizes()
    if not sizes:
        return function(*arrays)
    specs = tuple(P() if a is None else fitting(sizes, a.shape, wish) for a, wish in zip(arrays, wishes, strict=True))
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def mesh_sizes() -> dict[str, int]:
    """Devices along each axis of the mesh that is set; {} where there is but one device."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty or mesh.size == 1 else dict(mesh.shape)
