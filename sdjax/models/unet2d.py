"""The UNet of DDPM, ADM and LDM's models without cross-attention (openai/guided-diffusion unet.py; LDM openaimodel.py).

Module names follow PyTorch diffusers' `UNet2DModel`, with `_` where its checkpoints have `.` before a number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sdjax.models.attention import SelfAttention
from sdjax.models.conditioning import Cond
from sdjax.models.layers import (
    SYMMETRIC,
    Conv,
    Downsample,
    EmbeddingMLP,
    GroupNorm,
    ResBlock,
    Upsample,
    timestep_embedding,
)
from sdjax.models.remat import recomputed
from sdjax.ops.partition import BATCH, constrain, constrain_image


@dataclass(frozen=True)
class UNet2DConfig:
    """Sizes of a UNet; each level but the last halves height and width.

    Attributes:
        attention_levels: levels, 0 the finest, whose every residual block is followed by self-attention.
        heads: attention heads of each level; the middle, which always has attention, has the last level's.
        width: of the sinusoids of the timestep, a quarter of its embedding; None means the first level's channels.
        classes: how many values `Cond.label` has; None where there is none.
        scale_shift: whether the embedding scales and shifts the second norm's output (ADM) or is added before it.
        resblock_updown: whether residual blocks change the resolution (ADM), not convolutions.
        freq_shift: 1 where the sinusoids' last frequency is 1 / 10000 (DDPM), 0 where the one after it would be.
        cosines_first: the order of the sinusoids; DDPM has sines first.
        downsample_padding: of convolutions that halve: 1 on all sides, or 0, which pads right and bottom only (DDPM).
        eps: of the norms.
    """

    channels: tuple[int, ...] = (224, 448, 672, 896)
    attention_levels: tuple[int, ...] = (1, 2, 3)
    heads: tuple[int, ...] = (7, 14, 21, 28)
    width: int | None = None
    in_channels: int = 3
    out_channels: int = 3
    layers_per_block: int = 2
    groups: int = 32
    classes: int | None = None
    scale_shift: bool = False
    resblock_updown: bool = False
    freq_shift: int = 0
    cosines_first: bool = True
    downsample_padding: int = 1
    eps: float = 1e-5

    @property
    def context_dim(self) -> None:
        """There is no cross-attention."""

    @property
    def vector_dim(self) -> None:
        """There is no condition vector."""

    @property
    def guidance_dim(self) -> None:
        """There is no embedding of the guidance scale."""

    @property
    def blocks(self) -> int:
        """Residual blocks, each of which has parameters of its own."""
        return (2 * self.layers_per_block + 1) * len(self.channels) + 2

    @property
    def divisor(self) -> int:
        """Sides of latents that are multiples of it are halved evenly at every level."""
        return 2 ** (len(self.channels) - 1)

    def example_inputs(self) -> tuple[Array, Array, Cond]:
        """Noisy latents, timesteps and a condition of the smallest size, for initialisation."""
        label = None if self.classes is None else jnp.zeros(1, jnp.int32)
        return jnp.zeros((1, self.divisor, self.divisor, self.in_channels)), jnp.zeros(1), Cond(label=label)


def _adm(
    width: int, multipliers: tuple[float, ...], attention: tuple[int, ...], layers: int, *, wide: int = 0, of: int = 0
) -> UNet2DConfig:
    """A row of ADM's table: it learns variances (6 channels), knows 1000 classes.

    Args:
        wide: channels of a head; or
        of: heads of every level.
    """
    channels = tuple(int(width * m) for m in multipliers)
    return UNet2DConfig(
        channels=channels,
        attention_levels=attention,
        heads=tuple(of or max(c // wide, 1) for c in channels),
        width=width,
        out_channels=6,
        layers_per_block=layers,
        classes=1000,
        scale_shift=True,
        resblock_updown=True,
    )


# Of ADM's width, by the images' size.
MULTIPLIERS = {
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}
ADM_256 = _adm(256, MULTIPLIERS[256], (3, 4, 5), 2, wide=64)
VARIANTS = {
    "ldm_celebahq": UNet2DConfig(),  # 274,056,163 parameters; FFHQ's and LSUN bedrooms', too
    "ldm_churches": UNet2DConfig(  # 294,966,916
        channels=(192, 384, 384, 768, 768),
        attention_levels=(0, 1, 2, 3),
        heads=(8,) * 5,
        in_channels=4,
        out_channels=4,
        scale_shift=True,
        resblock_updown=True,
    ),
    "ldm_bsr_sr": UNet2DConfig(  # 113,622,563
        channels=(160, 320, 320, 640), attention_levels=(3,), heads=(5, 10, 10, 20), in_channels=6
    ),
    "ldm_inpainting": UNet2DConfig(  # 387,245,827
        channels=(256, 512, 768, 1024), heads=(8,) * 4, in_channels=7, resblock_updown=True
    ),
    "ldm_semantic": UNet2DConfig(  # 215,229,315
        channels=(128, 512, 1024), attention_levels=(), heads=(8,) * 3, in_channels=6
    ),
    "adm_64": _adm(192, MULTIPLIERS[64], (1, 2, 3), 3, wide=64),  # 295,904,454
    "adm_128": _adm(256, MULTIPLIERS[128], (2, 3, 4), 2, of=4),  # 421,529,606
    "adm_256": ADM_256,  # 553,838,086
    "adm_256_uncond": replace(ADM_256, classes=None),  # 552,814,086
    "adm_512": _adm(256, MULTIPLIERS[512], (4, 5, 6), 2, wide=64),  # 558,997,638
    "adm_64_256": replace(_adm(192, MULTIPLIERS[256], (3, 4, 5), 2, of=4), in_channels=6),  # 311,795,910
    "adm_128_512": replace(_adm(192, MULTIPLIERS[256], (4, 5), 2, wide=64), in_channels=6),  # 308,835,270
}


class Encoder2D(nn.Module):
    """Encoder shared by a UNet and a classifier of noisy images: the timestep's embedding, the way down, the middle.

    Attributes:
        config: the sizes.
        remat: what blocks compute again in the backward pass: a key of `remat.POLICIES`.
        dtype: the type of the arithmetic; parameters stay float32.
    """

    config: UNet2DConfig
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    def _encoded(self, x: Array, temb: Array) -> tuple[Array, list[Array]]:
        """The middle's output, and what the way up is given besides."""
        c = self.config
        x = Conv(c.channels[0], dtype=self.dtype, name="conv_in")(constrain_image(x).astype(self.dtype))
        x, skips = self._down(x, temb)
        x = self._res("mid_block_resnets_0", c.channels[-1])(x, temb)
        x = self._attend("mid_block_attentions_0", -1)(x)
        return self._res("mid_block_resnets_1", c.channels[-1])(x, temb), skips

    def _normalised(self, x: Array) -> Array:
        return nn.silu(GroupNorm(self.config.groups, self.config.eps, self.dtype, name="conv_norm_out")(x))

    def _embedding(self, t: Array, cond: Cond) -> Array:
        width = self.config.width or self.config.channels[0]
        sinusoids = timestep_embedding(t, width, shift=self.config.freq_shift)
        if not self.config.cosines_first:
            sinusoids = jnp.roll(sinusoids, width // 2, axis=-1)
        temb = EmbeddingMLP(4 * width, self.dtype, name="time_embedding")(sinusoids.astype(self.dtype))
        if self.config.classes is None:
            return temb
        assert cond.label is not None, "this UNet was built for a label"
        normal = nn.initializers.normal(1.0)
        embed = nn.Embed(self.config.classes, 4 * width, self.dtype, embedding_init=normal, name="class_embedding")
        return temb + embed(cond.label)

    def _res(
        self, name: str, features: int, resample: str = "", size: tuple[int, ...] | None = None
    ) -> Callable[[Array, Array], Array]:
        c = self.config
        block = recomputed(ResBlock, self.remat)
        return block(features, c.groups, c.eps, True, c.scale_shift, resample, size, dtype=self.dtype, name=name)

    def _attend(self, name: str, level: int) -> nn.Module:
        """Args: `level` is -1 in the middle, which has the last level's heads."""
        block = recomputed(SelfAttention, self.remat)
        return block(self.config.heads[level], self.config.groups, self.config.eps, self.dtype, name=name)

    def _down(self, x: Array, temb: Array) -> tuple[Array, list[Array]]:
        c, skips = self.config, [x]
        for i, features in enumerate(c.channels):
            for j in range(c.layers_per_block):
                x = self._res(f"down_blocks_{i}_resnets_{j}", features)(x, temb)
                if i in c.attention_levels:
                    x = self._attend(f"down_blocks_{i}_attentions_{j}", i)(x)
                skips.append(x)
            if i < len(c.channels) - 1:
                name = f"down_blocks_{i}_downsamplers_0"
                if c.resblock_updown:
                    x = self._res(name, features, "down")(x, temb)
                else:
                    padding = SYMMETRIC if c.downsample_padding else ((0, 1), (0, 1))
                    x = Downsample(padding, self.dtype, name=name)(x)
                skips.append(x)
        return x, skips


class UNet2D(Encoder2D):
    """Predicts noise, velocity or clean images, and log-variances where it has the channels, from noisy ones."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        cond: Cond = Cond(),  # noqa: B008
    ) -> Float[Array, "b h w o"]:
        """The raw output of the network, in float32.

        Args:
            x: noisy latents or images of unit variance.
            t: timesteps in [0, 999]; fractional ones are allowed.
            cond: `label` where the config has classes; `concat` is joined to x on channels.
        """
        x = x if cond.concat is None else jnp.concatenate([x, cond.concat], axis=-1)
        temb = constrain(self._embedding(t, cond), BATCH, None)
        x, skips = self._encoded(x, temb)
        x = self._normalised(self._up(x, skips, temb))
        return Conv(self.config.out_channels, zero=True, dtype=self.dtype, name="conv_out")(x).astype(jnp.float32)

    def _up(self, x: Array, skips: list[Array], temb: Array) -> Array:
        c = self.config
        for i, features in enumerate(reversed(c.channels)):
            level = len(c.channels) - 1 - i
            for j in range(c.layers_per_block + 1):
                x = jnp.concatenate([x, skips.pop()], -1)
                x = self._res(f"up_blocks_{i}_resnets_{j}", features)(x, temb)
                if level in c.attention_levels:
                    x = self._attend(f"up_blocks_{i}_attentions_{j}", level)(x)
            if level:
                name, size = f"up_blocks_{i}_upsamplers_0", skips[-1].shape[1:3]
                if c.resblock_updown:
                    x = self._res(name, features, "up", size)(x, temb)
                else:
                    x = Upsample(self.dtype, name=name)(x, size)
        return x
