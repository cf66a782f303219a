"""T2I-Adapter: features of a hint for the way down of a UNet (Mou et al. 2023; TencentARC/T2I-Adapter).

It sees neither noise nor timestep, so its features are computed once an image. Module names follow diffusers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sdjax.models.layers import Conv


@dataclass(frozen=True)
class T2IAdapterConfig:
    """Sizes of an adapter.

    Attributes:
        kind: one of `KINDS`, diffusers' `adapter_type`.
        in_channels: of the hint: 3, or 1 for grey ones.
        channels: of each stage; a light adapter's last stage has those of the stage before it.
        layers: residual blocks of a stage.
        factor: pixels of a first feature along each side.
    """

    kind: str = "full_adapter"
    in_channels: int = 3
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2
    factor: int = 8

    @property
    def light(self) -> bool:
        """True for adapters whose stages are narrow within."""
        return self.kind == "light_adapter"

    @property
    def features(self) -> tuple[int, ...]:
        """Channels of each stage's features."""
        return (*self.channels, self.channels[-1]) if self.light else self.channels

    @property
    def halved(self) -> tuple[int, ...]:
        """Stages whose features are half as large as those before."""
        return (2,) if self.kind == "full_adapter_xl" else tuple(range(1, len(self.features)))

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Channels of each stage's features, and pixels along each of their sides."""
        sides = [self.factor * 2 ** sum(halved <= i for halved in self.halved) for i in range(len(self.features))]
        return tuple(zip(self.features, sides, strict=True))

    def example_hint(self) -> Float[Array, "1 s s c"]:
        """The smallest hint, for initialisation."""
        side = self.places[-1][1]
        return jnp.zeros((1, side, side, self.in_channels))

    @property
    def blocks(self) -> int:
        """Residual blocks, each of which has parameters of its own."""
        return len(self.features) * self.layers


KINDS = ("full_adapter", "full_adapter_xl", "light_adapter")
XL = T2IAdapterConfig("full_adapter_xl", factor=16)
LIGHT = T2IAdapterConfig("light_adapter", channels=(320, 640, 1280), layers=4)
VARIANTS = {
    "full": T2IAdapterConfig(),  # 77,369,280 parameters
    "full_grey": T2IAdapterConfig(in_channels=1),  # 77,000,640
    "full_xl": XL,  # 79,028,160
    "light": LIGHT,  # 18,689,200
}


class T2IAdapter(nn.Module):
    """A hint in [0, 1] to features, the largest first."""

    config: T2IAdapterConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, hint: Float[Array, "b H W c"]) -> tuple[Float[Array, "b h w f"], ...]:
        c, features = self.config, []
        x = unshuffled(hint.astype(self.dtype), c.factor)
        if not c.light:
            x = Conv(c.channels[0], dtype=self.dtype, name="conv_in")(x)
        for i, width in enumerate(c.features):
            if i in c.halved:
                x = halved(x)
            inner = width // 4 if c.light else width
            if x.shape[-1] != inner or c.light:
                x = Conv(inner, kernel=1, dtype=self.dtype, name=f"body_{i}_in_conv")(x)
            for j in range(c.layers):
                x = AdapterBlock(3 if c.light else 1, self.dtype, name=f"body_{i}_resnets_{j}")(x)
            if c.light:
                x = Conv(width, kernel=1, dtype=self.dtype, name=f"body_{i}_out_conv")(x)
            features.append(x)
        return tuple(features)


class AdapterBlock(nn.Module):
    """Convolution, ReLU, convolution, and what was there.

    Attributes:
        kernel: of the second convolution.
    """

    kernel: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        h = nn.relu(Conv(x.shape[-1], dtype=self.dtype, name="block1")(x))
        return x + Conv(x.shape[-1], kernel=self.kernel, dtype=self.dtype, name="block2")(h)


def unshuffled(x: Float[Array, "b H W c"], factor: int) -> Float[Array, "b h w c*f*f"]:
    """Squares of `factor` pixels a side as channels, those of one channel together (torch's PixelUnshuffle)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // factor, factor, w // factor, factor, c)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(b, h // factor, w // factor, c * factor**2)


def halved(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """The mean of four pixels; at odd edges of those that there are (torch's AvgPool2d with ceil_mode)."""
    odd: Any = tuple((0, side % 2) for side in x.shape[1:3])
    return nn.avg_pool(x, (2, 2), (2, 2), odd, count_include_pad=False)
