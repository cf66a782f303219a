"""The pieces that autoencoders and UNets share: norms in float32, resampling, residual blocks, time embeddings."""

from __future__ import annotations

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sdjax.core.convolution import Edges, convolve, over_rows
from sdjax.core.partition import TENSOR, constrain_picture

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
        pixels = x.astype(jnp.float32).reshape(x.shape[0], -1, channels)
        centred = pixels - self._group_mean(pixels)
        variance = self._group_mean(jnp.square(centred))
        normed = centred * (jax.lax.rsqrt(variance + self.eps) * scale) + bias
        return normed.reshape(x.shape).astype(self.dtype)

    def _group_mean(self, pixels: Float[Array, "b n c"]) -> Float[Array, "b 1 c"]:
        """Each channel gets its group's mean. Pixels are summed first, all channels at once: a sum over the two or
        three channels of a group inside the large array would be twenty times slower on a CPU."""
        batch, _, channels = pixels.shape
        means = pixels.mean(axis=1).reshape(batch, self.groups, -1).mean(axis=-1)
        return jnp.repeat(means, channels // self.groups, axis=-1)[:, None]


class Conv(nn.Module):
    """A square convolution with torch's symmetric padding."""

    features: int
    kernel: int = 3
    stride: int = 1
    zero: bool = False
    dtype: DTypeLike = jnp.float32

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
            conv_general_dilated=convolve,
        )
        nn.share_scope(self, conv)
        return conv(x)


def resize_nearest(x: Float[Array, "b h w c"], height: int, width: int) -> Float[Array, "b H W c"]:
    """Pixel (i, j) is that at (floor(i h / H), floor(j w / W)): torch's nearest interpolation."""
    h, w = x.shape[1:3]
    return x[:, jnp.arange(height) * h // height][:, :, jnp.arange(width) * w // width]


class DoublingConv(nn.Module):
    """Nearest-neighbour doubling and a 3x3 convolution, without making the doubled picture.

    Of three rows under the kernel two are the same, so each of the four pixels that a pixel becomes is a convolution
    with 2x2 sums of the kernel's rows and columns: four products in place of nine. All four are one convolution.
    """

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w f"]:
        c = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, c, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        rows = _doubled(kernel)  # [i r 3 c f]: what output row i sees of input row r
        both = _doubled(jnp.moveaxis(rows, 2, 0))  # [j s i r c f]
        both = jnp.transpose(both, (3, 1, 4, 2, 0, 5)).reshape(2, 2, c, 4 * self.features).astype(self.dtype)
        return over_rows(_doubled_rows, x.astype(self.dtype), both, (1, 1)) + bias.astype(self.dtype)


def _doubled_rows(x: Float[Array, "b r w c"], kernel: Float[Array, "2 2 c 4*f"], edges: Edges) -> Array:
    """The doubled picture of rows that are seen with one more above and below, in x or still to be added."""
    out = _quarters(x, kernel, edges)
    b, h, w = out.shape[0], out.shape[1] - 1, out.shape[2] - 1
    out = out.reshape(b, h + 1, w + 1, 2, 2, -1)
    pixels = jnp.stack([jnp.stack([out[:, i : i + h, j : j + w, i, j] for j in (0, 1)], 3) for i in (0, 1)], 2)
    return pixels.reshape(b, 2 * h, 2 * w, -1)


def _convolved(x: Float[Array, "b r w c"], kernel: Float[Array, "2 2 c 4*f"], edges: Edges) -> Array:
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), (edges, (1, 1)), dimension_numbers=names)


# Its gradient of the kernel is four products of matrices: XLA's own, a convolution under a window with an odd number of
# rows and columns, takes ten times as long on a CPU.
_quarters = jax.custom_vjp(_convolved, nondiff_argnums=(2,))


def _quarters_forward(x: Array, kernel: Array, edges: Edges) -> tuple[Array, tuple[Array, Array]]:
    return _convolved(x, kernel, edges), (x, kernel)


def _quarters_backward(edges: Edges, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept
    (of_x,) = jax.linear_transpose(lambda x: _convolved(x, kernel, edges), x)(gradient)
    _, rows, columns, _ = gradient.shape
    x = jnp.pad(x, ((0, 0), edges, (1, 1), (0, 0)))
    product = partial(jnp.einsum, "bhwc,bhwf->cf", preferred_element_type=jnp.float32)
    of_kernel = [[product(x[:, i : i + rows, j : j + columns], gradient) for j in (0, 1)] for i in (0, 1)]
    return of_x, jnp.array(of_kernel).astype(kernel.dtype)


_quarters.defvjp(_quarters_forward, _quarters_backward)


def _doubled(taps: Float[Array, "3 ..."]) -> Float[Array, "2 2 ..."]:
    """For the first and the second of two output pixels, the weights of the two input pixels that they see."""
    first, middle, last = taps.astype(jnp.float32)
    return jnp.stack([jnp.stack([first, middle + last]), jnp.stack([first + middle, last])])


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], size: tuple[int, ...] | None = None) -> Float[Array, "b H W c"]:
        """Args: `size` is the height and width to reach, where it is not the double: that of an odd level."""
        double = (2 * x.shape[1], 2 * x.shape[2])
        if size is None or tuple(size) == double:
            return DoublingConv(x.shape[-1], self.dtype, name="conv")(x)
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
    """Norm, SiLU, convolution, twice; a time embedding, where given, acts between.

    Attributes:
        features: that come out.
        zero: whether the second convolution starts at zero, so that a fresh block is the identity (ADM).
        scale_shift: whether the embedding scales and shifts the second norm's output (ADM) or is added before it.
        resample: "" or what is done to the resolution after the first norm, and to what is added: "down", the mean of
            four pixels, or "up", each pixel four times (ADM).
        size: the height and width that "up" reaches, where they are not the double: those of an odd level.
    """

    features: int
    groups: int = 32
    eps: float = 1e-5
    zero: bool = False
    scale_shift: bool = False
    resample: str = ""
    size: tuple[int, ...] | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], temb: Float[Array, "b e"] | None = None
    ) -> Float[Array, "b h2 w2 f"]:
        norm, resampled = partial(GroupNorm, self.groups, self.eps, self.dtype), RESAMPLINGS[self.resample]
        h = resampled(nn.silu(norm(name="norm1")(x)), self.size)
        h = Conv(self.features, dtype=self.dtype, name="conv1")(h)
        embedded = None
        if temb is not None:
            features = self.features * (1 + self.scale_shift)
            embedded = nn.Dense(features, dtype=self.dtype, name="time_emb_proj")(nn.silu(temb))[:, None, None, :]
            h = h if self.scale_shift else h + embedded
        h = norm(name="norm2")(constrain_picture(h, TENSOR))
        if embedded is not None and self.scale_shift:
            scale, shift = jnp.split(embedded, 2, axis=-1)
            h = h * (1 + scale) + shift
        h = Conv(self.features, zero=self.zero, dtype=self.dtype, name="conv2")(nn.silu(h))
        x = resampled(x, self.size)
        if x.shape[-1] != self.features:
            x = Conv(self.features, kernel=1, dtype=self.dtype, name="conv_shortcut")(x)
        return constrain_picture(x + h)


def timestep_embedding(t: Float[Array, " b"], width: int, max_period: float = 10000.0) -> Float[Array, "b w"]:
    """Sinusoids of t, cosines first (DDPM; openai/guided-diffusion nn.py), in float32.

    Args:
        t: timesteps; fractional ones are allowed.
        width: an even number of features.
    """
    half = width // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
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
    """Dense, SiLU, Dense: what turns sinusoids or a condition vector into an embedding."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b v"], cond: Float[Array, "b g"] | None = None) -> Float[Array, "b f"]:
        """Args: `cond` is a second vector, which a linear map adds to x (LCM's guidance)."""
        if cond is not None:
            x = x + nn.Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name="cond_proj")(cond)
        x = nn.Dense(self.features, dtype=self.dtype, name="linear_1")(x)
        return nn.Dense(self.features, dtype=self.dtype, name="linear_2")(nn.silu(x))
