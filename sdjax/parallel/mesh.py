"""The mesh: all devices as a grid with the axes data, fsdp, tensor and spatial."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from sdjax.core.errors import UserError, unknown
from sdjax.ops.partition import DATA, FSDP, SPATIAL, TENSOR

AXES = (DATA, FSDP, TENSOR, SPATIAL)


def make_mesh(sizes: Mapping[str, int], over: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices of all processes.

    Args:
        sizes: devices along each axis; an axis left out has 1, and one axis may be -1, "what is left".
        over: other devices, such as those of a topology that is only compiled for.

    Raises:
        UserError: an unknown axis, or a product that is not the number of devices.
    """
    for axis in sizes:
        if axis not in AXES:
            raise unknown("mesh axis", axis, AXES, "config.mesh")
    shape = [sizes.get(axis, 1) for axis in AXES]
    devices = jax.device_count() if over is None else len(over)
    fixed = math.prod(size for size in shape if size != -1)
    if shape.count(-1) == 1 and devices % fixed == 0:
        shape[shape.index(-1)] = devices // fixed
    if math.prod(shape) != devices or min(shape) < 1:
        near = "; ".join(text_of(shape) for shape in nearest_shapes(sizes, devices))
        raise UserError(
            f"the mesh {text_of([sizes.get(axis, 1) for axis in AXES])} does not cover the {devices} devices there "
            f"are; nearest: {near}; one axis may be -1"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=over)


def text_of(shape: Sequence[int]) -> str:
    """The axes with more than one device, as command lines write them; "data=1" where there is none."""
    return ",".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True) if size != 1) or "data=1"


def shapes_of(devices: int, axes: int = len(AXES)) -> list[tuple[int, ...]]:
    """Every mesh shape of so many devices, the first axes' largest first."""
    if axes == 1:
        return [(devices,)]
    sizes = [size for size in range(devices, 0, -1) if devices % size == 0]
    return [(size, *rest) for size in sizes for rest in shapes_of(devices // size, axes - 1)]


def nearest_shapes(sizes: Mapping[str, int], devices: int, count: int = 3) -> list[tuple[int, ...]]:
    """The mesh shapes of `devices` that differ least from the wished one, in doublings along all axes together."""
    wished = [sizes.get(axis, 1) for axis in AXES]

    def distance(shape: tuple[int, ...]) -> float:
        return sum(abs(math.log2(size / max(wish, 1))) for size, wish in zip(shape, wished, strict=True) if wish != -1)

    return sorted(shapes_of(devices), key=distance)[:count]
