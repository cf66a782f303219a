"""Grids of settings, "steps=10,20;sampler=euler,dpmpp_2m", and the labelled sheet of their images."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from sdjax.core.errors import UserError, unknown
from sdjax.data.images import tile
from sdjax.pipeline.options import OPTIONS as TABLE
from sdjax.pipeline.options import check_value, parse_number, parse_value

Value = int | float | str
OPTIONS = {name: option for name, option in TABLE.items() if option.is_axis}
MAX_AXES, MAX_IMAGES, MAX_PIXELS = 3, 1000, 2**25
# 0-3, 10-30:10, 2.5-7.5:0.5; numbers with exponents are written one by one.
RANGE = re.compile(r"([\d.]+)-([\d.]+)(?::([\d.]+))?")
WHITE, BLACK = 255, 0


class Axis(NamedTuple):
    """A setting and the values that it takes in turn."""

    name: str
    values: tuple[Value, ...]


def parse_grid(text: str, place: str = "--grid") -> tuple[Axis, ...]:
    """The axes of a grid: one to three, `name=value,value,...` each, divided by semicolons.

    Numbers may be ranges that include their end where a whole number of steps leads there: `seed=0-3`,
    `steps=10-30:10`. Blanks around names and values do not count.

    Raises:
        UserError: a name or a value is not known, or the grid has too many axes or images; it names the token, at
            which character it begins (from 1), and the choices.
    """
    axes: list[Axis] = []
    for at, part in _pieces(text, ";", 1):
        name, equals, values = part.partition("=")
        where = f"{place} at character {at}"
        if not equals:
            raise UserError(
                f"{part!r} in {where} is not name=value,value; choose a name of: {', '.join(sorted(OPTIONS))}"
            )
        if (name := name.rstrip()) not in OPTIONS:
            raise unknown("setting", name, OPTIONS, where)
        if name in (axis.name for axis in axes):
            raise UserError(f"{name!r} in {where} is there already; give all its values at once")
        if len(axes) == MAX_AXES:
            raise UserError(f"{name!r} in {where} is one too many; a grid has at most {MAX_AXES} settings")
        axes.append(_axis(name, values, at + part.index("=") + 1, place))
    if math.prod(len(axis.values) for axis in axes) > MAX_IMAGES:
        raise UserError(f"{text!r} in {place} asks for more than {MAX_IMAGES} images of each prompt")
    return tuple(axes)


def cells(axes: Sequence[Axis]) -> list[dict[str, Value]]:
    """The settings of every image in reading order: the last axis goes across, those before it go down."""
    return [
        {axis.name: value for axis, value in zip(axes, values, strict=True)}
        for values in itertools.product(*(axis.values for axis in axes))
    ]


def contact_sheet(images: Sequence[UInt8[np.ndarray, "h w 3"]], axes: Sequence[Axis]) -> UInt8[np.ndarray, "H W 3"]:
    """All images of a grid on white: a column for each value of the last axis, and labels above and at the left.

    Args:
        images: in the order of `cells`; they may differ in size. Many or large ones are made smaller, all alike, by a
            whole number.
    """
    columns = len(axes[-1].values)
    rows = len(images) // columns
    height, width, smaller = _fit(images)
    height, width = -(-height // smaller), -(-width // smaller)
    size = max(12, min(height, width) // 16)
    font, gap = ImageFont.load_default(size), size // 2

    across = [_label([axes[-1]], [value]) for value in axes[-1].values]
    down = [_label(axes[:-1], values) for values in itertools.product(*(axis.values for axis in axes[:-1]))]
    pitch = max(width, *(_extent(font, label)[0] for label in across)) + gap
    left = gap + max(_extent(font, label)[0] for label in down) + (gap if len(axes) > 1 else 0)
    line = max(height, *(_extent(font, label)[1] for label in down)) + gap
    top = gap + max(_extent(font, label)[1] for label in across) + gap

    sheet = Image.new("RGB", (left + columns * pitch, top + rows * line), (WHITE,) * 3)
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(across):
        draw.text((left + column * pitch, gap), label, (BLACK,) * 3, font)
    for row, label in enumerate(itertools.islice(itertools.cycle(down), rows)):
        draw.multiline_text((gap, top + row * line), label, (BLACK,) * 3, font)
    for (row, column), image in zip(itertools.product(range(rows), range(columns)), images, strict=True):
        sheet.paste(Image.fromarray(image).reduce(smaller), (left + column * pitch, top + row * line))
    return np.asarray(sheet)


def sheet(images: Sequence[UInt8[np.ndarray, "h w 3"]]) -> UInt8[np.ndarray, "H W 3"]:
    """All images in a nearly square grid, made smaller where they would be too many pixels."""
    height, width, smaller = _fit(images)
    padded = [np.pad(im, [(0, height - im.shape[0]), (0, width - im.shape[1]), (0, 0)]) for im in images]
    reduced = [np.asarray(Image.fromarray(image).reduce(smaller)) for image in padded]
    return tile(np.stack(reduced), math.ceil(math.sqrt(len(reduced))))


def _fit(images: Sequence[np.ndarray]) -> tuple[int, int, int]:
    """The greatest height and width, and the whole number by which all sides are divided to stay in MAX_PIXELS."""
    height, width = (max(image.shape[side] for image in images) for side in (0, 1))
    return height, width, max(1, math.ceil(math.sqrt(len(images) * height * width / MAX_PIXELS)))


def _pieces(text: str, mark: str, at: int) -> Iterator[tuple[int, str]]:
    """Stripped pieces between marks, each with the character that it begins at."""
    for piece in text.split(mark):
        yield at + len(piece) - len(piece.lstrip()), piece.strip()
        at += len(piece) + 1


def _axis(name: str, text: str, at: int, place: str) -> Axis:
    values: list[Value] = []
    for begin, piece in _pieces(text, ",", at):
        where = f"{place} at character {begin}"
        between = RANGE.fullmatch(piece) if OPTIONS[name].is_number else None
        values += _between(name, piece, between, where) if between else [parse_value(name, piece, where)]
        if len(values) > MAX_IMAGES:
            raise UserError(f"{name} {piece!r} in {where} asks for more than {MAX_IMAGES} images")
    return Axis(name, tuple(values))


def _between(name: str, piece: str, match: re.Match[str], where: str) -> list[Value]:
    kind = OPTIONS[name].kind
    first, last = (parse_value(name, match[group], where) for group in (1, 2))
    step = parse_number(f"the step of {name}", match[3] or "1", kind, where)
    if not 0 < step < math.inf or last < first:
        raise UserError(f"{name} {piece!r} in {where}: choose a range first-last:step that grows")
    # Decimal steps are not exact in binary: 0.1 + 0.2 shall be 0.3.
    count = min(math.floor((last - first) / step + 1e-9), MAX_IMAGES) + 1
    return [check_value(name, kind(round(first + i * step, 10)), where) for i in range(count)]


def _label(axes: Sequence[Axis], values: Sequence[Value]) -> str:
    texts = (f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    return "\n".join(f"{axis.name} {text}" for axis, text in zip(axes, texts, strict=True))


def _extent(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, label: str) -> tuple[int, int]:
    """Width and height in pixels."""
    box = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), label, font)
    return math.ceil(box[2]), math.ceil(box[3])
