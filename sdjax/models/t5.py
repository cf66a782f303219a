"""T5's encoder (Raffel et al. 2020; v1.1: Shazeer 2020): what Imagen and DeepFloyd IF read prompts with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sdjax.ops.attention import dot_product_attention
from sdjax.ops.partition import BATCH, TENSOR, constrain

BUCKETS = 32  # of distances between two tokens, half of them for tokens that follow
EXACT = 8  # distances that have a bucket of their own; wider and wider ranges of them share the rest
FARTHEST = 128  # the distance at which the ranges would end

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "gated-gelu": nn.gelu,  # the tanh approximation, which transformers calls gelu_new
}
"""By the name that transformers has for a feed-forward ("feed_forward_proj")."""


@dataclass(frozen=True)
class T5Config:
    """Sizes of an encoder.

    Attributes:
        head_size: of each; the heads need not make up the width.
        activation: "relu" for the original models; "gated-gelu", a product with a second linear map, for v1.1.
    """

    vocab_size: int = 32128
    width: int = 512
    layers: int = 6
    heads: int = 8
    head_size: int = 64
    feed_forward: int = 2048
    activation: str = "gated-gelu"

    @property
    def gated(self) -> bool:
        """True if the activated features are multiplied by others."""
        return self.activation.startswith("gated")

    @property
    def blocks(self) -> int:
        """Layers, each of which has parameters of its own."""
        return self.layers


def _original(width: int, layers: int, heads: int, head_size: int, feed_forward: int) -> T5Config:
    return T5Config(32128, width, layers, heads, head_size, feed_forward, "relu")


# Parameters; google-research/t5x, t5x/examples/t5 (t5_1_0, t5_1_1).
VARIANTS = {
    "t5_small": _original(512, 6, 8, 64, 2048),  # 35,330,816
    "t5_base": _original(768, 12, 12, 64, 3072),  # 109,628,544
    "t5_large": _original(1024, 24, 16, 64, 4096),  # 334,939,648
    "t5_3b": _original(1024, 24, 32, 128, 16384),  # 1,240,909,824
    "t5_11b": _original(1024, 24, 128, 128, 65536),  # 4,864,791,552
    "t5_v1_1_small": T5Config(width=512, layers=8, heads=6, feed_forward=1024),  # 35,332,800
    "t5_v1_1_base": T5Config(width=768, layers=12, heads=12, feed_forward=2048),  # 109,628,544
    "t5_v1_1_large": T5Config(width=1024, layers=24, heads=16, feed_forward=2816),  # 341,231,104
    "t5_v1_1_xl": T5Config(width=2048, layers=24, heads=32, feed_forward=5120),  # 1,223,527,424
    "t5_v1_1_xxl": T5Config(width=4096, layers=24, heads=64, feed_forward=10240),  # 4,762,310,656: IF's and Imagen's
}


def relative_buckets(length: int) -> Int[np.ndarray, "q k"]:
    """The bucket of the distance from each query to each key, of 0 to `BUCKETS` - 1 (Raffel et al. 2020, section 2.1).

    In integers: at distances 16, 32 and 64 the paper's logarithm is a whole number, which float32 may just miss.
    """
    place = np.arange(length)
    distance = place[None, :] - place[:, None]
    return np.searchsorted(_thresholds(), np.abs(distance), side="right") + BUCKETS // 2 * (distance > 0)


def _thresholds() -> list[int]:
    """The least distance of each bucket after the first: 1 to 8, 12, 16, 23, 32, 46, 64, 91."""
    ranges = BUCKETS // 2 - EXACT

    def least(j: int) -> int:  # r for which ranges * log(r / EXACT) / log(FARTHEST / EXACT) reaches j
        return next(r for r in range(EXACT, FARTHEST) if r**ranges * EXACT**j >= FARTHEST**j * EXACT**ranges)

    return [*range(1, EXACT), *map(least, range(ranges))]


def _fan_in(scale: float = 1.0) -> nn.initializers.Initializer:
    """Normal with a variance of `scale` an input (google-research/t5x, layers.py)."""
    return nn.initializers.variance_scaling(scale, "fan_in", "normal")


class T5Attention(nn.Module):
    """Self-attention without biases and without a scale of the scores, to which a bias by distance is added."""

    config: T5Config
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], bias: Float[Array, "h l l"], mask: Bool[Array, "b l"] | None
    ) -> Float[Array, "b l d"]:
        c = self.config

        def project(name: str, scale: float = 1.0) -> Array:
            made = self._dense(c.heads * c.head_size, name, _fan_in(scale))(x)
            return made.reshape(*x.shape[:-1], c.heads, c.head_size)

        q, k, v = project("to_q", 1 / c.head_size), project("to_k"), project("to_v")  # q's init is what scores lack
        out = dot_product_attention(q, k, v, mask=mask, bias=bias)
        return self._dense(c.width, "to_out", _fan_in())(out.reshape(*x.shape[:-1], -1))

    def _dense(self, features: int, name: str, init: Any) -> nn.Dense:
        return nn.Dense(features, use_bias=False, kernel_init=init, dtype=self.dtype, name=name)


class T5FeedForward(nn.Module):
    """Two linear maps with an activation between them; v1.1's is gated (Shazeer 2020, GEGLU)."""

    config: T5Config
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        c, activation = self.config, ACTIVATIONS[self.config.activation]
        if c.gated:
            h = activation(self._dense(c.feed_forward, "wi_0")(x)) * self._dense(c.feed_forward, "wi_1")(x)
        else:
            h = activation(self._dense(c.feed_forward, "wi")(x))
        return self._dense(c.width, "wo")(constrain(h, BATCH, None, TENSOR))

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, use_bias=False, kernel_init=_fan_in(), dtype=self.dtype, name=name)


class T5Layer(nn.Module):
    """Self-attention and a feed-forward, each on an RMS norm and added, in float32: v1.1's sums overflow float16."""

    config: T5Config
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], bias: Float[Array, "h l l"], mask: Bool[Array, "b l"] | None
    ) -> Float[Array, "b l d"]:
        h = nn.RMSNorm(dtype=self.dtype, name="layer_norm1")(x)
        x = x + T5Attention(self.config, self.dtype, name="self_attn")(h, bias, mask)
        h = nn.RMSNorm(dtype=self.dtype, name="layer_norm2")(x)
        return constrain(x + T5FeedForward(self.config, self.dtype, name="ff")(h), BATCH, None, None)


class T5Encoder(nn.Module):
    """Token ids to states."""

    config: T5Config
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"] | None = None) -> Float[Array, "b l d"]:
        """The last layer's states, normalised.

        Args:
            ids: of any number of tokens.
            mask: which tokens may be attended to; None means all. The others have states, too.
        """
        c = self.config
        embed = nn.Embed(c.vocab_size, c.width, embedding_init=nn.initializers.normal(1.0), name="token_embedding")
        by_bucket = nn.initializers.normal(c.width**-0.5)
        biases = nn.Embed(BUCKETS, c.heads, embedding_init=by_bucket, name="relative_attention_bias")
        x = embed(ids).astype(jnp.float32)
        bias = biases(jnp.asarray(relative_buckets(ids.shape[1]))).transpose(2, 0, 1)
        for i in range(c.layers):
            x = T5Layer(c, self.dtype, name=f"layers_{i}")(x, bias, mask)
        return nn.RMSNorm(dtype=self.dtype, name="final_layer_norm")(x)
