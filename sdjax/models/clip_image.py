"""CLIP's image tower, a vision transformer (Radford et al. 2021): for scores of images beside captions, and prompts
that are images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sdjax.models.clip import CLIPLayer


@dataclass(frozen=True)
class CLIPImageConfig:
    """Sizes of an image tower; `activation` as in `CLIPTextConfig`."""

    size: int = 224
    patch: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    feed_forward: int = 4096
    activation: str = "quick_gelu"
    projection_dim: int = 768

    @property
    def blocks(self) -> int:
        """Layers, each of which has parameters of its own."""
        return self.layers


VARIANTS = {
    "clip_l": CLIPImageConfig(),  # 303,966,208 parameters with its projection
    "openclip_h": CLIPImageConfig(  # 632,076,800
        width=1280, layers=32, feed_forward=5120, activation="gelu", projection_dim=1024
    ),
    "openclip_bigg": CLIPImageConfig(  # 1,844,907,264
        width=1664, layers=48, feed_forward=8192, activation="gelu", projection_dim=1280
    ),
}


class CLIPImageOutput(NamedTuple):
    """Outputs of an image tower.

    Attributes:
        penultimate: the output of the last layer but one, not normalised: the image's token, then its patches.
        pooled: the image's token after the last layer and its LayerNorm, projected.
    """

    penultimate: Float[Array, "b n w"]
    pooled: Float[Array, "b p"]


class CLIPImage(nn.Module):
    """Images to their states, and to embeddings beside those of captions."""

    config: CLIPImageConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b s s 3"]) -> CLIPImageOutput:
        """Args: x, images of `config.size`, normalised as by `sdjax.data.image_inputs.clip_pixels`."""
        c, normal = self.config, nn.initializers.normal(0.02)
        patch = (c.patch, c.patch)
        x = nn.Conv(c.width, patch, patch, "VALID", use_bias=False, dtype=self.dtype, name="patch_embedding")(x)
        x = x.reshape(len(x), -1, c.width)
        token = self.param("class_embedding", normal, (c.width,)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, c.width)), x], axis=1)
        x = x + nn.Embed(x.shape[1], c.width, embedding_init=normal, name="position_embedding")(jnp.arange(x.shape[1]))
        x = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="pre_layrnorm")(x.astype(self.dtype))
        penultimate = x
        for i in range(c.layers):
            penultimate, x = x, CLIPLayer(c, causal=False, dtype=self.dtype, name=f"layers_{i}")(x)
        pooled = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="post_layernorm")(x[:, 0])
        pooled = nn.Dense(c.projection_dim, use_bias=False, dtype=self.dtype, name="visual_projection")(pooled)
        return CLIPImageOutput(penultimate, pooled)
