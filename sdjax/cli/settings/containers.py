"""Texts inside image files: PNG's chunks, and EXIF's comments of JPEG, WebP and PNG."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from PIL.PngImagePlugin import iTXt

from sdjax.core.errors import UserError
from sdjax.data.images import MAX_PIXELS, UNREADABLE

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_CHARACTERS = 2**22
# Tags of EXIF 2.32: the directory that holds most comments, and those that programs write texts to.
EXIF_IFD, USER_COMMENT, DESCRIPTION, MAKE, MODEL = 0x8769, 0x9286, 0x010E, 0x010F, 0x0110
# The first eight bytes of a comment name its characters.
UNICODE, PREFIXES = b"UNICODE\0", (b"ASCII\0\0\0", b"JIS\0\0\0\0\0", b"\0" * 8)
# A text whose first word is the name of a chunk, as ComfyUI writes into tags of WebP.
NAMED = re.compile(r"(prompt|workflow):\s*(?=\{)", re.IGNORECASE)


def read_texts(path: str | Path | BinaryIO, names: Collection[str], place: str = "") -> dict[str, str]:
    """Texts by the names of PNG's chunks; an EXIF comment is `parameters`.

    Only a PNG that has none of the names before its pixels is decoded.

    Raises:
        UserError: the file cannot be read, is none of these formats, or a text is longer than 4 million characters.
    """
    place = place or str(path)
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of parts of EXIF that Pillow leaves out
            texts = _texts(path, names)
    except UNREADABLE as error:
        reason = "it is no PNG, JPEG or WebP, or a damaged one"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else reason
        raise UserError(f"cannot read the settings of {place}: {reason}") from error
    for name, text in texts.items():
        if len(text) > MAX_CHARACTERS:
            raise UserError(f"the {name[:40]} text of {place} is longer than {MAX_CHARACTERS} characters")
    return texts


def _texts(path: str | Path | BinaryIO, names: Collection[str]) -> dict[str, str]:
    with Image.open(path, formats=FORMATS) as image:
        texts = _chunks(image.info)
        missing = image.format == "PNG" and "exif" not in image.info and texts.keys().isdisjoint(names)
        if missing and image.width * image.height <= MAX_PIXELS:
            image.load()  # chunks may stand after the pixels
            texts = _chunks(image.info)
        if "exif" in image.info or image.format != "PNG":
            texts = {**dict(_exif(image.getexif())), **texts}
        return texts


def _chunks(info: dict[Any, Any]) -> dict[str, str]:
    return {name: _decoded(text) for name, text in info.items() if isinstance(name, str) and isinstance(text, str)}


def _decoded(text: str) -> str:
    """A chunk's text. A tEXt chunk is Latin-1, and yet many programs write UTF-8, which hardly ever is both."""
    try:
        return str(text) if isinstance(text, iTXt) else text.encode("latin-1").decode()
    except UnicodeError:
        return text


def _exif(exif: Image.Exif) -> Iterator[tuple[str, str]]:
    """Named texts of EXIF, the weakest first."""
    tags = [(tag, exif.get(tag)) for tag in (DESCRIPTION, MAKE, MODEL, USER_COMMENT)]
    for tag, value in (*tags, (USER_COMMENT, exif.get_ifd(EXIF_IFD).get(USER_COMMENT))):
        text = decode_comment(value) if isinstance(value, bytes) else value
        if not isinstance(text, str):
            continue
        text = text.strip("\0")
        if match := NAMED.match(text):
            yield match[1].lower(), text[match.end() :]
        elif tag == USER_COMMENT and text:
            yield "parameters", text


def decode_comment(comment: bytes) -> str:
    """EXIF's UserComment, with or without its eight bytes, and UTF-16 of either byte order."""
    if comment.startswith(UNICODE):
        data = comment[len(UNICODE) :]
        if b"\0" not in data:  # in spite of its name
            return data.decode("utf-8", "replace")
        # Most characters of settings are ASCII, whose high byte is 0.
        order = "be" if data[::2].count(0) >= data[1::2].count(0) else "le"
        return data[: len(data) // 2 * 2].decode(f"utf-16-{order}", "replace").removeprefix("\ufeff")
    data = next((comment[len(prefix) :] for prefix in PREFIXES if comment.startswith(prefix)), comment)
    return data.decode("utf-8", "replace")
