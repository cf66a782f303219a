"""From an example of a source to what a model reads: square, flipped, in [-1, 1], tokenized. Grain applies them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import grain
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from sdjax.core.errors import UserError, unknown
from sdjax.data.sources.base import CONDITIONING_IMAGE
from sdjax.data.transforms.buckets import mirrored_sizes

Example = Mapping[str, Any]


def square(
    image: UInt8[np.ndarray, "h w *c"], size: int, resampling: Image.Resampling = Image.Resampling.LANCZOS
) -> UInt8[np.ndarray, "s s *c"]:
    """The largest centred square, resampled to `size` pixels (Lanczos is antialiased)."""
    if image.shape[:2] == (size, size):
        return image
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    cut = np.ascontiguousarray(image[top : top + side, left : left + side])
    return np.asarray(Image.fromarray(cut).resize((size, size), resampling))


def adm_square(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "s s 3"]:
    """The centred square of ADM: halved by means while twice as large, then bicubic (guided-diffusion's loader)."""
    small = Image.fromarray(image)
    while min(small.size) >= 2 * size:
        small = small.resize((small.width // 2, small.height // 2), Image.Resampling.BOX)
    scale = size / min(small.size)
    small = small.resize((round(small.width * scale), round(small.height * scale)), Image.Resampling.BICUBIC)
    left, top = (small.width - size) // 2, (small.height - size) // 2
    return np.asarray(small.crop((left, top, left + size, top + size)))


SQUARES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {"centre": square, "adm": adm_square}


def in_square(boxes: Float[np.ndarray, "n 4"], height: int, width: int) -> Float[np.ndarray, "n 4"]:
    """Boxes in shares of an image's sides, as shares of its largest centred square; they may leave it."""
    side = min(height, width)
    scale = np.array([width, height], np.float32) / side
    corner = np.array([(width - side) // 2, (height - side) // 2], np.float32) / side
    return np.concatenate([boxes[:, :2] * scale - corner, boxes[:, 2:] * scale], axis=1)


def seen(boxes: Float[np.ndarray, "n 4"]) -> tuple[Float[np.ndarray, "m 4"], np.ndarray]:
    """The parts of boxes that are inside the image, and of which boxes: those that have such a part."""
    first = np.clip(boxes[:, :2], 0.0, 1.0)
    sizes = np.clip(boxes[:, :2] + boxes[:, 2:], 0.0, 1.0) - first
    kept = np.all(sizes > 0, axis=1)
    return np.concatenate([first, sizes], axis=1)[kept], kept


@dataclasses.dataclass(frozen=True)
class Square(grain.transforms.Map):
    """The centred square of the example's image, and of what is said of places in it.

    Attributes:
        rule: how it is resampled: a key of `SQUARES`.

    Raises:
        UserError: there is no such rule.
    """

    size: int
    rule: str = "centre"

    def __post_init__(self) -> None:
        if self.rule not in SQUARES:
            raise unknown("crop", self.rule, SQUARES, "config.data.crop")

    def map(self, element: Example) -> Example:
        height, width, _ = element["image"].shape
        images = [name for name in ("image", CONDITIONING_IMAGE) if name in element]
        changed: dict[str, Any] = {name: SQUARES[self.rule](element[name], self.size) for name in images}
        if "label_map" in element:
            changed["label_map"] = square(element["label_map"], self.size, Image.Resampling.NEAREST)
        if "boxes" in element and height != width:
            boxes, kept = seen(in_square(element["boxes"], height, width))
            changed |= {"boxes": boxes, "objects": element["objects"][kept]}
        return {**element, **changed}


@dataclasses.dataclass(frozen=True)
class Flip(grain.transforms.RandomMap):
    """Mirrors left and right with the given probability. Captions that speak of left and right do not survive it.

    Where a crop was recorded (`buckets.ToBucket`, `crops.RandomSquare`), it becomes that in the mirrored image; boxes,
    label maps and conditioning images are mirrored, too.
    """

    probability: float = 0.5

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        if rng.random() >= self.probability:
            return element
        mirrored = {
            key: np.ascontiguousarray(element[key][:, ::-1])
            for key in ("image", "label_map", CONDITIONING_IMAGE)
            if key in element
        }
        if "sizes" in element:
            mirrored["sizes"] = mirrored_sizes(element["sizes"])
        for key in ("boxes", "crop"):
            if key in element:
                x, y, width, height = element[key].T
                mirrored[key] = np.stack([1.0 - (x + width), y, width, height], axis=-1)
        return {**element, **mirrored}


@dataclasses.dataclass(frozen=True)
class InRange(grain.transforms.Map):
    """Refuses examples whose `name`, a class or a map of classes, is missing or is not below `classes`.

    Raises:
        UserError: naming the example.
    """

    name: str
    classes: int

    def map(self, element: Example) -> Example:
        if self.name not in element:
            raise UserError(f"the data says no {self.name} of {element['id']!r}, which this task needs")
        largest, least = int(np.max(element[self.name])), int(np.min(element[self.name]))
        if least < 0 or largest >= self.classes:
            raise UserError(
                f"{self.name} of {element['id']!r} has the class {largest if least >= 0 else least}; the model has "
                f"0 to {self.classes - 1}"
            )
        return element


@dataclasses.dataclass(frozen=True)
class OfShape(grain.transforms.Map):
    """Refuses examples whose array `name` is missing or has another shape.

    Raises:
        UserError: naming the example.
    """

    name: str
    shape: tuple[int, ...]

    def map(self, element: Example) -> Example:
        found = np.shape(element[self.name]) if self.name in element else None
        if found != self.shape:
            says = "no such array" if found is None else f"an array of shape {list(found)}"
            raise UserError(f"{self.name} of {element['id']!r}: {says}; this task needs the shape {list(self.shape)}")
        return element


@dataclasses.dataclass(frozen=True)
class Select(grain.transforms.Map):
    """Keeps the named entries only; strings cannot go to a device."""

    names: tuple[str, ...]

    def map(self, element: Example) -> Example:
        return {name: element[name] for name in self.names}
