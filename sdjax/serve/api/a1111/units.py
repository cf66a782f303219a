"""Units of A1111's ControlNet extension as options of a call.

Mikubill/sd-webui-controlnet, internal_controlnet/args.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from PIL import Image
from pydantic import AliasChoices, BaseModel, Field, ValidationError

from sdjax.core.errors import UserError, unknown
from sdjax.data.hints.makers import HINTS
from sdjax.data.hints.resize import CROP, FILL, RESIZES, STRETCH
from sdjax.serve.api.a1111.fields import Finite

SCRIPT = "controlnet"
NONE = ("", "none")
IDLE = (0.0, 0.0, 1.0)
"""Strength, beginning and end of a ControlNet without a unit."""
# Makers of hints by the extension's names, and how many of a unit's thresholds are theirs.
MODULES = {
    **{name: name for name in HINTS},
    "invert (from white bg & black line)": "invert",
    "lineart_standard": "lineart",
    "lineart_standard (from white bg & black line)": "lineart",
    "scribble_xdog": "scribble",
    "blur_gaussian": "blur",
    "recolor_luminance": "grey",
    "t2ia_color_grid": "palette",
    "tile_resample": "none",
    "inpaint_only": "inpaint",
    "inpaint_global_harmonious": "inpaint",
}
MODES = ("balanced", "prompt", "control")
MODE_NAMES = {
    "balanced": "balanced",
    "my prompt is more important": "prompt",
    "controlnet is more important": "control",
}
RESIZE_NAMES = {
    **{"just resize": STRETCH, "crop and resize": CROP, "resize and fill": FILL},
    **{"inner fit (scale to fit)": CROP, "outer fit (shrink to fit)": FILL},
    **{"scale to fit (inner fit)": CROP, "envelope (outer fit)": FILL},
}
# What follows a model's name in lists of the extension.
HASH = re.compile(r"\s*\[[0-9a-fA-F]{4,64}\]$")


class Unit(BaseModel):
    """A unit; fields that only steer memory, resolution or the interface are passed over."""

    enabled: bool | None = True
    module: str | None = "none"
    model: str | None = None
    weight: Annotated[Finite, Field(ge=0, le=2)] = 1.0
    image: Any = Field(None, validation_alias=AliasChoices("image", "input_image"))
    mask: Any = Field(None, validation_alias=AliasChoices("mask", "mask_image"))
    resize_mode: int | str | None = CROP
    threshold_a: Finite | None = -1
    threshold_b: Finite | None = -1
    guidance_start: Annotated[Finite, Field(ge=0, le=1)] = 0.0
    guidance_end: Annotated[Finite, Field(ge=0, le=1)] = Field(
        1.0, validation_alias=AliasChoices("guidance_end", "guidance")
    )
    control_mode: int | str | None = 0

    @property
    def thresholds(self) -> tuple[float | None, float | None]:
        """Numbers of the module."""
        return self.threshold_a, self.threshold_b


class Placed(BaseModel, arbitrary_types_allowed=True):
    """A unit that acts, its place among the loaded ControlNets, and its image; None for the one to begin from."""

    unit: Unit
    place: int
    image: Image.Image | None = None

    def cropped(self, size: tuple[int, int], region: tuple[int, int, int, int]) -> Placed:
        """The unit with the part of its image that lies over a region of an image of this width and height."""
        if self.image is None:
            return self
        return self.model_copy(update={"image": self.image.convert("RGB").resize(size).crop(region)})

    @property
    def described(self) -> str:
        """A line for people."""
        unit = self.unit
        acts = f"Weight: {unit.weight:g}, Guidance Start: {unit.guidance_start:g}, Guidance End: {unit.guidance_end:g}"
        return f"Module: {unit.module}, Model: {unit.model}, {acts}"


def read_units(args: Any, names: Sequence[str], decode: Callable[[str, str], Image.Image]) -> list[Placed]:
    """Units that are enabled.

    Args:
        args: of the script: units, or anything else for none.
        names: of the loaded ControlNets.
        decode: reads a text as an image, with its place for messages.

    Raises:
        UserError: a unit is not what it should be, or names a model that is not loaded or another unit has.
    """
    placed: list[Placed] = []
    for number, given in enumerate(args if isinstance(args, list) else []):
        where = f"ControlNet unit {number}"
        if not isinstance(given, dict):  # as the extension has them switched off
            continue
        unit = _unit(given, where)
        if not unit.enabled:
            continue
        place = _place(unit.model, names, where)
        if any(other.place == place for other in placed):
            raise UserError(f"{where}: two units have the model {names[place]!r}; load it twice, or leave one out")
        text = _image_text(unit.image, where)
        placed.append(Placed(unit=unit, place=place, image=decode(text, where) if text else None))
    return placed


def control_options(
    units: Sequence[Placed], count: int, init: Image.Image | None, size: tuple[int, int]
) -> dict[str, Any]:
    """Options of a call by a model with so many ControlNets; those without a unit have no strength.

    Args:
        units: of `read_units`.
        count: of the model's ControlNets.
        init: the image to begin from, which is the hint of units without one.
        size: width and height.

    Raises:
        UserError: a unit has no image, names what is not known, or differs from another in what they share.
    """
    if not count:
        return {}
    by_place = {one.place: one for one in units}
    images, makers, numbers = [], [], []
    for place in range(count):
        one = by_place.get(place)
        images.append(Image.new("RGB", size) if one is None else _hint_image(one, init))
        makers.append("none" if one is None else maker_of(one.unit.module, one.unit.thresholds))
        numbers.append(IDLE if one is None else (one.unit.weight, one.unit.guidance_start, one.unit.guidance_end))
    scale, start, end = (list(values) for values in zip(*numbers, strict=True))
    options = {"control_image": images, "control_from": makers, "control_scale": scale}
    options |= {"control_start": start, "control_end": end}
    if units:
        options["control_mode"] = _shared("control_mode", [_mode(one.unit) for one in units])
        options["control_resize"] = _shared("resize_mode", [_resize(one.unit) for one in units])
    return options


def _unit(given: dict[str, Any], where: str) -> Unit:
    try:
        return Unit.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise UserError(f"{where}: {field}: {first['msg']}") from error


def _place(model: str | None, names: Sequence[str], where: str) -> int:
    """The ControlNet of a name; without one the only one that there is."""
    if not names:
        raise UserError(f"{where}: no ControlNet is loaded")
    wanted = HASH.sub("", model or "").strip().casefold()
    if wanted in NONE and len(names) == 1:
        return 0
    known = [name.casefold() for name in names]
    if wanted not in known:
        raise unknown("ControlNet model", (model or "")[:80], names, where)
    return known.index(wanted)


def _image_text(image: Any, where: str) -> str:
    """A unit's image in base64, in any of the forms that the extension reads; "" for none."""
    if isinstance(image, list) and image:
        image = image[0]
    if isinstance(image, dict):
        image = image.get("image")
    if image is not None and not isinstance(image, str):
        raise UserError(f"{where}: image is no text in base64")
    return image or ""


def _hint_image(one: Placed, init: Image.Image | None) -> Image.Image:
    image = one.image if one.image is not None else init
    if image is None:
        raise UserError(f"the ControlNet unit of model {one.unit.model!r} has no image")
    return image


def maker_of(module: str | None, thresholds: Sequence[float | None]) -> str:
    """The maker of a hint with its numbers, by the extension's name; a threshold that is not above 0 is the usual one.

    Raises:
        UserError: it is not known.
    """
    name = MODULES.get((module or "none").casefold())
    if name is None:
        raise unknown("ControlNet module", (module or "")[:80], MODULES)
    usual = HINTS[name].numbers
    pairs = zip(usual, thresholds[: len(usual)], strict=True)
    numbers = [own if value is None or value <= 0.0 else value for own, value in pairs]
    return ":".join((name, *(f"{number:g}" for number in numbers)))


def _mode(unit: Unit) -> str:
    return _named("control_mode", unit.control_mode, MODES, MODE_NAMES)


def _resize(unit: Unit) -> str:
    return _named("resize_mode", unit.resize_mode, RESIZES, RESIZE_NAMES)


def _named(field: str, value: int | str | None, numbered: Sequence[str], names: dict[str, str]) -> str:
    """A choice that the extension takes as a number or in words; the first one for None."""
    text = str(0 if value is None else value).strip().casefold()
    if text.isdecimal() and int(text) < len(numbered):
        return numbered[int(text)]
    found = names.get(text, text)
    if found not in numbered:
        raise unknown(f"ControlNet {field}", str(value)[:80], names)
    return found


def _shared(field: str, values: Sequence[str]) -> str:
    """The one value of all units."""
    if len(set(values)) > 1:
        raise UserError(f"ControlNet units have the {field} {' and '.join(sorted(set(values)))}; choose one for all")
    return values[0]
