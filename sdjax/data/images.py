"""Images from untrusted files or bytes to uint8 RGB arrays; what cannot be read is an error that names its place."""

from __future__ import annotations

import contextlib
import io
import logging
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from sdjax.core.errors import UserError

# Pillow would also start helper programs (EPS) or parse rarely tested formats: a data folder needs none of them.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 1 << 26
ORIENTATION = 0x0112
# By these Pillow says why a file cannot be read; over the rest its parsers, of EXIF above all, stumble in hostile ones.
SAID = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning)
STUMBLED = (TypeError, AttributeError, LookupError, ArithmeticError, MemoryError, RuntimeError, EOFError, struct.error)
UNREADABLE = (*SAID, *STUMBLED)

logger = logging.getLogger("sdjax")


def read_image(file: str | Path | bytes, place: str = "") -> UInt8[np.ndarray, "h w 3"]:
    """The image in a file, or in a file's bytes, upright (EXIF) and on white where it is transparent.

    Args:
        file: PNG, JPEG, WebP, BMP or GIF (its first frame), of at most 67 million pixels.
        place: what an error shall name besides the file, e.g. "metadata.jsonl line 3".

    Raises:
        UserError: the file is missing, truncated, too large or no image.
    """
    with _opened(file, place) as image:
        return np.asarray(on_white(ImageOps.exif_transpose(image)))


def read_mask(file: str | Path | bytes, place: str = "") -> UInt8[np.ndarray, "h w"]:
    """The grey values of a mask in a file, upright; see `mask_values` and `read_image`, whose errors it raises."""
    with _opened(file, place) as image:
        return mask_values(ImageOps.exif_transpose(image))


def read_labels(file: str | Path | bytes, size: tuple[int, int], place: str = "") -> UInt8[np.ndarray, "h w"]:
    """A label map: an image of one channel or with a palette, whose values are classes; see `read_image`.

    Raises:
        UserError: it cannot be read, has several channels, or another size.
    """
    with _opened(file, place) as image:
        name = file if isinstance(file, str | Path) else "a record"
        if image.mode not in ("L", "P", "1"):
            raise UserError(f"label map {name} is an image of mode {image.mode}; it needs one channel of 8 bits (L, P)")
        labels = np.asarray(image).astype(np.uint8)
    if labels.shape != tuple(size):
        raise UserError(
            f"label map {name} has {labels.shape[0]}x{labels.shape[1]} pixels, its image {size[0]}x{size[1]}"
        )
    return labels


def read_conditioning_image(
    file: str | Path | bytes, size: tuple[int, int], place: str = ""
) -> UInt8[np.ndarray, "h w 3"]:
    """A ControlNet's hint of an image, at the image's size; see `read_image`.

    Raises:
        UserError: it cannot be read, or has other proportions.
    """
    hint = read_image(file, place)
    (height, width), (rows, columns) = size, hint.shape[:2]
    if (rows, columns) == (height, width):
        return hint
    if abs(rows * width - columns * height) > max(rows, columns, height, width):
        name = file if isinstance(file, str | Path) else "a record"
        raise UserError(
            f"conditioning image {name} has {columns}x{rows} pixels, its image {width}x{height}: their proportions "
            "differ"
        )
    return np.asarray(Image.fromarray(hint).resize((width, height), Image.Resampling.LANCZOS))


def image_size(file: str | Path | bytes, place: str = "") -> tuple[int, int]:
    """Height and width of the image that `read_image` gives, from the header; same arguments, same errors."""
    with _opened(file, place) as image:
        # Orientations 5 to 8 of EXIF turn the image by a quarter (EXIF 2.32, tag 0x0112).
        turned = image.getexif().get(ORIENTATION, 1) in range(5, 9)
        return (image.width, image.height) if turned else (image.height, image.width)


def read_png_text(file: str | Path, key: str) -> str | None:
    """A text that a PNG has beside its pixels; None without it, and of other formats. Errors are `read_image`'s."""
    with _opened(file, "") as image:
        return getattr(image, "text", {}).get(key)


@contextlib.contextmanager
def _opened(file: str | Path | bytes, place: str) -> Iterator[Image.Image]:
    name = f"{'a record' if isinstance(file, bytes) else file}{f' ({place})' if place else ''}"
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"image {name} has {image.width}x{image.height} pixels; at most {MAX_PIXELS} are read")
            yield image
    except UNREADABLE as error:
        reason = error if isinstance(error, SAID) else "it is damaged"
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image in " + ", ".join(FORMATS)
        raise UserError(f"cannot read image {name}: {reason}") from error


def mask_values(image: Image.Image) -> UInt8[np.ndarray, "h w"]:
    """Grey values, whatever is transparent, as diffusers' `convert("L")` has them.

    Where those are the same everywhere, and say nothing, the mask is in its transparency, as A1111 reads it.
    """
    image = _eight_bits(image)
    if not image.has_transparency_data:
        return np.asarray(image.convert("L"))
    image = image.convert("RGBA")
    grey, opacity = np.asarray(image.convert("L")), np.asarray(image.getchannel("A"))
    if grey.min() < grey.max() or opacity.min() == opacity.max():
        return grey
    logger.info("the mask is of one grey; its opaque part is what is made anew")
    return opacity


def on_white(image: Image.Image) -> Image.Image:
    """In RGB, what is transparent on white; 16-bit greys are scaled."""
    image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image; 16-bit greys scaled, which Pillow would clip."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def to_uint8(images: Float[np.ndarray, "*b h w 3"]) -> UInt8[np.ndarray, "*b h w 3"]:
    """Images in [0, 1] to bytes, rounded."""
    return (np.clip(np.asarray(images), 0.0, 1.0) * 255.0).round().astype(np.uint8)


def tile(images: UInt8[np.ndarray, "n h w 3"], columns: int) -> UInt8[np.ndarray, "H W 3"]:
    """A grid of images, row by row; what the last row lacks is white."""
    n, h, w, c = images.shape
    rows = -(-n // columns)
    missing = np.full((rows * columns - n, h, w, c), 255, np.uint8)
    cells = np.concatenate([images, missing]).reshape(rows, columns, h, w, c)
    return cells.transpose(0, 2, 1, 3, 4).reshape(rows * h, columns * w, c)
