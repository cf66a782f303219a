"""Meshes as command lines write them."""

from __future__ import annotations

from sdjax.core.errors import UserError, unknown
from sdjax.parallel.mesh import AXES


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
            raise UserError(
                f"{part.strip()!r} in the mesh {text!r}: a number of devices is 1 or more, or -1 for the rest"
            )
        sizes[axis] = int(number)
    return sizes
