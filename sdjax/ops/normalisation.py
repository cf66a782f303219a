"""Normalisation in float32, whatever the compute type."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def group_norm(
    x: Float[Array, "b *hw c"], scale: Float[Array, " c"], bias: Float[Array, " c"], groups: int, eps: float
) -> Float[Array, "b *hw c"]:
    """Zero mean and unit variance of each group of channels over all pixels, scaled and shifted (Wu & He 2018)."""
    pixels = x.astype(jnp.float32).reshape(x.shape[0], -1, x.shape[-1])
    centred = pixels - _group_mean(pixels, groups)
    variance = _group_mean(jnp.square(centred), groups)
    return (centred * (jax.lax.rsqrt(variance + eps) * scale) + bias).reshape(x.shape)


def _group_mean(pixels: Float[Array, "b n c"], groups: int) -> Float[Array, "b 1 c"]:
    """Give each channel its group's mean. Pixels are summed first, all channels at once: a sum over the two or three
    channels of a group inside the large array would be twenty times slower on a CPU."""
    batch, _, channels = pixels.shape
    means = pixels.mean(axis=1).reshape(batch, groups, -1).mean(axis=-1)
    return jnp.repeat(means, channels // groups, axis=-1)[:, None]
