"""The table of programs that leave settings in images, and the one way to read them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from sdjax.cli.records import CHUNK
from sdjax.cli.settings import a1111, comfyui, flat, invokeai, novelai, own
from sdjax.cli.settings.containers import read_texts
from sdjax.cli.settings.settings import Settings, brief
from sdjax.core.errors import UserError

OBJECT = re.compile(r'\s*\{\s*"')

logger = logging.getLogger("sdjax")


class Writer(NamedTuple):
    """A form of settings: the programs that write it, the text by which it is known, and its reader.

    Attributes:
        name: of the programs.
        text: that must be there.
        is_json: whether it is an object, or must be none; None for either.
        read: from all texts and their place.
    """

    name: str
    text: str
    is_json: bool | None
    read: Callable[[Mapping[str, str], str], Settings]


# The first that fits reads an image: of several texts, the more exact one comes first.
WRITERS = (
    Writer("sdjax", CHUNK, None, own.read),
    Writer("Fooocus, RuinedFooocus, SwarmUI", "parameters", True, flat.read),
    Writer("A1111, Forge, SD.Next", "parameters", False, a1111.read),
    Writer("InvokeAI", "invokeai_metadata", None, invokeai.read_metadata),
    Writer("InvokeAI 2", "sd-metadata", None, invokeai.read_sd_metadata),
    Writer("InvokeAI 1", "Dream", None, invokeai.read_dream),
    Writer("NovelAI", "Comment", True, novelai.read),
    Writer("ComfyUI", "prompt", True, comfyui.read),
    Writer("ComfyUI", "workflow", True, comfyui.read),
)


def read_settings(path: str | Path | BinaryIO, given: Iterable[str] = (), place: str = "") -> Settings:
    """Settings inside an image, in the names of options.

    Every value comes from the file and is as trustworthy as it: a checkpoint or a given image may be any path.

    Args:
        path: a PNG, JPEG or WebP of this program, or of one of `WRITERS`; or such a file that is open.
        given: options that the user sets beside it, which win over the file's, whatever those are.
        place: of an open file, for messages.

    Raises:
        UserError: the file cannot be read or has no settings; or one of them is none, or cannot be followed, and is
            not given.
    """
    place = place or str(path)
    found = find_settings(read_texts(path, {writer.text for writer in WRITERS}, place), place)
    found.drop(given)
    for note in found.notes:
        logger.warning("%s: %s", place, note)
    return found


def find_settings(texts: Mapping[str, str], place: str) -> Settings:
    """Settings of an image's texts by their names; a UserError where no program is known by them."""
    for writer in WRITERS:
        text = texts.get(writer.text)
        if text is not None and writer.is_json in (None, bool(OBJECT.match(text))):
            return writer.read(texts, place)
    known = ", ".join(dict.fromkeys(writer.name for writer in WRITERS))
    others = f"; its texts are {brief(', '.join(texts))}" if texts else ""
    raise UserError(f"{place} does not say how it was made: it has no settings of {known}{others}")
