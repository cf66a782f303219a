"""From an example of a source to what a model reads: square, flipped, in [-1, 1], tokenized. Grain applies them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from sdjax.data.buckets import mirrored_sizes
from sdjax.data.tokenizers import Tokenizer

Example = Mapping[str, Any]


def square(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "s s 3"]:
    """The largest centred square, resampled to `size` pixels (Lanczos, antialiased)."""
    if image.shape[:2] == (size, size):
        return image
    height, width, _ = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    cut = np.ascontiguousarray(image[top : top + side, left : left + side])
    return np.asarray(Image.fromarray(cut).resize((size, size), Image.Resampling.LANCZOS))


def to_float(image: UInt8[np.ndarray, "*b h w c"]) -> Float[np.ndarray, "*b h w c"]:
    """uint8 to float32 in [-1, 1], the range of every network here."""
    return image.astype(np.float32) / 127.5 - 1


@dataclasses.dataclass(frozen=True)
class Square(grain.transforms.Map):
    """`square` of the example's image."""

    size: int

    def map(self, element: Example) -> Example:
        return {**element, "image": square(element["image"], self.size)}


@dataclasses.dataclass(frozen=True)
class ToFloat(grain.transforms.Map):
    """`to_float` of the example's image."""

    def map(self, element: Example) -> Example:
        return {**element, "image": to_float(element["image"])}


@dataclasses.dataclass(frozen=True)
class Flip(grain.transforms.RandomMap):
    """Mirrors left and right with the given probability. Captions that speak of left and right do not survive it.

    Where a crop was recorded (`buckets.ToBucket`), its left edge becomes that in the mirrored picture.
    """

    probability: float = 0.5

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        if rng.random() >= self.probability:
            return element
        sizes = {"sizes": mirrored_sizes(element["sizes"])} if "sizes" in element else {}
        return {**element, "image": np.ascontiguousarray(element["image"][:, ::-1]), **sizes}


@dataclasses.dataclass(frozen=True)
class Tokenize(grain.transforms.Map):
    """Adds `tokens`, int32 [l], the ids of the example's caption."""

    tokenizer: Tokenizer

    def map(self, element: Example) -> Example:
        return {**element, "tokens": self.tokenizer.encode([element["caption"]])[0]}


@dataclasses.dataclass(frozen=True)
class Select(grain.transforms.Map):
    """Keeps the named entries only; strings cannot go to a device."""

    names: tuple[str, ...]

    def map(self, element: Example) -> Example:
        return {name: element[name] for name in self.names}
