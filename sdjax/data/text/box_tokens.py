"""Layouts as tokens: each object's class and two corners of its box (LDM, D.4; taming-transformers' layouts).

The rules are those of CompVis/taming-transformers, taming/data/conditional_builder/objects_bbox.py: as many points
along each side as the root of the vocabulary's size, a token for each point, triples of tokens for the objects in a
random order, filled up with the last token, and at the end the corners of the part that is seen: the whole image,
or what `crops.RandomSquare` took of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from sdjax.core.errors import UserError

WHOLE = (0.0, 0.0, 1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class LayoutTokens:
    """Tokens of objects.

    Attributes:
        classes: how many there are.
        vocabulary: how many tokens there are; the last one fills up.
        objects: the most that an image may have.
    """

    classes: int
    vocabulary: int = 8192
    objects: int = 30

    def __post_init__(self) -> None:
        if self.classes >= self.vocabulary:
            raise UserError(f"{self.classes} classes need more than {self.vocabulary} tokens")

    @property
    def length(self) -> int:
        """Tokens of a layout: three an object, two for the crop."""
        return 3 * self.objects + 2

    def encode(
        self,
        classes: Sequence[int] | Int[np.ndarray, " n"],
        boxes: Float[np.ndarray, "n 4"],
        crop: Sequence[float] | Float[np.ndarray, " 4"] = WHOLE,
    ) -> Int[np.ndarray, " length"]:
        """The tokens, int32 [length].

        Args:
            classes: of the objects, from 0.
            boxes: x, y of the upper left corner, width, height, each a share of the whole image's side.
            crop: the part of the image that is seen, as a box.

        Raises:
            UserError: a class that there is not, a box that leaves the image, or too many objects.
        """
        if len(classes) > self.objects:
            raise UserError(f"a layout of {len(classes)} objects; the model takes at most {self.objects}")
        tokens = []
        for kind, box in zip(classes, boxes, strict=True):
            if not 0 <= kind < self.classes:
                raise UserError(f"class {kind} of a layout is not one of 0 to {self.classes - 1}")
            tokens += [int(kind), *self._corners(box)]
        tokens += [self.vocabulary - 1] * (3 * (self.objects - len(classes)))
        return np.array([*tokens, *self._corners(crop)], np.int32)

    def _corners(self, box: Sequence[float] | Float[np.ndarray, " 4"]) -> tuple[int, int]:
        x, y, width, height = (float(value) for value in box)
        # A box from a file was divided by sides, so its far corner may be a rounding error outside.
        right, low, margin = x + width, y + height, 1e-6
        inside = x >= -margin and y >= -margin and right <= 1 + margin and low <= 1 + margin
        if not inside or not (width > 0 and height > 0):
            raise UserError(
                f"the box x={x:g}, y={y:g}, width={width:g}, height={height:g} is not inside the image, whose sides "
                "are 1"
            )
        points = int(math.sqrt(self.vocabulary))
        at = [round(min(max(value, 0.0), 1.0) * (points - 1)) for value in (x, y, right, low)]
        return at[1] * points + at[0], at[3] * points + at[2]
