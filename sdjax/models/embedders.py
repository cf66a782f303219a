"""Networks of LDM's smaller conditions: an embedding of classes, and a rescaler of label maps.

CompVis/latent-diffusion, ldm/modules/encoders/modules.py: ClassEmbedder, SpatialRescaler.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class ClassEmbedderConfig:
    """Sizes.

    Attributes:
        classes: with the one that stands for none, where there is one.
        width: of the token.
    """

    classes: int = 1000
    width: int = 512

    @property
    def blocks(self) -> int:
        """There are no blocks of layers."""
        return 0


class ClassEmbedder(nn.Module):
    """A class to one token for cross-attention."""

    config: ClassEmbedderConfig

    @nn.compact
    def __call__(self, label: Int[Array, " b"]) -> Float[Array, "b 1 d"]:
        """Args: label, below `config.classes`."""
        normal = nn.initializers.normal(1.0)  # as torch's embeddings
        return nn.Embed(self.config.classes, self.config.width, embedding_init=normal, name="embedding")(label)[:, None]


@dataclass(frozen=True)
class RescalerConfig:
    """Sizes.

    Attributes:
        classes: that pixels may have.
        stages: each halves height and width.
        features: that come out.
    """

    classes: int = 182
    stages: int = 2
    features: int = 3

    @property
    def blocks(self) -> int:
        """There are no blocks of layers."""
        return 0


class Rescaler(nn.Module):
    """A label map to a few channels at the latents' size."""

    config: RescalerConfig

    @nn.compact
    def __call__(self, labels: Int[Array, "b h w"]) -> Float[Array, "b h2 w2 f"]:
        """Args: labels, below `config.classes`; sides are multiples of 2^stages."""
        x = jax.nn.one_hot(labels, self.config.classes)
        # Bilinear interpolation by a half is the mean of four pixels, so that all stages are one mean.
        block = 2**self.config.stages
        x = nn.avg_pool(x, (block, block), (block, block))
        return nn.Dense(self.config.features, use_bias=False, dtype=jnp.float32, name="channel_mapper")(x)
