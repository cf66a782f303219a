"""VGG16's convolutions (Simonyan & Zisserman 2015), whose activations LPIPS compares."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sdjax.models.layers import Conv

# Features of the convolutions between two poolings; the last activation of each is a tap.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
TAPS = tuple(stage[-1] for stage in STAGES)


class VGG16(nn.Module):
    """The activations relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 of images that are normalised already."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> list[Float[Array, "b h2 w2 c"]]:
        taps = []
        for i, stage in enumerate(STAGES):
            x = nn.max_pool(x, (2, 2), (2, 2)) if i else x
            for j, features in enumerate(stage):
                x = nn.relu(Conv(features, dtype=jnp.float32, name=f"stage_{i}_conv_{j}")(x))
            taps.append(x)
        return taps
