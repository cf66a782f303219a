"""Settings written as text, in grids and in prompt files: their names, types and ranges."""

from __future__ import annotations

import math
from typing import NamedTuple

from sdjax.core.errors import UserError, unknown
from sdjax.diffusion.samplers import SAMPLERS, SPACINGS

Value = int | float | str


class Option(NamedTuple):
    """What a setting may be.

    Attributes:
        kind: int, float or str.
        least, most: of numbers, inclusive; whatever narrower range a checkpoint has is its own affair.
        choices: of texts; () for any.
    """

    kind: type[int] | type[float] | type[str]
    least: float = 0
    most: float = math.inf
    choices: tuple[str, ...] = ()


NUMBERS = {
    "steps": Option(int, 1),
    "seed": Option(int),
    "width": Option(int, 1),
    "height": Option(int, 1),
    "clip_skip": Option(int),
    "guidance_scale": Option(float),
    "guidance_rescale": Option(float, 0, 1),
    "eta": Option(float, 0, 1),
    "strength": Option(float, 0, 1),
}
CHOICES = {
    "sampler": Option(str, choices=tuple(SAMPLERS)),
    "schedule": Option(str, choices=SPACINGS),
}


def read_value(name: str, text: str, option: Option, place: str) -> Value:
    """A setting's value, of its type and in its range.

    Args:
        name: of the setting.
        text: its value as written.
        option: what it may be.
        place: what an error names, e.g. "--grid at character 7".

    Raises:
        UserError: it is not one of the choices, no number, or out of range.
    """
    if option.kind is not str:
        return read_number(name, text, option, place)
    if option.choices and text not in option.choices:
        raise unknown(name, text, option.choices, place)
    return text


def read_number(name: str, text: str, option: Option, place: str) -> int | float:
    """As `read_value`, of a setting that is a number."""
    try:
        value = int(text) if option.kind is int else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not option.least <= value <= option.most:
        kind = "an integer" if option.kind is int else "a number"
        most = "" if math.isinf(option.most) else f" and at most {option.most:g}"
        raise UserError(f"{name} {text!r} in {place}: choose {kind} of at least {option.least:g}{most}")
    return value
