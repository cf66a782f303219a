"""The interface of every data set: captioned images by index, and rows for a check of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NotRequired, Protocol, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, UInt8

from sdjax.core.errors import UserError
from sdjax.core.untrusted import parse_json

CAPTION_KEYS = ("text", "caption")


class Example(TypedDict):
    """One captioned image; `id` names it within its data set. Some data sets say more.

    Attributes:
        label: the image's class, a place in the source's `classes`.
        objects: the classes of what is in it; `boxes` are theirs: x, y of the upper left corner, width and height, in
            shares of the image's sides.
        label_map: the class of every pixel.
        neighbours: embeddings of what is near the image.
    """

    image: UInt8[np.ndarray, "h w 3"]
    caption: str
    id: str
    label: NotRequired[Int[np.ndarray, ""] | np.int32]
    objects: NotRequired[Int[np.ndarray, " n"]]
    boxes: NotRequired[Float[np.ndarray, "n 4"]]
    label_map: NotRequired[UInt8[np.ndarray, "h w"]]
    neighbours: NotRequired[Float[np.ndarray, "k d"]]


@runtime_checkable
class Source(Protocol):
    """Random access for the loader: a length, and an example for each index below it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@runtime_checkable
class Images(Source, Protocol):
    """A source that also knows an image's name and size without decoding it."""

    def id(self, index: int) -> str:
        """The same as `self[index]["id"]`, without reading the image."""
        ...

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of `self[index]["image"]`, from the file's header."""
        ...


class DatasetRow(NamedTuple):
    """A row as a data set lists it, good or bad: where it stands, and how it is read (which raises if it is bad)."""

    place: str
    read: Callable[[], Example]


def bad_row(place: str, reason: str) -> DatasetRow:
    """A row of which it is known already that it cannot be read."""

    def read() -> Example:
        raise UserError(f"{place} {reason}")

    return DatasetRow(place, read)


def read_json(data: bytes, place: str) -> Mapping[str, Any]:
    """The JSON object in UTF-8 `data`; {} if it is JSON but no object.

    Raises:
        UserError: it is not JSON.
    """
    value = parse_json(data, place)
    return value if isinstance(value, dict) else {}


def caption_of(entry: Mapping[str, Any]) -> str | None:
    """The caption among metadata; None if there is none, or if it is no string."""
    caption = next((entry[key] for key in CAPTION_KEYS if key in entry), None)
    return caption if isinstance(caption, str) else None
