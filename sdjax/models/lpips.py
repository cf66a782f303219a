"""LPIPS: how different two images look, by the activations of VGG16 (Zhang et al. 2018; richzhang's lpips 0.1)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sdjax.models.vgg import TAPS, VGG16

# ImageNet's mean and deviation for images in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPS = 1e-10


class LPIPS(nn.Module):
    """The distance of images in [-1, 1]: weighted squared differences of activations of unit length, over all taps.

    The weights, "linear_<tap>", are not negative; they are part of this package (`sdjax/assets/lpips`).
    """

    def setup(self) -> None:
        self.net = VGG16()
        uniform = nn.initializers.constant(1.0)
        self.linear = [self.param(f"linear_{i}", uniform, (width,)) for i, width in enumerate(TAPS)]

    def __call__(self, x: Float[Array, "b h w 3"], y: Float[Array, "b h w 3"]) -> Float[Array, " b"]:
        """Sides of at least 16 pixels, below which the last tap has no activations."""
        both = jnp.concatenate([x, y]).astype(jnp.float32)
        taps = self.net((both - jnp.array(SHIFT)) / jnp.array(SCALE))
        weighted = [_difference(tap) * weight for tap, weight in zip(taps, self.linear, strict=True)]
        return jnp.stack([difference.sum(-1).mean((1, 2)) for difference in weighted]).sum(0)


def _difference(tap: Float[Array, "2*b h w c"]) -> Float[Array, "b h w c"]:
    a, b = jnp.split(_normalised(tap), 2)
    return jnp.square(a - b)


def _normalised(tap: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Normalise to unit length in channels; where all are zero it stays so, and has no gradient instead of NaN."""
    squares = jnp.square(tap).sum(-1, keepdims=True)
    length = jnp.where(squares > 0.0, jnp.sqrt(jnp.where(squares > 0.0, squares, 1.0)), 0.0)
    return tap / (length + EPS)
