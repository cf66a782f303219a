"""The mesh: all devices as a grid with the axes data, fsdp, tensor and spatial."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
from jax.sharding import AxisType, Mesh

from sdjax.core.errors import UserError, unknown

AXES = ("data", "fsdp", "tensor", "spatial")


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """A mesh over all devices of all processes.

    Args:
        sizes: devices along each axis; an axis left out has 1, and one axis may be -1, "what is left".

    Raises:
        UserError: an unknown axis, or a product that is not the number of devices.
    """
    for axis in sizes:
        if axis not in AXES:
            raise unknown("mesh axis", axis, AXES, "config.mesh")
    shape = [sizes.get(axis, 1) for axis in AXES]
    devices = jax.device_count()
    fixed = math.prod(size for size in shape if size != -1)
    if shape.count(-1) == 1 and devices % fixed == 0:
        shape[shape.index(-1)] = devices // fixed
    if math.prod(shape) != devices or min(shape) < 1:
        asked = " x ".join(f"{axis}={sizes.get(axis, 1)}" for axis in AXES)
        raise UserError(f"the mesh {asked} does not cover the {devices} devices there are; one axis may be -1")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parse_mesh(text: str) -> dict[str, int]:
    """Devices along each axis of a mesh that is written as "data=2,fsdp=8".

    Raises:
        UserError: a part is not AXIS=NUMBER, an axis is unknown or named twice, or a number is neither -1 nor positive.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, number = (word.strip() for word in part.partition("="))
        if axis not in AXES:
            raise unknown("mesh axis", axis, AXES, f"the mesh {text!r}, which is written as data=2,fsdp=8")
        if axis in sizes:
            raise UserError(f"the mesh {text!r} names the axis {axis} twice")
        if not number.removeprefix("-").isdecimal() or (int(number) < 1 and int(number) != -1):
            raise UserError(f"{part.strip()!r} in the mesh {text!r}: a number of devices is 1 or more, or -1 for the rest")
        sizes[axis] = int(number)
    return sizes
