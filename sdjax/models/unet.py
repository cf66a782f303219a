"""The conditional UNet of latent diffusion (LDM; CompVis/latent-diffusion openaimodel.py), Stable Diffusion's too.

Module names follow PyTorch diffusers' `UNet2DConditionModel`, with `_` where its checkpoints have `.` before a number.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sdjax.models.attention import SpatialTransformer
from sdjax.models.conditioning import Cond
from sdjax.models.layers import Conv, Downsample, EmbeddingMLP, GroupNorm, ResBlock, Upsample, timestep_embedding


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet; each level but the last halves height and width.

    Attributes:
        depths: transformer blocks after each residual block of a level; 0 for none.
        mid_depth: transformer blocks in the middle.
        heads: attention heads of each level; the middle has the last level's.
        context_dim: width of the cross-attention tokens.
        vector_dim: width of `Cond.vector`; None where there is none.
        linear_projection: whether checkpoints store the projections around transformers as linear layers (SD 2
            onwards) and not as 1x1 convolutions (SD 1). The mathematics is the same.
    """

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    depths: tuple[int, ...] = (1, 1, 1, 0)
    mid_depth: int = 1
    heads: tuple[int, ...] = (8, 8, 8, 8)
    context_dim: int = 768
    vector_dim: int | None = None
    linear_projection: bool = False
    in_channels: int = 4
    out_channels: int = 4
    layers_per_block: int = 2
    groups: int = 32


VARIANTS = {
    "sd1": UNetConfig(),  # 859,520,964 parameters
    "sd1_inpaint": UNetConfig(in_channels=9),  # 859,535,364
    "sd2": UNetConfig(heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True),  # 865,910,724
    "sd2_depth": UNetConfig(in_channels=5, heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True),
    "sdxl": UNetConfig(  # 2,567,463,684
        channels=(320, 640, 1280),
        depths=(0, 2, 10),
        mid_depth=10,
        heads=(5, 10, 20),
        context_dim=2048,
        vector_dim=2816,
        linear_projection=True,
    ),
    "sdxl_refiner": UNetConfig(  # 2,259,526,660
        channels=(384, 768, 1536, 1536),
        depths=(0, 4, 4, 0),
        mid_depth=4,
        heads=(6, 12, 24, 24),
        context_dim=1280,
        vector_dim=2560,
        linear_projection=True,
    ),
}


UNCONDITIONAL = Cond()


class UNet(nn.Module):
    """Predicts noise, velocity or the clean latents from noisy ones.

    Attributes:
        config: the sizes.
        remat: recompute residual and transformer blocks in the backward pass instead of storing them.
        dtype: the type of the arithmetic; parameters stay float32.
    """

    config: UNetConfig
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], t: Float[Array, " b"], cond: Cond = UNCONDITIONAL
    ) -> Float[Array, "b h w o"]:
        """The raw output of the network, in float32.

        Args:
            x: noisy latents of unit variance (x / sqrt(sigma^2 + 1) of a k-diffusion state).
            t: timesteps in [0, 999]; fractional ones are allowed.
            cond: `context` always, `vector` where the config has one; `concat` is joined to x on channels.
        """
        c = self.config
        x = x if cond.concat is None else jnp.concatenate([x, cond.concat], axis=-1)
        temb = self._time_and_vector(t, cond)
        skips = self._down(x.astype(self.dtype), temb, cond)
        x = self._middle(skips[-1], temb, cond)
        if cond.control is not None:
            *residuals, mid = cond.control
            skips = [skip + residual for skip, residual in zip(skips, residuals, strict=True)]
            x = x + mid
        x = self._up(x, skips, temb, cond)
        x = nn.silu(GroupNorm(c.groups, dtype=self.dtype, name="conv_norm_out")(x))
        return Conv(c.out_channels, zero=True, dtype=self.dtype, name="conv_out")(x).astype(jnp.float32)

    def _time_and_vector(self, t: Array, cond: Cond) -> Array:
        width = self.config.channels[0]
        sinusoid = timestep_embedding(t, width).astype(self.dtype)
        temb = EmbeddingMLP(4 * width, self.dtype, name="time_embedding")(sinusoid)
        if self.config.vector_dim is None:
            return temb
        assert cond.vector is not None, "this UNet was built for a condition vector"
        return temb + EmbeddingMLP(4 * width, self.dtype, name="add_embedding")(cond.vector.astype(self.dtype))

    def _res(self, name: str, features: int, x: Array, temb: Array) -> Array:
        block = nn.remat(ResBlock) if self.remat else ResBlock
        return block(features, self.config.groups, zero=True, dtype=self.dtype, name=name)(x, temb)

    def _attend(self, name: str, level: int, x: Array, cond: Cond, depth: int) -> Array:
        if depth == 0:
            return x
        context = None if cond.context is None else cond.context.astype(self.dtype)
        transformer = SpatialTransformer(
            self.config.heads[level], depth, self.config.groups, remat=self.remat, dtype=self.dtype, name=name
        )
        return transformer(x, context, cond.mask)

    def _down(self, x: Array, temb: Array, cond: Cond) -> list[Array]:
        """The outputs of all input blocks, the first convolution's first."""
        c = self.config
        x = Conv(c.channels[0], dtype=self.dtype, name="conv_in")(x)
        skips = [x]
        for i, features in enumerate(c.channels):
            for j in range(c.layers_per_block):
                x = self._res(f"down_blocks_{i}_resnets_{j}", features, x, temb)
                x = self._attend(f"down_blocks_{i}_attentions_{j}", i, x, cond, c.depths[i])
                skips.append(x)
            if i < len(c.channels) - 1:
                x = Downsample(dtype=self.dtype, name=f"down_blocks_{i}_downsamplers_0")(x)
                skips.append(x)
        return skips

    def _middle(self, x: Array, temb: Array, cond: Cond) -> Array:
        features = self.config.channels[-1]
        x = self._res("mid_block_resnets_0", features, x, temb)
        x = self._attend("mid_block_attentions_0", -1, x, cond, self.config.mid_depth)
        return self._res("mid_block_resnets_1", features, x, temb)

    def _up(self, x: Array, skips: list[Array], temb: Array, cond: Cond) -> Array:
        c = self.config
        for i, features in enumerate(reversed(c.channels)):
            level = len(c.channels) - 1 - i
            for j in range(c.layers_per_block + 1):
                x = self._res(f"up_blocks_{i}_resnets_{j}", features, jnp.concatenate([x, skips.pop()], -1), temb)
                x = self._attend(f"up_blocks_{i}_attentions_{j}", level, x, cond, c.depths[level])
            if level:
                x = Upsample(self.dtype, name=f"up_blocks_{i}_upsamplers_0")(x, skips[-1].shape[1:3])
        return x
