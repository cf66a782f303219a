"""Images of requests and answers; one that cannot be read is A1111's own error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
from fastapi import HTTPException
from jaxtyping import UInt8
from PIL import Image

from sdjax.serve.images import UnreadableImageError, decode_file, decode_image, in_base64, png_of
from sdjax.serve.limits import Limits


def decoded(text: str, place: str, limits: Limits) -> Image.Image:
    """The image in base64.

    Raises:
        HTTPException: 422, it cannot be read.
        UserError: it is too large.
    """
    with _invalid():
        return decode_image(text.strip(), place, limits)


def file_of(text: str, place: str, limits: Limits) -> bytes:
    """The bytes of a file in base64; errors as of `decoded`."""
    with _invalid():
        return decode_file(text.strip(), place, limits)


@contextlib.contextmanager
def _invalid() -> Iterator[None]:
    try:
        yield
    except UnreadableImageError as error:
        raise HTTPException(422, "Invalid encoded image") from error


def encoded(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    """An image as PNG in base64."""
    return in_base64(png_of(pixels))
