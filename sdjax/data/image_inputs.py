"""Images, masks, depth maps and embeddings of a call, brought to the form that networks need; images pasted back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from scipy.ndimage import distance_transform_edt

from sdjax.core.errors import UserError
from sdjax.data.arrays import read_npy
from sdjax.data.images import FORMATS, MAX_PIXELS, UNREADABLE, image_size, mask_values, on_white, read_image, read_mask

ImageInput = str | Path | Image.Image | np.ndarray
"""A file, or an image in memory."""
# ITU-R 601 luma, which is what Pillow takes for grey.
LUMA = np.array([0.299, 0.587, 0.114])
# Of the cubic convolution that torch's and OpenCV's bicubic resizing use.
CUBIC = -0.75
# Of the images that CLIP was trained on.
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def load_image(given: ImageInput, size: tuple[int, int], name: str = "init_image") -> Float[np.ndarray, "H W 3"]:
    """Read an image in [0, 1], its largest centred part of the wanted proportions resampled to `size` (Lanczos).

    Args:
        given: a file, a Pillow image, or an array [h w 3] of bytes or of floats in [0, 1].
        name: of the option, for messages.

    Raises:
        UserError: the file cannot be read, or the array is no image.
    """
    pixels = centred(rgb(given, name), size)
    if pixels.shape[:2] == size:
        return pixels
    return resize_lanczos(pixels, size)


def resize_lanczos(pixels: Float[np.ndarray, "h w 3"], size: tuple[int, int]) -> Float[np.ndarray, "H W 3"]:
    """An image in [0, 1] at another size, by way of bytes."""
    image = Image.fromarray(np.rint(pixels * 255.0).astype(np.uint8))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.LANCZOS), np.float32) / np.float32(255.0)


def clip_pixels(image: UInt8[np.ndarray, "h w 3"], side: int) -> Float[np.ndarray, "s s 3"]:
    """The middle square of an image, as CLIP was shown them (transformers' CLIPImageProcessor): mean 0, variance 1."""
    height, width = image.shape[:2]
    size = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    small = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    cut = np.asarray(small.crop((left, top, left + side, top + side)), np.float32)
    return (cut / np.float32(255.0) - CLIP_MEAN) / CLIP_STD


def load_mask(given: ImageInput, size: tuple[int, int]) -> Float[np.ndarray, "H W 1"]:
    """Read a mask over an image: 1 where the given one is at least half white, the part to be made anew, else 0.

    Of files and Pillow images the grey counts, not the transparency, unless only that varies. The nearest pixel is
    taken, as in diffusers; the mask is cut to the proportions of `size` like the image. Over latents of a factor f it
    is every f-th pixel, `mask[::f, ::f]`. Arguments and errors are those of `load_image`; arrays may also be [h w] or
    [h w 1], and of truth values.
    """
    if isinstance(given, str | Path):
        grey = read_mask(given, "mask") / 255.0
    elif isinstance(given, Image.Image):
        grey = mask_values(given) / 255.0
    else:
        grey = rgb(given, "mask") @ LUMA
    grey = centred(grey[..., None], size)[..., 0]
    rows, columns = (np.arange(n) * side // n for n, side in zip(size, grey.shape, strict=True))
    return (grey[np.ix_(rows, columns)] >= 0.5 - 1e-6).astype(np.float32)[..., None]


def load_depth(given: ImageInput, latents: tuple[int, int]) -> Float[np.ndarray, "h w 1"]:
    """Read a depth map over the latents, stretched to [-1, 1]: the fifth channel of SD 2's depth-to-image model.

    Bicubic without smoothing, then minimum and maximum, as diffusers' StableDiffusionDepth2ImgPipeline does; cut to the
    proportions of the latents like the image. Its estimator gives near as bright.

    Args:
        given: a grey image (16 bits are kept), a .npy file, or an array [h w] of finite numbers.
        latents: height and width.

    Raises:
        UserError: as `load_image`; or the map is the same everywhere, which says nothing of depth.
    """
    values = resize_bicubic(centred(_depth(given), latents)[..., 0], latents)
    low, high = values.min(), values.max()
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        raise UserError(f"the depth map is {high:.6g} everywhere; give one that varies")
    return (2.0 * (values - low) / (high - low) - 1.0).astype(np.float32)[..., None]


def read_embeddings(path: str | Path, place: str) -> Float[np.ndarray, "k d"]:
    """Read a NumPy file of embeddings, e.g. of CLIP, as float32; a UserError where it holds something else."""
    array = read_npy(path, place)
    fits = array.ndim == 2 and len(array) and array.dtype.kind == "f"
    if not fits or not np.isfinite(array).all():
        raise UserError(f"{place}: {path} holds no finite embeddings of shape [k, d]")
    return array.astype(np.float32)


def check_mask_size(init_image: ImageInput, mask: ImageInput) -> None:
    """Hold a mask to the size of its image; a UserError names both sizes."""
    (height, width), (rows, columns) = size_of(init_image), size_of(mask, "mask")
    if (rows, columns) != (height, width):
        raise UserError(
            f"the mask is {columns}x{rows} pixels and its init_image {width}x{height}; give a mask of {width}x{height}"
        )


def size_of(given: ImageInput, name: str = "init_image") -> tuple[int, int]:
    """Height and width of an image."""
    if isinstance(given, str | Path):
        return image_size(given, name)
    height, width, _ = rgb(given, name).shape
    return height, width


def listed(given: Any) -> list[Any]:
    """The entries of an option that takes one value for all, or one a prompt."""
    one = isinstance(given, str | Path | Image.Image | Mapping | int) or 0 < getattr(given, "ndim", 0) < 4
    return [given] if one else list(given)  # pyright: ignore[reportArgumentType]


def rgb(given: ImageInput, name: str) -> Float[np.ndarray, "h w 3"]:
    """An image in [0, 1] of any of the forms that `load_image` takes, at its own size; errors as there."""
    if isinstance(given, str | Path):
        given = read_image(given, name)
    elif isinstance(given, Image.Image):
        given = np.asarray(on_white(given))
    pixels = np.asarray(given)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3) or 0 in pixels.shape:
        raise UserError(f"{name} has the shape {list(np.shape(given))}; an image is [height, width, 3]")
    if pixels.dtype == np.uint8:
        pixels = pixels / np.float32(255.0)
    elif pixels.dtype != bool and not (pixels.dtype.kind == "f" and np.all((pixels >= 0.0) & (pixels <= 1.0))):
        raise UserError(f"{name} holds {pixels.dtype} values; give bytes, or floats in [0, 1]")
    return np.broadcast_to(pixels.astype(np.float32), (*pixels.shape[:2], 3))


def paste_back(
    made: Float[np.ndarray, "n H W 3"],
    original: Float[np.ndarray, "n H W 3"],
    mask: Float[np.ndarray, "n H W 1"],
    feather: float,
) -> Float[np.ndarray, "n H W 3"]:
    """Made images where the mask is 1, and outside of it the original's own values, bit for bit.

    Args:
        made, original, mask: images, and 1 where they are made anew, else 0.
        feather: pixels over which the original fades out, all of them within the mask; 0 for a hard edge.

    Raises:
        UserError: feather is negative or not finite.
    """
    if not 0.0 <= feather < math.inf:
        raise UserError(f"feather {feather!r}: choose a number of pixels of at least 0")
    share = np.stack([_fade(one[..., 0] >= 0.5, feather) for one in mask])[..., None]
    blend = share * made + (1.0 - share) * original
    return np.where(share == 0.0, original, np.where(share == 1.0, made, blend)).astype(np.float32)


def resize_bicubic(values: Float[np.ndarray, "h w"], size: tuple[int, int]) -> Float[np.ndarray, "h2 w2"]:
    """Resize as torch's `interpolate(mode="bicubic", align_corners=False)`: four taps a side at every scale."""
    rows, columns = (cubic_weights(old, new) for old, new in zip(values.shape, size, strict=True))
    return rows @ values.astype(np.float64) @ columns.T


def resize_bilinear(pixels: Float[np.ndarray, "h w c"], size: tuple[int, int]) -> Float[np.ndarray, "h2 w2 c"]:
    """Resize as torch's `interpolate(mode="bilinear", align_corners=True)`: pixels at the corners stay there."""
    rows, columns = (corner_weights(old, new) for old, new in zip(pixels.shape, size, strict=False))
    return np.einsum("Hh,hwc,Ww->HWc", rows, pixels.astype(np.float64), columns, optimize=True)


def corner_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Weights of linear interpolation between pixels, of which the first and the last are ends."""
    at = np.linspace(0.0, old - 1.0, new)
    return np.clip(1.0 - np.abs(at[:, None] - np.arange(old)), 0.0, None)


def cubic_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Weights of cubic convolution (Keys 1981) between pixels' centres; beyond the edge its pixel is repeated."""
    at = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(at).astype(int) - 1
    weights = np.zeros((new, old))
    for tap in range(4):
        x = np.abs(at - (first + tap))
        near = ((CUBIC + 2.0) * x - (CUBIC + 3.0)) * x * x + 1.0
        far = ((CUBIC * x - 5.0 * CUBIC) * x + 8.0 * CUBIC) * x - 4.0 * CUBIC
        np.add.at(weights, (np.arange(new), np.clip(first + tap, 0, old - 1)), np.where(x <= 1.0, near, far))
    return weights


def centred(pixels: Float[np.ndarray, "h w c"], size: tuple[int, int]) -> Float[np.ndarray, "h2 w2 c"]:
    """The largest centred part with the proportions of `size`."""
    height, width = pixels.shape[:2]
    scale = min(height / size[0], width / size[1])
    rows, columns = max(1, round(scale * size[0])), max(1, round(scale * size[1]))
    top, left = (height - rows) // 2, (width - columns) // 2
    return pixels[top : top + rows, left : left + columns]


def _depth(image: Any) -> Float[np.ndarray, "h w 1"]:
    if isinstance(image, str | Path):
        image = read_npy(image, "depth") if Path(image).suffix == ".npy" else _read_grey(image)
    elif isinstance(image, Image.Image):
        image = np.asarray(image) if image.mode[0] in "IF" else np.asarray(image.convert("RGB")) @ LUMA
    values = np.asarray(image)
    values = values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values
    if values.ndim != 2 or 0 in values.shape:
        raise UserError(f"depth has the shape {list(np.shape(image))}; a depth map is [height, width]")
    if values.dtype.kind not in "uif" or not np.isfinite(values).all():
        raise UserError(f"depth holds {values.dtype} values that are not all finite numbers")
    return values.astype(np.float32)[..., None]


def _read_grey(path: str | Path) -> np.ndarray:
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode.startswith("I") and image.width * image.height <= MAX_PIXELS:
                return np.asarray(image)
    except UNREADABLE:
        pass  # which is said better below
    return read_image(path, "depth") @ LUMA


def _fade(mask: np.ndarray, feather: float) -> Float[np.ndarray, "h w"]:
    """0 outside of the mask, growing linearly inside with the distance from the nearest pixel outside, to 1."""
    if mask.all():
        return np.ones(mask.shape, np.float32)
    distance = np.asarray(distance_transform_edt(mask))
    return np.clip(distance / (feather + 1.0), 0.0, 1.0).astype(np.float32)
