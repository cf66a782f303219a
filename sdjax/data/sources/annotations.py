"""Annotations of an image in a folder's list besides its caption: a class, objects in boxes, a label map.

    {"file_name": "0.png", "text": "a dog", "label": "dog",
     "objects": {"bbox": [[12, 30, 40, 50]], "categories": ["dog"]}, "label_map": "labels/0.png", "neighbours": "0.npy",
     "conditioning_image": "hints/0.png"}

`objects` is Hugging Face's form of object detection (datasets documentation, "image_dataset"): x, y of the upper left
corner, width and height, in pixels. Classes are names, or numbers from 0. A label map is an image of one channel.
Neighbours are a NumPy file of their embeddings, [k, d]. A conditioning image is a ControlNet's hint, in the image's
proportions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from sdjax.core.errors import UserError
from sdjax.data.images import MAX_PIXELS
from sdjax.data.sources.base import CONDITIONING_IMAGE

LABEL, OBJECTS, LABEL_MAP, NEIGHBOURS = "label", "objects", "label_map", "neighbours"
Class = str | int
# More than any data set has: a number beyond would be a name for every number below it.
MAX_CLASSES = 100_000


class Annotations(NamedTuple):
    """Annotations of one line; None for those that it lacks.

    Attributes:
        label: the image's class.
        objects: the classes of what is in it; `boxes` are theirs, in pixels.
        label_map: a file below the folder; `neighbours` and `conditioning_image` likewise.
    """

    label: Class | None = None
    objects: tuple[Class, ...] | None = None
    boxes: tuple[tuple[float, ...], ...] = ()
    label_map: str | None = None
    neighbours: str | None = None
    conditioning_image: str | None = None

    def files(self) -> Iterable[str]:
        """Every file that is named."""
        return filter(None, (self.label_map, self.neighbours, self.conditioning_image))

    def classes(self) -> Iterable[Class]:
        """Every class that is named."""
        yield from () if self.label is None else (self.label,)
        yield from self.objects or ()


NOTHING = Annotations()


def parse_annotations(entry: Mapping[str, Any], place: str) -> Annotations:
    """Reads what `Annotations` has of a line's JSON.

    Raises:
        UserError: one of them is not what it should be.
    """
    label, objects = entry.get(LABEL), entry.get(OBJECTS)
    if label is not None and not _is_class(label):
        raise UserError(f"{place}: label {label!r} is neither a name nor a number from 0 to {MAX_CLASSES - 1}")
    named: dict[str, Any] = {key: entry.get(key) for key in (LABEL_MAP, NEIGHBOURS, CONDITIONING_IMAGE)}
    for key, file in named.items():
        if file is not None and not (isinstance(file, str) and "\0" not in file):
            raise UserError(f"{place}: {key} {file!r} is not the name of a file")
    if objects is None:
        return Annotations(label, **named)
    boxes, kinds = (objects.get(key) for key in ("bbox", "categories")) if isinstance(objects, dict) else (None, None)
    if not (isinstance(boxes, list) and isinstance(kinds, list) and len(boxes) == len(kinds)):
        raise UserError(f"{place}: objects needs bbox and categories, two lists of one length")
    if not all(_is_class(kind) for kind in kinds) or not all(_is_box(box) for box in boxes):
        raise UserError(
            f"{place}: objects needs boxes of four numbers x, y, width, height, and names or "
            f"numbers below {MAX_CLASSES}"
        )
    return Annotations(label, tuple(kinds), tuple(tuple(map(float, box)) for box in boxes), **named)


def names(classes: Iterable[Class], place: str) -> tuple[str, ...]:
    """The classes of a data set in the order of their numbers: names sorted, or numbers as they are.

    Raises:
        UserError: names and numbers are mixed, or there are too many.
    """
    found = set(classes)
    if len(found) > MAX_CLASSES:
        raise UserError(f"{place} names {len(found)} classes; at most {MAX_CLASSES} are read")
    numbers = {kind for kind in found if isinstance(kind, int)}
    if numbers and numbers != found:
        raise UserError(f"{place} has names and numbers as classes, e.g. {sorted(map(str, found))[:4]}; use either")
    return tuple(str(i) for i in range(max(numbers) + 1)) if numbers else tuple(sorted(map(str, found)))


def arrays(annotations: Annotations, numbers: Mapping[str, int], size: tuple[int, int]) -> dict[str, Any]:
    """`label`, and `objects` with `boxes` in shares of the sides, as arrays.

    Args:
        annotations: of one image.
        numbers: of each class by its name.
        size: the image's height and width.
    """
    made: dict[str, Any] = {}
    if annotations.label is not None:
        made[LABEL] = np.int32(numbers[str(annotations.label)])
    if annotations.objects is not None:
        sides = np.array([size[1], size[0], size[1], size[0]], np.float32)
        made[OBJECTS] = np.array([numbers[str(kind)] for kind in annotations.objects], np.int32)
        made["boxes"] = np.array(annotations.boxes, np.float32).reshape(-1, 4) / sides
    return made


def _is_class(value: Any) -> bool:
    return isinstance(value, str) or (type(value) is int and 0 <= value < MAX_CLASSES)


def _is_box(value: Any) -> bool:
    finite = isinstance(value, list) and all(isinstance(x, int | float) and abs(x) < MAX_PIXELS for x in value)
    return finite and len(value) == 4
