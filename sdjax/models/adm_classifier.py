"""ADM's classifier of noisy images, for guidance (openai/guided-diffusion unet.py EncoderUNetModel)."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sdjax.models.conditioning import Cond
from sdjax.models.unet2d import MULTIPLIERS, Encoder2D, UNet2DConfig
from sdjax.ops.attention import dot_product_attention
from sdjax.ops.partition import BATCH, constrain

HEAD_WIDTH = 64
UNCONDITIONAL = Cond()


@dataclass(frozen=True)
class ClassifierConfig:
    """Sizes of a classifier.

    Attributes:
        encoder: of the half UNet; its output channels and classes have no meaning.
        size: of the images, which the pooling's places are counted for.
        classes: that it knows.
    """

    encoder: UNet2DConfig
    size: int
    classes: int = 1000

    @property
    def blocks(self) -> int:
        """Residual blocks, each of which has parameters of its own."""
        return self.encoder.layers_per_block * len(self.encoder.channels) + 2


def _row(size: int, attention: tuple[int, ...], layers: int = 2) -> ClassifierConfig:
    channels = tuple(int(128 * m) for m in MULTIPLIERS[size])
    heads = tuple(max(width // HEAD_WIDTH, 1) for width in channels)
    encoder = UNet2DConfig(
        channels, attention, heads, width=128, layers_per_block=layers, scale_shift=True, resblock_updown=True
    )
    return ClassifierConfig(encoder, size)


VARIANTS = {
    "adm_64": _row(64, (1, 2, 3), layers=4),  # 65.4 million parameters
    "adm_128": _row(128, (2, 3, 4)),  # 42.6 million
    "adm_256": _row(256, (3, 4, 5)),  # 54.1 million
    "adm_512": _row(512, (4, 5, 6)),  # 54.4 million
}


class AttentionPool(nn.Module):
    """The mean of all places, attending to them and to itself (CLIP's, without a class token).

    Attributes:
        features: that come out.
    """

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b f"]:
        b, h, w, c = x.shape
        tokens = x.reshape(b, h * w, c)
        tokens = jnp.concatenate([tokens.mean(1, keepdims=True), tokens], axis=1)
        normal = nn.initializers.normal(c**-0.5)
        tokens = (tokens + self.param("positional_embedding", normal, (h * w + 1, c))).astype(self.dtype)

        def project(name: str, tokens: Array) -> Array:
            out = nn.Dense(c, dtype=self.dtype, name=name)(tokens)
            return out.reshape(*out.shape[:-1], c // HEAD_WIDTH, HEAD_WIDTH)

        # Only what the mean sees is used.
        q, k, v = project("to_q", tokens[:, :1]), project("to_k", tokens), project("to_v", tokens)
        pooled = dot_product_attention(q, k, v).reshape(b, c)
        return nn.Dense(self.features, dtype=self.dtype, name="to_out")(pooled)


class Classifier(Encoder2D):
    """Logits of the class of a noisy image."""

    size: int = 64
    classes: int = 1000

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"], t: Float[Array, " b"]) -> Float[Array, "b n"]:
        """Args: x, of unit variance, as many pixels as `size`; t, timesteps in [0, 999]."""
        temb = constrain(self._embedding(t, UNCONDITIONAL), BATCH, None)
        x, _ = self._encoded(x, temb)
        return AttentionPool(self.classes, self.dtype, name="pool")(self._normalised(x)).astype(jnp.float32)


def classifier_of(config: ClassifierConfig, dtype: DTypeLike = jnp.float32) -> Classifier:
    """The module of these sizes."""
    return Classifier(config.encoder, dtype=dtype, size=config.size, classes=config.classes)
