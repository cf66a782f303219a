"""Inception v3 as FID knows it: TensorFlow's of December 2015, which differs from torchvision's in its pooling.

Names of modules are those of the weights that pytorch-fid and torch-fidelity publish. All arithmetic is float32.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

SIDE = 299
CLASSES = 1008
SPATIAL_CHANNELS = 7
EPS = 1e-3


class Features(NamedTuple):
    """Features of an image that metrics use.

    Attributes:
        pooled: the mean activations before the classifier: FID, KID, precision and recall.
        spatial: seven channels of an earlier layer with their places: sFID (openai/guided-diffusion, evaluations).
        logits: without the classifier's bias: the Inception Score.
    """

    pooled: Float[Array, "b 2048"]
    spatial: Float[Array, "b 2023"]
    logits: Float[Array, "b 1008"]


class BasicConv(nn.Module):
    """Convolution, batch normalisation with stored means, ReLU."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    same: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
        padding = [(size // 2, size // 2) if self.same else (0, 0) for size in self.kernel]
        x = nn.Conv(self.features, self.kernel, self.stride, padding, use_bias=False, name="conv")(x)
        return nn.relu(StoredNorm(name="bn")(x))


class StoredNorm(nn.Module):
    """Batch normalisation with the means and variances of training."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        ones, zeros, shape = nn.initializers.ones, nn.initializers.zeros, (x.shape[-1],)
        mean, variance = self.param("mean", zeros, shape), self.param("var", ones, shape)
        scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
        return (x - mean) * (jax.lax.rsqrt(variance + EPS) * scale) + bias


class BlockA(nn.Module):
    """1x1, 5x5, two 3x3 and a pooling, at 35x35."""

    pool: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        one = BasicConv(64, name="branch1x1")(x)
        five = BasicConv(64, (5, 5), name="branch5x5_2")(BasicConv(48, name="branch5x5_1")(x))
        three = BasicConv(96, (3, 3), name="branch3x3dbl_2")(BasicConv(64, name="branch3x3dbl_1")(x))
        three = BasicConv(96, (3, 3), name="branch3x3dbl_3")(three)
        return jnp.concatenate([one, five, three, BasicConv(self.pool, name="branch_pool")(_mean(x))], -1)


class BlockB(nn.Module):
    """From 35x35 to 17x17."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        three = BasicConv(384, (3, 3), 2, same=False, name="branch3x3")(x)
        double = BasicConv(96, (3, 3), name="branch3x3dbl_2")(BasicConv(64, name="branch3x3dbl_1")(x))
        double = BasicConv(96, (3, 3), 2, same=False, name="branch3x3dbl_3")(double)
        return jnp.concatenate([three, double, _halved(x)], -1)


class BlockC(nn.Module):
    """Rows and columns of seven, at 17x17; also what its 1x1 branch alone says."""

    width: int

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        one, seven, double = BasicConv(192, name="branch1x1")(x), x, x
        for number, (features, kernel) in enumerate(((self.width, (1, 1)), (self.width, (1, 7)), (192, (7, 1)))):
            seven = BasicConv(features, kernel, name=f"branch7x7_{number + 1}")(seven)
        for number, kernel in enumerate(((1, 1), (7, 1), (1, 7), (7, 1), (1, 7))):
            double = BasicConv(192 if number == 4 else self.width, kernel, name=f"branch7x7dbl_{number + 1}")(double)
        return jnp.concatenate([one, seven, double, BasicConv(192, name="branch_pool")(_mean(x))], -1), one


class BlockD(nn.Module):
    """From 17x17 to 8x8."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        three = BasicConv(320, (3, 3), 2, same=False, name="branch3x3_2")(BasicConv(192, name="branch3x3_1")(x))
        seven = x
        for number, kernel in enumerate(((1, 1), (1, 7), (7, 1))):
            seven = BasicConv(192, kernel, name=f"branch7x7x3_{number + 1}")(seven)
        seven = BasicConv(192, (3, 3), 2, same=False, name="branch7x7x3_4")(seven)
        return jnp.concatenate([three, seven, _halved(x)], -1)


class BlockE(nn.Module):
    """Rows and columns of three, at 8x8. The last block's pooling is a maximum: a mistake of 2015 that FID keeps."""

    last: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        three = BasicConv(384, name="branch3x3_1")(x)
        double = BasicConv(384, (3, 3), name="branch3x3dbl_2")(BasicConv(448, name="branch3x3dbl_1")(x))
        parts = [BasicConv(320, name="branch1x1")(x)]
        for name, wide in (("branch3x3_2", three), ("branch3x3dbl_3", double)):
            parts += [BasicConv(384, (1, 3), name=f"{name}a")(wide), BasicConv(384, (3, 1), name=f"{name}b")(wide)]
        pooled = nn.max_pool(x, (3, 3), (1, 1), "SAME") if self.last else _mean(x)
        return jnp.concatenate([*parts, BasicConv(192, name="branch_pool")(pooled)], -1)


class Inception(nn.Module):
    """Features of images of any size, as bytes."""

    @nn.compact
    def __call__(self, images: UInt8[Array, "b h w 3"]) -> Features:
        x = (resize(images.astype(jnp.float32), SIDE) - 128.0) / 128.0
        x = BasicConv(32, (3, 3), 2, same=False, name="Conv2d_1a_3x3")(x)
        x = BasicConv(32, (3, 3), same=False, name="Conv2d_2a_3x3")(x)
        x = _halved(BasicConv(64, (3, 3), name="Conv2d_2b_3x3")(x))
        x = BasicConv(80, name="Conv2d_3b_1x1")(x)
        x = _halved(BasicConv(192, (3, 3), same=False, name="Conv2d_4a_3x3")(x))
        for letter, pool in (("b", 32), ("c", 64), ("d", 64)):
            x = BlockA(pool, name=f"Mixed_5{letter}")(x)
        x, spatial = BlockB(name="Mixed_6a")(x), {}
        for letter, width in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
            x, spatial[letter] = BlockC(width, name=f"Mixed_6{letter}")(x)
        x = BlockD(name="Mixed_7a")(x)
        x = BlockE(False, name="Mixed_7b")(x)
        pooled = BlockE(True, name="Mixed_7c")(x).mean((1, 2))
        logits = nn.Dense(CLASSES, name="fc")(pooled) - self.variables["params"]["fc"]["bias"]
        places = spatial["d"][..., :SPATIAL_CHANNELS]  # TensorFlow's "mixed_6/conv"
        return Features(pooled, places.reshape(len(places), -1), logits)


def resize(images: Float[Array, "b h w c"], side: int) -> Float[Array, "b s s c"]:
    """Bilinear as in TensorFlow 1: pixel i is at i h / side of the input, and nothing is antialiased."""
    for axis in (2, 1):
        size = images.shape[axis]
        places = jnp.arange(side, dtype=jnp.float32) * jnp.float32(size / side)
        lower = jnp.floor(places).astype(jnp.int32)
        upper = jnp.minimum(lower + 1, size - 1)
        share = (places - lower).reshape([-1 if i == axis else 1 for i in range(4)])
        a, b = (jnp.take(images, index, axis) for index in (lower, upper))
        images = a + (b - a) * share
    return images


def _halved(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), (2, 2))


def _mean(x: Array) -> Array:
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
