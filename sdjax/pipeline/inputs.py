"""Pictures and masks that a call is given, brought to the sizes that the networks need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from sdjax.core.errors import UserError
from sdjax.data.pictures import read_picture

Picture = str | Path | Image.Image | np.ndarray
Pictures = Picture | Sequence[Picture]
Range = tuple[int, int]


def load_pictures(given: Pictures, prompts: int, size: tuple[int, int]) -> Float[np.ndarray, "n H W 3"]:
    """Pictures in [-1, 1], the largest centred part of the wanted proportions resampled to `size` (Lanczos).

    Args:
        given: one, or one a prompt: files, Pillow images, or arrays [h w 3] of bytes or of floats in [0, 1].
        prompts: how many there are.
        size: height and width.

    Returns:
        One picture, or one a prompt.

    Raises:
        UserError: a file cannot be read, an array is no picture, or there are neither one nor as many as prompts.
    """

    def fit(picture: Any) -> np.ndarray:
        pixels = centred(_rgb(picture, "init_image"), size)
        if pixels.shape[:2] == size:
            return pixels
        image = Image.fromarray(np.rint(pixels * 255.0).astype(np.uint8))
        return np.asarray(image.resize((size[1], size[0]), Image.Resampling.LANCZOS), np.float32) / 255.0

    return _each(given, prompts, fit, "init_image") * 2.0 - 1.0


def load_masks(
    given: Pictures, prompts: int, size: tuple[int, int], latents: tuple[int, int]
) -> Float[np.ndarray, "n h w 1"]:
    """Masks over the latents, 1 where the picture is to be made anew: where the given one is at least half white.

    The mask's own nearest pixel counts, as in diffusers; it is cut to the proportions of `size` like the picture.

    Args:
        given: as in `load_pictures`; arrays may also be [h w] or [h w 1], and of truth values.
        prompts: how many there are.
        size: height and width of the picture.
        latents: height and width of its latents.

    Raises:
        UserError: as `load_pictures`.
    """

    def fit(picture: Any) -> np.ndarray:
        # ITU-R 601 luma, which is what Pillow takes for grey.
        grey = centred(_rgb(picture, "mask"), size) @ np.array([0.299, 0.587, 0.114])
        rows, columns = (np.arange(n) * side // n for n, side in zip(latents, grey.shape, strict=True))
        return (grey[np.ix_(rows, columns)] >= 0.5 - 1e-6).astype(np.float32)[..., None]

    return _each(given, prompts, fit, "mask")


def centred(pixels: Float[np.ndarray, "h w c"], size: tuple[int, int]) -> Float[np.ndarray, "h2 w2 c"]:
    """The largest centred part with the proportions of `size`."""
    height, width = pixels.shape[:2]
    scale = min(height / size[0], width / size[1])
    rows, columns = max(1, round(scale * size[0])), max(1, round(scale * size[1]))
    top, left = (height - rows) // 2, (width - columns) // 2
    return pixels[top : top + rows, left : left + columns]


def _each(given: Pictures, prompts: int, fit: Callable[[Any], np.ndarray], name: str) -> np.ndarray:
    single = isinstance(given, str | Path | Image.Image) or (isinstance(given, np.ndarray) and given.ndim < 4)
    pictures = [given] if single else list(given)  # pyright: ignore[reportArgumentType]
    if len(pictures) not in (1, prompts):
        raise UserError(f"{len(pictures)} pictures in {name} for {prompts} prompts; give one, or one for each")
    return np.stack([fit(picture) for picture in pictures])


def _rgb(picture: Any, name: str) -> Float[np.ndarray, "h w 3"]:
    if isinstance(picture, str | Path):
        picture = read_picture(picture, name)
    elif isinstance(picture, Image.Image):
        picture = np.asarray(picture.convert("RGB"))
    pixels = np.asarray(picture)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3) or 0 in pixels.shape:
        raise UserError(f"{name} has the shape {list(np.shape(picture))}; a picture is [height, width, 3]")
    if pixels.dtype == np.uint8:
        pixels = pixels / np.float32(255.0)
    elif pixels.dtype != bool and not (np.issubdtype(pixels.dtype, np.floating) and _within(pixels)):
        raise UserError(f"{name} holds {pixels.dtype} values; give bytes, or floats in [0, 1]")
    return np.broadcast_to(pixels.astype(np.float32), (*pixels.shape[:2], 3))


def _within(pixels: np.ndarray) -> bool:
    return bool(np.all((pixels >= 0.0) & (pixels <= 1.0)))
