"""Masks for inpainting, made while training: strokes of a thick brush and boxes (Suvorov et al. 2022, LaMa)."""

from __future__ import annotations

import dataclasses

import grain
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from sdjax.core.errors import UserError
from sdjax.data.transforms.images import Example

# All lengths are of an image's shorter side.
STROKES, CORNERS, LENGTH, THICKNESS = (1, 5), (1, 5), (0.1, 0.8), (0.05, 0.4)
BOXES, SIDE = (1, 4), (0.1, 0.6)
ATTEMPTS = 100


@dataclasses.dataclass(frozen=True)
class RandomMask(grain.transforms.RandomMap):
    """Adds `mask`, uint8 [h w 1], 1 in the hole, which covers at least `least` and at most `most` of the image.

    Raises:
        UserError: the limits are not 0 < least < most < 1.
    """

    least: float = 0.02
    most: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.least < self.most < 1.0:
            raise UserError(
                f"config.data.holes={self.least}, {self.most}: choose two shares between 0 and 1, ascending"
            )

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        height, width, _ = element["image"].shape
        for _ in range(ATTEMPTS):
            mask = (strokes if rng.random() < 0.5 else boxes)((height, width), rng)
            if self.least <= mask.mean() <= self.most:
                return {**element, "mask": mask[..., None]}
        raise UserError(f"config.data.holes={self.least}, {self.most}: no mask of {ATTEMPTS} covered such a share")


def strokes(size: tuple[int, int], rng: np.random.Generator) -> UInt8[np.ndarray, "h w"]:
    """Broken lines with round ends, each of a random thickness."""
    height, width = size
    side, canvas = min(size), Image.new("L", (width, height))
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(*STROKES)):
        thick = side * rng.uniform(*THICKNESS)
        turn, corners = rng.uniform(0.0, 2.0 * np.pi), [rng.random(2) * (width, height)]
        for _ in range(rng.integers(*CORNERS)):
            turn += rng.uniform(0.5, 1.5) * np.pi
            corners.append(corners[-1] + side * rng.uniform(*LENGTH) * np.array([np.cos(turn), np.sin(turn)]))
        draw.line([tuple(corner) for corner in corners], fill=1, width=max(round(thick), 1))
        for corner in corners:
            draw.ellipse((*(corner - thick / 2.0), *(corner + thick / 2.0)), fill=1)
    return np.asarray(canvas)


def boxes(size: tuple[int, int], rng: np.random.Generator) -> UInt8[np.ndarray, "h w"]:
    """Upright rectangles."""
    mask, side = np.zeros(size, np.uint8), min(size)
    for _ in range(rng.integers(*BOXES)):
        h, w = (max(round(side * x), 1) for x in rng.uniform(*SIDE, 2))
        y, x = rng.integers(0, size[0] - h + 1), rng.integers(0, size[1] - w + 1)
        mask[y : y + h, x : x + w] = 1
    return mask
