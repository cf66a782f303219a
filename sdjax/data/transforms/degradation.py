"""Degradations from high to low resolution: a clean resampling, or BSR-light's blur, noise and JPEG in a random order.

Zhang et al. 2021, "Designing a practical degradation model for deep blind image super-resolution", with the reduced
strengths of CompVis/latent-diffusion, ldm/modules/image_degradation/bsrgan_light.py. OpenCV interpolates there, SciPy
here (cubic splines in place of cubic convolution), and Pillow takes means over areas; kernels have odd sides,
since even ones move an image by half a pixel.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable

import grain
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from scipy import linalg, ndimage

from sdjax.core.errors import UserError, unknown
from sdjax.data.transforms.images import Example

ImageArray = Float[np.ndarray, "h w 3"]
"""In [0, 1]."""

HALVED_FIRST = 0.25  # how often a factor of 4 begins with a halving
SHRUNK = 0.8  # how often the middle resampling is by a random factor, in place of a blur and every n-th pixel
COMPRESSED = 0.9
QUALITIES = (80, 95)
LEVELS = (1, 2)  # of noise, of 255


def bicubic(image: UInt8[np.ndarray, "h w 3"], factor: int, rng: np.random.Generator) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Pillow's bicubic resampling, antialiased."""
    del rng
    size = image.shape[1] // factor, image.shape[0] // factor
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def lanczos(image: UInt8[np.ndarray, "h w 3"], factor: int, rng: np.random.Generator) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Pillow's Lanczos resampling, as images are brought to the size of a model (`transforms.images.square`)."""
    del rng
    size = image.shape[1] // factor, image.shape[0] // factor
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def bsr_light(image: UInt8[np.ndarray, "h w 3"], factor: int, rng: np.random.Generator) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Blur, two resamplings, noise and JPEG in a random order, and JPEG once more."""
    final = image.shape[0] // factor, image.shape[1] // factor
    x = image.astype(np.float32) / 255.0
    if factor == 4 and rng.random() < HALVED_FIRST:
        factor = 2
        x = _resized(x, (x.shape[0] // 2, x.shape[1] // 2), rng)

    def shrink(x: ImageArray) -> ImageArray:
        if rng.random() < SHRUNK:
            by = rng.uniform(1, 2 * factor)
            return _resized(x, (max(int(x.shape[0] / by), 1), max(int(x.shape[1] / by), 1)), rng)
        # A pixel of every `factor` is taken at its corner, so the kernel's centre moves to that of the area.
        at = (factor - 1) / 2.0
        return _blurred(x, _gaussian(25, rng.uniform(0.1, 0.6 * factor), at))[::factor, ::factor]

    def compress(x: ImageArray) -> ImageArray:
        return _compressed(x, rng) if rng.random() < COMPRESSED else x

    # The resampling to the final size comes after the random one.
    steps: list[Callable[[ImageArray], ImageArray]] = [
        lambda x: _blurred(x, _kernel(factor, rng)),
        shrink,
        lambda x: _noisy(x, rng),
        compress,
    ]
    order = [steps[i] for i in rng.permutation(len(steps))]
    order.insert(rng.integers(order.index(shrink) + 1, len(order) + 1), lambda x: _resized(x, final, rng))
    for step in order:
        x = np.clip(step(x), 0.0, 1.0)
    return _bytes(_compressed(x, rng))


DEGRADATIONS = {"bicubic": bicubic, "lanczos": lanczos, "bsr_light": bsr_light}


@dataclasses.dataclass(frozen=True)
class LowResolution(grain.transforms.RandomMap):
    """Adds `low_res`, the example's image `factor` times smaller along each side.

    Raises:
        UserError: an unknown degradation, or a factor that does not divide the image.
    """

    factor: int
    degradation: str = "bicubic"

    def __post_init__(self) -> None:
        if self.degradation not in DEGRADATIONS:
            raise unknown("degradation", self.degradation, DEGRADATIONS, "config.data.degradation")

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        height, width, _ = element["image"].shape
        if height % self.factor or width % self.factor:
            raise UserError(f"an image of {height}x{width} pixels cannot be made {self.factor} times smaller")
        small = DEGRADATIONS[self.degradation](element["image"], self.factor, rng)
        return {**element, "low_res": small}


def _bytes(x: ImageArray) -> UInt8[np.ndarray, "h w 3"]:
    return (x * 255.0).round().astype(np.uint8)


def _resized(x: ImageArray, size: tuple[int, int], rng: np.random.Generator) -> ImageArray:
    """To `size`, by lines, by cubic splines (neither antialiased), or by means over areas."""
    kind = rng.integers(3)
    if kind == 2:
        channels = [Image.fromarray(np.ascontiguousarray(x[..., i])) for i in range(3)]
        return np.stack([np.asarray(c.resize((size[1], size[0]), Image.Resampling.BOX)) for c in channels], axis=-1)
    rows, columns = ((np.arange(new) + 0.5) * old / new - 0.5 for new, old in zip(size, x.shape[:2], strict=True))
    at = np.meshgrid(rows, columns, indexing="ij")
    order = (1, 3)[kind]
    made = [ndimage.map_coordinates(x[..., i], at, order=order, mode="nearest") for i in range(3)]
    return np.stack(made, axis=-1)


def _blurred(x: ImageArray, kernel: Float[np.ndarray, "k k"]) -> ImageArray:
    return ndimage.convolve(x, kernel[..., None].astype(np.float32), mode="mirror")


def _gaussian(side: int, sigma: float, shift: float = 0.0) -> Float[np.ndarray, "k k"]:
    """A normal density on a grid, its centre `shift` pixels from the middle towards the first corner."""
    at = np.arange(side) - (side - 1) / 2.0 + shift
    exponent = -np.square(at) / (2.0 * max(sigma, 1e-3) ** 2)
    along = np.exp(exponent - exponent.max())  # which would be zero everywhere where the centre is between two pixels
    kernel = np.outer(along, along)
    return kernel / kernel.sum()


def _kernel(factor: int, rng: np.random.Generator) -> Float[np.ndarray, "k k"]:
    """Half of the time a round one, else one with an own variance along each of two turned axes."""
    if rng.random() >= 0.5:
        return _gaussian(rng.choice((5, 7)), (2.0 + 0.2 * factor) / 4.0 * rng.random())
    side, turn = rng.choice((5, 7, 9, 11, 13)), rng.random() * np.pi
    variances = np.maximum((4.0 + factor) / 4.0 * rng.random(2), 1e-3)
    axes = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    inverse = axes @ np.diag(1.0 / variances) @ axes.T
    at = np.arange(side) - (side - 1) / 2.0
    points = np.stack(np.meshgrid(at, at), axis=-1)
    kernel = np.exp(-0.5 * np.einsum("...i,ij,...j->...", points, inverse, points))
    return kernel / kernel.sum()


def _noisy(x: ImageArray, rng: np.random.Generator) -> ImageArray:
    """Noise of each value, of each pixel's brightness, or with correlated colours."""
    level, kind = rng.integers(LEVELS[0], LEVELS[1] + 1) / 255.0, rng.random()
    if kind > 0.6:
        noise = rng.normal(0.0, level, x.shape)
    elif kind < 0.4:
        noise = rng.normal(0.0, level, (*x.shape[:2], 1))
    else:
        basis = linalg.orth(rng.random((3, 3)))
        covariance = (LEVELS[1] / 255.0) ** 2 * basis.T @ np.diag(rng.random(3)) @ basis
        noise = rng.multivariate_normal(np.zeros(3), np.abs(covariance), x.shape[:2], check_valid="ignore")
    return x + noise.astype(np.float32)


def _compressed(x: ImageArray, rng: np.random.Generator) -> ImageArray:
    file = io.BytesIO()
    quality = int(rng.integers(QUALITIES[0], QUALITIES[1] + 1))
    Image.fromarray(_bytes(x)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)).astype(np.float32) / 255.0


@dataclasses.dataclass(frozen=True)
class NoiseLevel(grain.transforms.RandomMap):
    """Adds `noise_level`, int32, any of `levels` with equal probability (Ho et al. 2022; deep-floyd/IF)."""

    levels: int

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        return {**element, "noise_level": np.int32(rng.integers(self.levels))}
