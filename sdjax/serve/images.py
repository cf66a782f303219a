"""Images of requests and answers."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from sdjax.cli.records import save_png, texts_of
from sdjax.core.errors import UserError
from sdjax.data.images import UNREADABLE
from sdjax.serve.jobs import Result
from sdjax.serve.limits import Limits

FORMATS = ("PNG", "JPEG", "WEBP")
PREFIX = re.compile(r"data:image/[\w.+-]+;base64,")


class UnreadableImageError(UserError):
    """A given image is none."""


def decode_image(text: str, place: str, limits: Limits) -> Image.Image:
    """The image in base64, with the prefix of a data URL or without.

    Args:
        text: of the request.
        place: of the image in it, for messages.
        limits: of its bytes and pixels.

    Raises:
        UnreadableImageError: it is no base64, or no PNG, JPEG or WebP.
        UserError: it is too large.
    """
    return read_upload(decode_file(text, place, limits), place, limits)


def decode_file(text: str, place: str, limits: Limits) -> bytes:
    """The bytes of an image in base64; see `decode_image`, whose errors it raises."""
    found = PREFIX.match(text)
    try:
        data = base64.b64decode(text[found.end() :] if found else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UnreadableImageError(f"{place}: it is no image in base64") from error
    _check_bytes(data, place, limits)
    return data


def read_upload(data: bytes, place: str, limits: Limits) -> Image.Image:
    """The image in a file's bytes, upright; see `decode_image`, whose errors it raises."""
    _check_bytes(data, place, limits)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > limits.max_pixels:
                most = f"at most {limits.max_pixels} pixels are read"
                raise UserError(f"{place}: the image is {image.width}x{image.height}; {most}")
            image.load()
            return ImageOps.exif_transpose(image)
    except UNREADABLE as error:
        raise UnreadableImageError(f"{place}: it is no PNG, JPEG or WebP, or a damaged one") from error


def _check_bytes(data: bytes, place: str, limits: Limits) -> None:
    if len(data) > limits.max_upload_bytes:
        raise UserError(f"{place}: the image has {len(data)} bytes; at most {limits.max_upload_bytes} are read")


def encode_png(result: Result) -> bytes:
    """A PNG of a finished image with its settings inside."""
    return png_of(result.pixels, texts_of(result.record))


def png_of(pixels: UInt8[np.ndarray, "h w 3"], texts: Mapping[str, str] | None = None) -> bytes:
    """A PNG, with some text chunks or none."""
    file = io.BytesIO()
    save_png(file, pixels, texts or {})
    return file.getvalue()


def in_base64(data: bytes) -> str:
    """Bytes as JSON holds them."""
    return base64.b64encode(data).decode("ascii")
