"""Images and regions at the sizes that A1111 gives them (modules/images.py, resize_image; modules/masking.py)."""

from __future__ import annotations

import numpy as np
from PIL import Image

Size = tuple[int, int]
"""Width and height, in Pillow's order."""
Region = tuple[int, int, int, int]
"""Left, top, right and bottom."""
STRETCH, CROP, FILL, LATENT = range(4)
"""A1111's resize_mode: Just resize, Crop and resize, Resize and fill, Just resize (latent upscale)."""


def resized(image: Image.Image, size: Size, mode: int) -> Image.Image:
    """An image at another size, by Lanczos.

    Args:
        image, size: and width and height.
        mode: `STRETCH`, `CROP` to the centre, or `FILL` what is missing with the pixels of the edges.
    """
    if mode == STRETCH or image.size == size:
        return _lanczos(image, size)
    is_wider = size[0] * image.height > size[1] * image.width
    if is_wider == (mode == CROP):
        inner = size[0], image.height * size[0] // image.width
    else:
        inner = image.width * size[1] // image.height, size[1]
    small = _lanczos(image, (max(inner[0], 1), max(inner[1], 1)))
    left, top = (have // 2 - want // 2 for have, want in zip(small.size, size, strict=True))
    if mode == CROP:
        return small.crop((left, top, left + size[0], top + size[1]))
    right, bottom = size[0] - small.width + left, size[1] - small.height + top
    pads = [(-top, bottom), (-left, right), (0, 0)]
    pixels = np.asarray(small)
    return Image.fromarray(np.pad(pixels, pads[: pixels.ndim], "edge"))


def _lanczos(image: Image.Image, size: Size) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def region_of(mask: Image.Image, padding: int, size: Size) -> Region | None:
    """The smallest part of a mask that has all of it, some padding, and where there is room the proportions of `size`.

    Returns:
        None where the mask is empty.
    """
    box = mask.getbbox()
    if box is None:
        return None
    left, top = max(box[0] - padding, 0), max(box[1] - padding, 0)
    right, bottom = min(box[2] + padding, mask.width), min(box[3] + padding, mask.height)
    if (right - left) * size[1] > (bottom - top) * size[0]:
        top, bottom = _grown(top, bottom, (right - left) * size[1] / size[0], mask.height)
    else:
        left, right = _grown(left, right, (bottom - top) * size[0] / size[1], mask.width)
    return left, top, right, bottom


def _grown(first: int, last: int, length: float, bound: int) -> tuple[int, int]:
    """An interval of this length around another, moved and cut to lie within 0 and the bound."""
    more = int(length - (last - first))
    first, last = first - more // 2, last + more - more // 2
    back = max(last - bound, 0)
    first, last = first - back, last - back
    return max(first, 0), min(last - min(first, 0), bound)
