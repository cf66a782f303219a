"""Hints of ControlNets, by the name of what makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage

from sdjax.core.errors import UserError, unknown
from sdjax.data.hints.canny import canny
from sdjax.data.hints.resize import RESIZES, at_scale, fit, interpolated, nearest_weights
from sdjax.data.image_inputs import LUMA, ImageInput, cubic_weights, load_image, rgb, size_of
from sdjax.data.images import to_uint8

CONTROL_IMAGE, CONTROL_FROM, CONTROL_RESIZE = "control_image", "control_from", "control_resize"
INPAINT = "inpaint"
MOST = 4096  # of a number after a name; gradients of bytes reach 2040
ROUNDING = 16  # pixels of a hint: sides of images are multiples of 8, in the first pass and in that of hires
Pixels = UInt8[np.ndarray, "h w 3"]


class HintMaker(NamedTuple):
    """A way from a photograph to a hint.

    Attributes:
        make: (image, *numbers) -> the hint, of one channel or of three, as large.
        numbers: of `make`, where none are given.
        local: whether each pixel is made of its neighbours, so that the scale of the photograph matters.
    """

    make: Callable[..., UInt8[np.ndarray, "h w *c"]]
    numbers: tuple[float, ...] = ()
    local: bool = True


def line_art(pixels: Pixels) -> UInt8[np.ndarray, "h w"]:
    """Dark lines on light ground, white on black (A1111's lineart_standard)."""
    values = pixels.astype(np.float32)
    darker = np.clip(np.min(_blurred(values, 6.0) - values, axis=2), 0, 255)
    lines = darker[darker > 8]
    usual = max(16.0, float(np.median(lines))) if lines.size else 16.0
    return np.clip(darker / np.float32(usual) * 127, 0, 255).astype(np.uint8)


def scribble(pixels: Pixels, threshold: float) -> UInt8[np.ndarray, "h w"]:
    """Strokes by an extended difference of Gaussians, white on black (A1111's scribble_xdog)."""
    values = pixels.astype(np.float32)
    difference = np.min(_blurred(values, 5.0) - _blurred(values, 0.5), axis=2)
    kept = 255 - np.clip(255 - difference, 0, 255).astype(np.uint8).astype(np.int32)
    return np.uint8(255) * (2 * kept > threshold).astype(np.uint8)


def blur(pixels: Pixels, sigma: float) -> Pixels:
    """A Gaussian of so many pixels (A1111's blur_gaussian), for tile and blur models."""
    return np.rint(_blurred(pixels.astype(np.float32), sigma, 3.0)).astype(np.uint8)


def grey(pixels: Pixels) -> UInt8[np.ndarray, "h w"]:
    """Luma, for models that colour."""
    return np.rint(pixels @ LUMA).astype(np.uint8)


def palette(pixels: Pixels, side: float) -> Pixels:
    """One colour for each square of so many pixels (T2I-Adapter's colour condition)."""
    height, width, _ = pixels.shape
    colors = interpolated(pixels, (max(int(height // side), 1), max(int(width // side), 1)), cubic_weights)
    return interpolated(colors, (height, width), nearest_weights)


HINTS: dict[str, HintMaker] = {
    "none": HintMaker(lambda pixels: pixels, local=False),
    "invert": HintMaker(lambda pixels: 255 - pixels, local=False),
    "canny": HintMaker(canny, (100.0, 200.0)),
    "lineart": HintMaker(line_art),
    "scribble": HintMaker(scribble, (32.0,)),
    "blur": HintMaker(blur, (9.0,)),
    "grey": HintMaker(grey, local=False),
    "palette": HintMaker(palette, (64.0,)),
    INPAINT: HintMaker(lambda pixels: pixels, local=False),
}
"""Their numbers, written after the name (canny:50:150), are thresholds, sigma and pixels."""


def make_hint(
    given: ImageInput,
    name: str,
    size: tuple[int, int],
    resize: str | None = None,
    mask: Float[np.ndarray, "H W 1"] | None = None,
    place: str = CONTROL_IMAGE,
) -> Float[np.ndarray, "H W 3"]:
    """A hint in [0, 1] as ControlNets read it, and -1 where an inpainting one shall invent.

    Args:
        given: a photograph, or with "none" the hint itself.
        name: a key of `HINTS`, with numbers or without: "canny", "canny:50:150".
        size: height and width of the image that is generated.
        resize: a way of `RESIZES`, as A1111 does it; None for a hint of the image's proportions, brought to its size by
            Lanczos as in diffusers, which stretches others.
        mask: of `load_mask`, which "inpaint" alone reads.
        place: what an error shall name.

    Raises:
        UserError: the image cannot be read, or has other proportions and no `resize`; a name or number is none, or a
            mask is missing.
    """
    make = hint_maker(name)
    if name == INPAINT and mask is None:
        raise UserError(f"{CONTROL_FROM} {INPAINT!r} needs a mask")
    if resize is None:
        _check_proportions(size_of(given, place), size, place)
        hint = make(to_uint8(load_image(given, size, place)))
    elif resize in RESIZES:
        pixels = to_uint8(rgb(given, place))
        if HINTS[name.partition(":")[0]].local:
            pixels = at_scale(pixels, size, resize)
        hint = fit(make(pixels), size, resize)
    else:
        raise unknown(CONTROL_RESIZE, resize, RESIZES)
    values = hint.astype(np.float32) / np.float32(255.0)
    return np.where(mask > 0.5, np.float32(-1.0), values) if name == INPAINT and mask is not None else values


def _check_proportions(have: tuple[int, int], size: tuple[int, int], place: str) -> None:
    scale = max(want / side for want, side in zip(size, have, strict=True))
    beyond = max(side * scale - want for want, side in zip(size, have, strict=True))
    if beyond / max(scale, 1.0) >= min(ROUNDING, min(have) / 4):
        raise UserError(
            f"{place} has {have[1]}x{have[0]} pixels, the image {size[1]}x{size[0]}: their proportions differ; choose "
            f"{CONTROL_RESIZE}: {', '.join(RESIZES)}"
        )


def hint_maker(name: str) -> Callable[[Pixels], Pixels]:
    """The function that a name with its numbers stands for.

    Raises:
        UserError: there is none of this name, or it takes other numbers.
    """
    kind, *texts = name.split(":")
    if kind not in HINTS:
        raise unknown(CONTROL_FROM, kind, HINTS)
    make, usual, _ = HINTS[kind]
    try:
        numbers = [float(text) for text in texts] or usual
    except ValueError:
        numbers = [np.nan]
    if len(numbers) != len(usual) or not all(0.0 < number < MOST for number in numbers):
        form = ":".join((kind, *map("{:g}".format, usual)))
        raise UserError(f"{CONTROL_FROM} {name!r}: write {form}, with numbers above 0 and below {MOST}")

    def made(pixels: Pixels) -> Pixels:
        hint = make(pixels, *numbers)
        return np.repeat(hint[..., None], 3, axis=-1) if hint.ndim == 2 else hint

    return made


def _blurred(values: Float[np.ndarray, "h w 3"], sigma: float, reach: float = 4.0) -> Float[np.ndarray, "h w 3"]:
    """OpenCV's GaussianBlur, which cuts bytes off at 3 sigma and floats at 4."""
    return ndimage.gaussian_filter(values, (sigma, sigma, 0), mode="mirror", truncate=reach)
