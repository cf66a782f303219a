"""Square crops of images: always the same one, or another one each time that an image is read."""

from __future__ import annotations

import dataclasses
from typing import Any

import grain
import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from sdjax.core.errors import UserError, unknown
from sdjax.data.sources.base import CONDITIONING_IMAGE
from sdjax.data.sources.open import CachedSource, Source
from sdjax.data.transforms.images import SQUARES, Example, Square, seen

RANDOM = "random"


@dataclasses.dataclass(frozen=True)
class RandomSquare(grain.transforms.RandomMap):
    """A square of a random side at a random place, resampled by means (LDM's ImageNetSR, cv2's INTER_AREA).

    Boxes stay shares of the whole image, and `crop`, float32 [4], says which part of it is seen; objects of which
    nothing is seen are left out (CompVis/taming-transformers, annotated_objects_dataset.py with `encode_crop`).

    Attributes:
        size: of the square that comes out, in pixels.
        shares: the smallest and the largest side, as shares of the image's shorter one; 0 is as small as `size`
            (taming's Random2dCrop).

    Raises:
        UserError: the shares are none.
    """

    size: int
    shares: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        smallest, largest = self.shares
        if not 0.0 <= smallest <= largest <= 1.0 or not largest:
            raise UserError(f"config.data.crop_sides={self.shares} must be two shares with 0 <= first <= second <= 1")

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        height, width, _ = element["image"].shape
        short = min(height, width)
        least = self.shares[0] * short or min(self.size, short)
        side = round(rng.uniform(least, max(self.shares[1] * short, least)))
        top, left = (int(rng.integers(0, whole - side + 1)) for whole in (height, width))
        shrinks = Image.Resampling.BOX if side >= self.size else Image.Resampling.BILINEAR
        rules = {"image": shrinks, CONDITIONING_IMAGE: shrinks, "label_map": Image.Resampling.NEAREST}
        changed: dict[str, Any] = {}
        for name in rules.keys() & element.keys():
            cut = np.ascontiguousarray(element[name][top : top + side, left : left + side])
            changed[name] = np.asarray(Image.fromarray(cut).resize((self.size, self.size), rules[name]))
        if "boxes" in element:
            crop = np.array([left / width, top / height, side / width, side / height], np.float32)
            boxes, inside = seen(element["boxes"])
            kept = _meet(boxes, crop)
            changed |= {"crop": crop, "boxes": boxes[kept], "objects": element["objects"][inside][kept]}
        return {**element, **changed}


def squares(images: Source, size: int, rule: str, shares: tuple[float, float]) -> tuple[Source, list[RandomSquare]]:
    """Images as squares: what is always the same, kept in memory, and what is drawn anew each time.

    Args:
        size: in pixels.
        rule: a key of `transforms.SQUARES`, or `RANDOM`.
        shares: of the shorter side, for `RANDOM`.

    Raises:
        UserError: there is no such rule, or the shares are none.
    """
    if cuts := random_cuts(size, rule, shares):
        return CachedSource(images), cuts
    if rule not in SQUARES:
        raise unknown("crop", rule, (*SQUARES, RANDOM), "config.data.crop")
    return CachedSource(grain.MapDataset.source(images).map(Square(size, rule))), []


def random_cuts(size: int, rule: str, shares: tuple[float, float]) -> list[RandomSquare]:
    """The transform that cuts squares anew each time, where `rule` is `RANDOM`."""
    return [RandomSquare(size, (shares[0], shares[1]))] if rule == RANDOM else []


def still(images: Source, size: int, rule: str) -> grain.MapDataset:
    """Images as squares that are always the same, to be looked at: from the middle where `rule` is `RANDOM`."""
    return grain.MapDataset.source(images).map(Square(size, "centre" if rule == RANDOM else rule))


def _meet(boxes: Float[np.ndarray, "n 4"], crop: Float[np.ndarray, " 4"]) -> Bool[np.ndarray, " n"]:
    """Indices of the boxes that have a part inside the crop."""
    first = np.maximum(boxes[:, :2], crop[:2])
    last = np.minimum(boxes[:, :2] + boxes[:, 2:], crop[:2] + crop[2:])
    return np.all(last > first, axis=1)
