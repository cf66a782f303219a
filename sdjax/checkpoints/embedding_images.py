"""Textual inversions that A1111 stores in images, written anew (modules/textual_inversion/image_embedding.py).

They are JSON: in base64 in the text `sd-ti-embedding` of a PNG, or compressed in the four low bits of the pixels beside
what is seen, the low halves of bytes left of it and the high ones right, each behind a black column.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sdjax.core.errors import UserError
from sdjax.core.untrusted import parse_json
from sdjax.data.images import read_image, read_png_text

SUFFIXES = (".png", ".webp")
TEXT = "sd-ti-embedding"
MOST = 2**26  # bytes of the JSON
# Of the generator of numbers that the pixels are combined with.
MULTIPLIER, INCREMENT, MODULUS, VALUES = 1664525, 1013904223, 2**32, 255


def read_embedding_image(path: Path) -> Mapping[str, Any] | None:
    """Content of an image's textual inversion, as of A1111's `.pt` files and with its name; None in a mere image.

    Raises:
        UserError: the image or what it holds cannot be read.
    """
    text = read_png_text(path, TEXT)
    stored = _hidden(read_image(path)) if text is None else _from_base64(text, path)
    if stored is None:
        return None
    content = parse_json(stored, f"the textual inversion in {path}")
    params = content.get("string_to_param") if isinstance(content, dict) else None
    if not isinstance(params, dict):
        raise UserError(f"{path} holds no textual inversion: its text has no string_to_param")
    tensors = {n: value.get("TORCHTENSOR") if isinstance(value, dict) else value for n, value in params.items()}
    return {"string_to_param": tensors, "name": str(content.get("name") or path.stem)}


def _from_base64(text: str, path: Path) -> bytes:
    try:
        return base64.b64decode(text)
    except ValueError as error:
        raise UserError(f"{path}: its {TEXT} is not base64: {error}") from error


def _hidden(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes | None:
    """Bytes in the low bits of the outer columns; None where there are none."""
    bright = (pixels > 0).all(2)
    if not bright.any():
        return None
    rows, columns = (np.flatnonzero(np.any(bright, axis=axis)) for axis in (1, 0))
    bits = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & 0x0F
    black = np.flatnonzero(~bits.any((0, 2)))
    if len(black) < 2:
        return None
    low, high = (_plain(part) for part in (bits[:, : black[0]], bits[:, black[-1] + 1 :]))
    if low.shape != high.shape or not low.size:
        return None
    unpack = zlib.decompressobj()
    try:
        return unpack.decompress((high << 4 | low).tobytes(), MOST)
    except zlib.error:
        return None


def _plain(bits: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, " n"]:
    return bits.ravel() ^ (generated(bits.size) & 0x0F).astype(np.uint8)


def generated(count: int) -> np.ndarray:
    """The first numbers of a linear congruential generator that begins at 0; each half is made of the one before."""
    numbers = np.array([INCREMENT], np.uint64)
    factor, term = MULTIPLIER, INCREMENT  # of a step as long as there are numbers
    while len(numbers) < count:
        numbers = np.concatenate([numbers, (numbers * np.uint64(factor) + np.uint64(term)) % MODULUS])
        factor, term = factor * factor % MODULUS, (factor * term + term) % MODULUS
    return numbers[:count] % VALUES
