"""Latents as small pictures, without a decoder."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from sdjax.diffusion_model.model import DiffusionModel

LONGEST = 512  # pixels of a preview; a model of pixels has previews of its own size


def fit(latents: Float[np.ndarray, "n h w z"], images: Float[np.ndarray, "n H W 3"]) -> Float[np.ndarray, "z+1 3"]:
    """The linear map from latents to the mean colours of the pixels that they stand for, by least squares.

    Such maps are known for Stable Diffusion's autoencoders (ComfyUI, latent_formats.py); one that is fitted to the
    model's own images suits any autoencoder.
    """
    n, h, w, z = latents.shape
    small = images.reshape(n, h, images.shape[1] // h, w, images.shape[2] // w, 3).mean(axis=(2, 4))
    rows = np.concatenate([latents.reshape(-1, z), np.ones((n * h * w, 1), latents.dtype)], axis=1)
    return np.linalg.lstsq(rows, small.reshape(-1, 3), rcond=None)[0].astype(np.float32)


def of_pixels(model: DiffusionModel) -> Float[np.ndarray, "z+1 3"]:
    """The map of a model that diffuses images in [-1, 1]."""
    return np.concatenate([np.eye(model.channels, 3), np.ones((1, 3))]).astype(np.float32) / np.float32(2.0)


@jax.jit
def preview(x0: Float[Array, "b h w z"], colours: Float[Array, "z+1 3"]) -> UInt8[Array, "b h w 3"]:
    """Images of denoised latents."""
    step = -(-max(x0.shape[1:3]) // LONGEST)
    pixels = x0[:, ::step, ::step] @ colours[:-1] + colours[-1]
    return jnp.rint(jnp.clip(pixels, 0.0, 1.0) * 255.0).astype(jnp.uint8)
