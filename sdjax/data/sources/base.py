"""The interface of every data set: images with what is said of them, by index, and the rows that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NotRequired, Protocol, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, UInt8

from sdjax.core.errors import UserError
from sdjax.core.untrusted import parse_json

CAPTION = "caption"
CONDITIONING_IMAGE = "conditioning_image"
CAPTION_KEYS = ("text", "caption", "prompt")
MOST_KEYS = 12


class Example(TypedDict):
    """One image; `id` names it within its data set. Some data sets say more.

    Attributes:
        caption: "" where there is none.
        captions: all of them, where there are several; `caption` is the first.
        label: the image's class, a place in the source's `classes`.
        objects: the classes of what is in it; `boxes` are theirs: x, y of the upper left corner, width and height, in
            shares of the image's sides.
        label_map: the class of every pixel.
        neighbours: embeddings of what is near the image.
        conditioning_image: a ControlNet's hint of it.
    """

    image: UInt8[np.ndarray, "h w 3"]
    caption: str
    id: str
    captions: NotRequired[tuple[str, ...]]
    label: NotRequired[Int[np.ndarray, ""] | np.int32]
    objects: NotRequired[Int[np.ndarray, " n"]]
    boxes: NotRequired[Float[np.ndarray, "n 4"]]
    label_map: NotRequired[UInt8[np.ndarray, "h w"]]
    neighbours: NotRequired[Float[np.ndarray, "k d"]]
    conditioning_image: NotRequired[UInt8[np.ndarray, "h w 3"]]


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


class Problem(NamedTuple):
    """A row that cannot be used, as was found before any image was read.

    Attributes:
        place: file and line, tar member, record.
        message: one line that begins with the place or names it.
        before: usable rows that stand before it.
    """

    place: str
    message: str
    before: int


class Listed(Source, Protocol):
    """Rows as files list them: usable ones by index, and the others."""

    @property
    def problems(self) -> Sequence[Problem]:
        """Rows that cannot be used."""
        ...

    def place(self, index: int) -> str:
        """File and line, tar member or record of a usable row."""
        ...


class Rows(Images, Listed, Protocol):
    """A data set as its files list it."""


def captions_of(entry: Mapping[str, Any], place: str) -> tuple[str, ...]:
    """The captions among metadata, a string or a list of them; () if there is none.

    Raises:
        UserError: what should be captions is something else.
    """
    key = next((key for key in CAPTION_KEYS if entry.get(key) is not None), None)
    if key is None:
        return ()
    captions = entry[key] if isinstance(entry[key], list) else [entry[key]]
    if not all(isinstance(caption, str) for caption in captions):
        raise UserError(f"{place}: {key} is neither a string nor a list of strings")
    return tuple(captions)


def captioned(captions: Sequence[str]) -> dict[str, Any]:
    """`caption` of an example, and `captions` where there are several."""
    several = {"captions": tuple(captions)} if len(captions) > 1 else {}
    return {"caption": captions[0] if captions else "", **several}


def lacks(entry: Mapping[str, Any], key: str) -> str:
    """A reason against metadata without `key`, with the keys that are there."""
    keys = CAPTION_KEYS if key == CAPTION else (key,)
    if empty := next((key for key in keys if key in entry), None):
        return f"has no {key}: {empty} is {json.dumps(entry[empty])}"
    others = f" ({', '.join(keys)})" * (len(keys) > 1)
    return f"has no {key}{others}; its keys are {keys_of(entry)}"


def keys_of(entry: Mapping[str, Any]) -> str:
    """The keys of metadata, as a message names them."""
    keys = [repr(key)[1:-1][:80] for key in entry]
    return ", ".join(keys[:MOST_KEYS] + ["..."] * (len(keys) > MOST_KEYS)) or "none"


def read_json(data: bytes, place: str) -> Mapping[str, Any]:
    """The JSON object in UTF-8 `data`; {} if it is JSON but no object.

    Raises:
        UserError: it is not JSON.
    """
    value = parse_json(data, place)
    return value if isinstance(value, dict) else {}


def read_text(data: bytes, place: str) -> str:
    """A caption in UTF-8, without a byte order mark and what is blank around it.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8: {error}") from error
