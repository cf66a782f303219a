"""The pieces that autoencoders and UNets share: norms in float32, resampling, residual blocks, time embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sdjax.ops.convolution import convolve
from sdjax.ops.doubling import convolve_doubled
from sdjax.ops.normalisation import group_norm
from sdjax.ops.partition import TENSOR, constrain_image

Activation = Callable[[Array], Array]


def gelu(x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    """Gaussian error linear unit by the error function itself, as torch's (Hendrycks & Gimpel 2016, eq. 1)."""
    return nn.gelu(x, approximate=False)


# torch pads a strided convolution on both sides; XLA's SAME would pad only right and bottom.
SYMMETRIC = ((1, 1), (1, 1))


class GroupNorm(nn.Module):
    """Group normalisation in float32 whatever the compute type (ADM's GroupNorm32), channels last."""

    groups: int = 32
    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b *hw c"]) -> Float[Array, "b *hw c"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        return group_norm(x, scale, bias, self.groups, self.eps).astype(self.dtype)


class Conv(nn.Module):
    """A square convolution with torch's symmetric padding.

    Attributes:
        zero: the kernel begins at zero.
        convolve: of an image and a kernel, as `jax.lax.conv_general_dilated`.
    """

    features: int
    kernel: int = 3
    stride: int = 1
    zero: bool = False
    dtype: DTypeLike = jnp.float32
    convolve: Callable[..., Array] = convolve

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
        half = self.kernel // 2
        init = nn.initializers.zeros if self.zero else nn.initializers.lecun_normal()
        conv = nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            strides=self.stride,
            padding=((half, half), (half, half)),
            kernel_init=init,
            dtype=self.dtype,
            conv_general_dilated=self.convolve,
        )
        nn.share_scope(self, conv)
        return conv(x)


def resize_nearest(x: Float[Array, "b h w c"], height: int, width: int) -> Float[Array, "b H W c"]:
    """Pixel (i, j) is that at (floor(i h / H), floor(j w / W)): torch's nearest interpolation."""
    h, w = x.shape[1:3]
    return x[:, jnp.arange(height) * h // height][:, :, jnp.arange(width) * w // width]


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], size: tuple[int, ...] | None = None) -> Float[Array, "b H W c"]:
        """Args: `size` is the height and width to reach, where it is not the double: that of an odd level."""
        double = (2 * x.shape[1], 2 * x.shape[2])
        if size is None or tuple(size) == double:
            return Conv(x.shape[-1], dtype=self.dtype, convolve=convolve_doubled, name="conv")(x)
        return Conv(x.shape[-1], dtype=self.dtype, name="conv")(resize_nearest(x, *size))


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2.

    Attributes:
        padding: `SYMMETRIC` in UNets; "SAME" in autoencoders, which on an even size pads right and bottom only
            (CompVis/latent-diffusion, ldm/modules/diffusionmodules/model.py).
    """

    padding: str | tuple[tuple[int, int], tuple[int, int]] = SYMMETRIC
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h/2 w/2 c"]:
        how = {"padding": self.padding, "dtype": self.dtype, "conv_general_dilated": convolve}
        return nn.Conv(x.shape[-1], (3, 3), strides=2, name="conv", **how)(x)


def _halved(x: Array, size: tuple[int, ...] | None) -> Array:
    return nn.avg_pool(x, (2, 2), (2, 2))


def _twice(x: Array, size: tuple[int, ...] | None) -> Array:
    return resize_nearest(x, *(size or (2 * x.shape[1], 2 * x.shape[2])))


RESAMPLINGS = {"": lambda x, size: x, "down": _halved, "up": _twice}


class ResBlock(nn.Module):
    """Norm, activation, convolution, twice; a time embedding, where given, acts between.

    Attributes:
        features: that come out.
        zero: whether the second convolution starts at zero, so that a fresh block is the identity (ADM).
        scale_shift: whether the embedding scales and shifts the second norm's output (ADM) or is added before it.
        resample: "" or what is done to the resolution after the first norm, and to what is added: "down", the mean of
            four pixels, or "up", each pixel four times (ADM).
        size: the height and width that "up" reaches, where they are not the double: those of an odd level.
        activated: whether the embedding is one that an activation has acted on (deep-floyd/IF, stage II).
        output_divisor: of the sum of both branches.
        project: whether what is added goes through a 1x1 convolution even where the widths agree (Imagen).
    """

    features: int
    groups: int = 32
    eps: float = 1e-5
    zero: bool = False
    scale_shift: bool = False
    resample: str = ""
    size: tuple[int, ...] | None = None
    activation: Activation = nn.silu
    activated: bool = False
    output_divisor: float = 1.0
    project: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], temb: Float[Array, "b e"] | None = None
    ) -> Float[Array, "b h2 w2 f"]:
        norm, resampled = partial(GroupNorm, self.groups, self.eps, self.dtype), RESAMPLINGS[self.resample]
        h = resampled(self.activation(norm(name="norm1")(x)), self.size)
        h = Conv(self.features, dtype=self.dtype, name="conv1")(h)
        scale, shift = 0.0, 0.0
        if temb is not None:
            features = self.features * (1 + self.scale_shift)
            temb = temb if self.activated else self.activation(temb)
            made = nn.Dense(features, dtype=self.dtype, name="time_emb_proj")(temb)[:, None, None, :]
            if self.scale_shift:  # after the norm (ADM), else before it
                scale, shift = jnp.split(made, 2, axis=-1)
            else:
                h = h + made
        h = norm(name="norm2")(constrain_image(h, TENSOR))
        h = h * (1 + scale) + shift if self.scale_shift else h
        h = Conv(self.features, zero=self.zero, dtype=self.dtype, name="conv2")(self.activation(h))
        x = resampled(x, self.size)
        if self.project or x.shape[-1] != self.features:
            x = Conv(self.features, kernel=1, dtype=self.dtype, name="conv_shortcut")(x)
        return constrain_image((x + h) / self.output_divisor if self.output_divisor != 1.0 else x + h)


def timestep_embedding(
    t: Float[Array, " b"], width: int, max_period: float = 10000.0, shift: int = 0
) -> Float[Array, "b w"]:
    """Sinusoids of t, cosines first (DDPM; openai/guided-diffusion nn.py), in float32.

    Args:
        t: timesteps; fractional ones are allowed.
        width: an even number of features.
        shift: 1 lets the last frequency be 1 / max_period.
    """
    half = width // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / (half - shift))
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def guidance_embedding(scale: Float[Array, " b"], width: int, max_period: float = 10000.0) -> Float[Array, "b w"]:
    """Sinusoids of 1000 times a guidance scale, sines first (google-research/vdm model_vdm.py; LCM), in float32.

    Unlike those of `timestep_embedding` the frequencies include the last one, 1 / max_period.

    Args:
        scale: what the network was distilled for: w of Imagen's guidance, the customary scale minus 1.
        width: at least 4 features; an odd one ends with a zero.
    """
    half = width // 2
    # Angles reach 14,000, where a frequency one bit off moves a sine by 1e-3. So the exponents are rounded to float32
    # as torch rounds them, and their exp is taken on the host, rounded correctly.
    step = np.float32(math.log(max_period)) / np.float32(half - 1)
    exponents = -step * np.arange(half, dtype=np.float32)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = (scale.astype(jnp.float32) * 1000.0)[:, None] * frequencies
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(waves, ((0, 0), (0, width % 2)))


class EmbeddingMLP(nn.Module):
    """Dense, activation, Dense: what turns sinusoids or a condition vector into an embedding."""

    features: int
    dtype: DTypeLike = jnp.float32
    activation: Activation = nn.silu

    @nn.compact
    def __call__(self, x: Float[Array, "b v"], cond: Float[Array, "b g"] | None = None) -> Float[Array, "b f"]:
        """Args: `cond` is a second vector, which a linear map adds to x (LCM's guidance)."""
        if cond is not None:
            x = x + nn.Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name="cond_proj")(cond)
        x = nn.Dense(self.features, dtype=self.dtype, name="linear_1")(x)
        return nn.Dense(self.features, dtype=self.dtype, name="linear_2")(self.activation(x))
