"""The Efficient U-Net of Imagen's super-resolution models (Saharia et al. 2022, section 2.4, appendix B.1 and figures
A.28 to A.30): most parameters stand at low resolutions, and resolutions change before the convolutions of the way down
and after those of the way up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sdjax.models.added_kv_unet import TextPooling
from sdjax.models.attention import Attention
from sdjax.models.conditioning import Cond
from sdjax.models.layers import Conv, EmbeddingMLP, GroupNorm, ResBlock, timestep_embedding
from sdjax.models.remat import recomputed
from sdjax.ops.doubling import convolve_doubled
from sdjax.ops.partition import BATCH, constrain, constrain_image

SKIP_SCALE = 2**-0.5


@dataclass(frozen=True)
class EfficientUNetConfig:
    """Sizes of an Efficient U-Net; every level halves height and width.

    Attributes:
        channels: of each level's blocks, the finest first.
        layers: residual blocks of each level, on the way down and on the way up.
        first: channels before the first level, of the whole resolution.
        self_attention, text_attention: levels, 0 the finest, whose residual blocks are followed by attention of all
            pixels to all, and to the text.
        heads, head_width: of attention.
        text_dim: width of `Cond.context`.
        cross_dim: width of the text where attention reads it.
        pool_heads: heads of the attention that pools the text for the embedding.
        classes: how many values `Cond.label`, a noise level, has; None where there is none.
    """

    channels: tuple[int, ...] = (128, 256, 512, 1024)
    layers: tuple[int, ...] = (2, 4, 8, 8)
    first: int = 128
    self_attention: tuple[int, ...] = (3,)
    text_attention: tuple[int, ...] = (3,)
    heads: int = 8
    head_width: int = 64
    text_dim: int = 4096
    cross_dim: int = 512
    pool_heads: int = 64
    classes: int | None = 1000
    in_channels: int = 6
    out_channels: int = 3
    groups: int = 32

    @property
    def context_dim(self) -> int:
        """Features of the tokens that the network is given."""
        return self.text_dim

    @property
    def vector_dim(self) -> None:
        """There is no condition vector."""

    @property
    def guidance_dim(self) -> None:
        """There is no embedding of the guidance scale."""

    @property
    def blocks(self) -> int:
        """Residual blocks, each of which has parameters of its own."""
        return 2 * sum(self.layers)

    @property
    def divisor(self) -> int:
        """Sides of images that are multiples of it are halved evenly at every level."""
        return 2 ** len(self.channels)

    def example_inputs(self) -> tuple[Array, Array, Cond]:
        """Noisy images, timesteps and a condition of the smallest size, for initialisation."""
        label = None if self.classes is None else jnp.zeros(1, jnp.int32)
        text = jnp.zeros((1, 1, self.text_dim))
        images = jnp.zeros((1, self.divisor, self.divisor, self.in_channels))
        return images, jnp.zeros(1), Cond(text, label=label)


SR_256 = EfficientUNetConfig()
# The paper's totals, 600M and 400M, are not those of any one reading of its figures; these are this reading's.
VARIANTS = {
    "imagen_sr256": SR_256,
    "imagen_sr1024": replace(SR_256, self_attention=()),
}


class EfficientUNet(nn.Module):
    """Predicts noise from noisy images, a smaller image and a text.

    Attributes:
        config: the sizes.
        remat: what blocks compute again in the backward pass: a key of `remat.POLICIES`.
        dtype: the type of the arithmetic; parameters stay float32.
    """

    config: EfficientUNetConfig
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        cond: Cond = Cond(),  # noqa: B008
    ) -> Float[Array, "b h w o"]:
        """The raw output of the network, in float32.

        Args:
            x: noisy images of unit variance.
            t: timesteps in [0, 999]; fractional ones are allowed.
            cond: `context`, and its `mask` where not all tokens may be attended to; `label` where the config has
                classes; `concat` is joined to x on channels.
        """
        c = self.config
        x = x if cond.concat is None else jnp.concatenate([x, cond.concat], axis=-1)
        temb = constrain(self._embedding(t, cond), BATCH, None)
        text = self._text(cond)
        x = Conv(c.first, dtype=self.dtype, name="conv_in")(constrain_image(x).astype(self.dtype))
        skips: list[Array] = []
        for level in range(len(c.channels)):
            x = self._down(level, x, temb, text, cond.mask)
            skips.append(x)
        skips.pop()  # the deepest level goes on with it
        for level in reversed(range(len(c.channels))):
            if level < len(c.channels) - 1:
                x = (x + skips.pop()) * SKIP_SCALE
            x = self._up(level, x, temb, text, cond.mask)
        return nn.Dense(c.out_channels, dtype=self.dtype, name="conv_out")(x).astype(jnp.float32)

    def _embedding(self, t: Array, cond: Cond) -> Array:
        """The sum of the embeddings of timestep, noise level and pooled text."""
        c, width = self.config, 4 * self.config.first

        def embed(name: str, values: Array) -> Array:
            return EmbeddingMLP(width, self.dtype, name=name)(timestep_embedding(values, c.first).astype(self.dtype))

        temb = embed("time_embedding", t)
        if c.classes is not None:
            assert cond.label is not None, "this UNet was built for a noise level"
            temb += embed("class_embedding", cond.label)
        assert cond.context is not None, "this UNet was built for a text"
        pool = TextPooling(c.pool_heads, width, self.dtype, name="add_embedding")
        return temb + pool(cond.context.astype(self.dtype))

    def _text(self, cond: Cond) -> Array | None:
        """The tokens as attention reads them."""
        if not self.config.text_attention or cond.context is None:
            return None
        tokens = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="text_norm")(cond.context.astype(self.dtype))
        return nn.Dense(self.config.cross_dim, dtype=self.dtype, name="text_proj")(tokens)

    def _down(self, level: int, x: Array, temb: Array, text: Array | None, mask: Bool[Array, "b l"] | None) -> Array:
        """Halved first, so that every block computes at the smaller size."""
        features, name = self.config.channels[level], f"down_blocks_{level}"
        x = Conv(features, stride=2, dtype=self.dtype, name=f"{name}_conv")(x)
        return self._blocks(name, level, x, temb, text, mask)

    def _up(self, level: int, x: Array, temb: Array, text: Array | None, mask: Bool[Array, "b l"] | None) -> Array:
        """Doubled last, and brought to the width of the next level."""
        c, name = self.config, f"up_blocks_{level}"
        x = self._blocks(name, level, x, temb, text, mask)
        features = c.channels[level - 1] if level else c.first
        return Conv(features, dtype=self.dtype, convolve=convolve_doubled, name=f"{name}_conv")(x)

    def _blocks(
        self, name: str, level: int, x: Array, temb: Array, text: Array | None, mask: Bool[Array, "b l"] | None
    ) -> Array:
        """The embedding added, then residual blocks and attention."""
        c, features = self.config, x.shape[-1]
        x += nn.Dense(features, dtype=self.dtype, name=f"{name}_emb_proj")(nn.silu(temb))[:, None, None]
        for i in range(c.layers[level]):
            block = recomputed(ResBlock, self.remat)
            x = block(features, c.groups, zero=True, project=True, dtype=self.dtype, name=f"{name}_resnets_{i}")(x)
        attend = recomputed(PixelAttention, self.remat)
        if level in c.self_attention:
            x = attend(c.heads, c.head_width, c.groups, self.dtype, name=f"{name}_self_attention")(x, None, None)
        if level in c.text_attention:
            x = attend(c.heads, c.head_width, c.groups, self.dtype, name=f"{name}_text_attention")(x, text, mask)
        return x


class PixelAttention(nn.Module):
    """A norm, attention of all pixels to all or to a text, and what was there."""

    heads: int
    head_width: int
    groups: int = 32
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], text: Float[Array, "b l d"] | None, mask: Bool[Array, "b l"] | None
    ) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        tokens = GroupNorm(self.groups, dtype=self.dtype, name="group_norm")(x).reshape(b, h * w, c)
        attention = Attention(self.heads, self.head_width, dtype=self.dtype, name="attention")
        return constrain_image(x + attention(tokens, text, mask).reshape(x.shape))
