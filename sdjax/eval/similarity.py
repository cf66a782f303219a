"""Similarity of images pixel by pixel: PSNR and SSIM."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from sdjax.core.errors import UserError

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def psnr(a: Shaped[np.ndarray, "b h w c"], b: Shaped[np.ndarray, "b h w c"]) -> Float[np.ndarray, " b"]:
    """Peak signal-to-noise ratio of each image in decibels; images are in [0, 1]."""
    error = np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean(axis=(1, 2, 3))
    return -10.0 * np.log10(error)


def ssim(a: Shaped[np.ndarray, "b h w c"], b: Shaped[np.ndarray, "b h w c"]) -> Float[np.ndarray, " b"]:
    """Structural similarity of each image, the mean over channels and places (Wang et al. 2004).

    Gaussian windows of 11x11 with a deviation of 1.5, whole ones only; images are in [0, 1].

    Raises:
        UserError: a side is smaller than the window.
    """
    if min(a.shape[1:3]) < WINDOW:
        raise UserError(f"SSIM needs sides of {WINDOW} pixels or more, and the images are {a.shape[2]}x{a.shape[1]}")
    return np.asarray(_ssim(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)))


@jax.jit
def _ssim(a: Float[Array, "b h w c"], b: Float[Array, "b h w c"]) -> Float[Array, " b"]:
    a, b = a - 0.5, b - 0.5  # variances are of differences: centred, they keep their digits
    mean_a, mean_b = _blurred(a), _blurred(b)
    var_a, var_b = _blurred(a * a) - mean_a**2, _blurred(b * b) - mean_b**2
    covariance = _blurred(a * b) - mean_a * mean_b
    mean_a, mean_b = mean_a + 0.5, mean_b + 0.5
    luminance = (2 * mean_a * mean_b + K1**2) / (mean_a**2 + mean_b**2 + K1**2)
    structure = (2 * covariance + K2**2) / (var_a + var_b + K2**2)
    return (luminance * structure).mean((1, 2, 3))


def _blurred(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    places = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 * (places / SIGMA) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (1, 2):
        length = x.shape[axis] - WINDOW + 1
        x = jnp.stack([w * jax.lax.slice_in_dim(x, i, i + length, axis=axis) for i, w in enumerate(weights)]).sum(0)
    return x
