"""The discriminator of patches (pix2pix, Isola et al. 2017; CompVis/taming-transformers NLayerDiscriminator)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from sdjax.ops.convolution import convolve

EPS = 1e-5


class BatchNorm(nn.Module):
    """Batch normalisation by the batch at hand, over all devices; no running means, for a critic only ever trains."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        scale = self.param("scale", _around_one, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        pixels = x.astype(jnp.float32)
        centred = pixels - pixels.mean((0, 1, 2))
        variance = jnp.square(centred).mean((0, 1, 2))
        return (centred * (jax.lax.rsqrt(variance + EPS) * scale) + bias).astype(x.dtype)


def _around_one(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
    return 1.0 + 0.02 * jax.random.normal(key, shape)


class PatchDiscriminator(nn.Module):
    """Logits, high where a patch of an image looks real.

    Attributes:
        layers: halvings of the resolution: 3 judges patches of 70 pixels.
        width: features of the first convolution; later ones have up to eight times as many.
        dtype: the type of the arithmetic.
    """

    layers: int = 3
    width: int = 64
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b H W 3"]) -> Float[Array, "b h w 1"]:
        """Sides of at least 2^(layers + 2) pixels, below which nothing is left to judge."""
        for i in range(self.layers + 1):
            features, stride = self.width * min(2**i, 8), 2 if i < self.layers else 1
            x = self._conv(features, stride, use_bias=i == 0, name=f"conv_{i}")(x)
            x = BatchNorm(name=f"norm_{i}")(x) if i else x
            x = nn.leaky_relu(x, 0.2)
        return self._conv(1, 1, use_bias=True, name=f"conv_{self.layers + 1}")(x).astype(jnp.float32)

    def _conv(self, features: int, stride: int, use_bias: bool, name: str) -> nn.Conv:
        return nn.Conv(
            features,
            (4, 4),
            strides=stride,
            padding=((1, 1), (1, 1)),
            use_bias=use_bias,
            kernel_init=nn.initializers.normal(0.02),
            dtype=self.dtype,
            conv_general_dilated=convolve,
            name=name,
        )
