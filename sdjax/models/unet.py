"""The conditional UNet of latent diffusion (LDM; CompVis/latent-diffusion openaimodel.py), Stable Diffusion's too.

Module names follow PyTorch diffusers' `UNet2DConditionModel`, with `_` where its checkpoints have `.` before a number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sdjax.models.attention import SpatialTransformer
from sdjax.models.conditioning import Cond
from sdjax.models.layers import Conv, Downsample, EmbeddingMLP, GroupNorm, ResBlock, Upsample, timestep_embedding
from sdjax.models.remat import recomputed
from sdjax.ops.partition import BATCH, constrain, constrain_image


class Transformer(NamedTuple):
    """A transformer of a UNet: its name, its blocks, and the width of their tokens."""

    name: str
    depth: int
    width: int


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet; each level but the last halves height and width.

    Attributes:
        depths: transformer blocks after each residual block of a level; 0 for none.
        mid_depth: transformer blocks in the middle.
        heads: attention heads of each level; the middle has the last level's.
        context_dim: width of the cross-attention tokens.
        vector_dim: width of `Cond.vector`; None where there is none.
        classes: how many values `Cond.label` has; None where there is none.
        guidance_dim: width of `Cond.guidance`; None where there is none.
        cross_only: levels, 0 the finest, whose transformers have no self-attention: both attentions attend to the
            context. The middle's transformers always have it.
        linear_projection: whether checkpoints store the projections around transformers as linear layers (SD 2
            onwards) and not as 1x1 convolutions (SD 1). The mathematics is the same.
    """

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    depths: tuple[int, ...] = (1, 1, 1, 0)
    mid_depth: int = 1
    heads: tuple[int, ...] = (8, 8, 8, 8)
    context_dim: int = 768
    vector_dim: int | None = None
    classes: int | None = None
    guidance_dim: int | None = None
    cross_only: tuple[int, ...] = ()
    linear_projection: bool = False
    in_channels: int = 4
    out_channels: int = 4
    layers_per_block: int = 2
    groups: int = 32

    @property
    def blocks(self) -> int:
        """Residual blocks and transformers, each of which has parameters of its own."""
        return (2 * self.layers_per_block + 1) * (len(self.channels) + sum(self.depths)) + self.mid_depth + 2

    @property
    def divisor(self) -> int:
        """Sides of latents that are multiples of it are halved evenly at every level."""
        return 2 ** (len(self.channels) - 1)

    @property
    def transformers(self) -> tuple[Transformer, ...]:
        """All transformers in diffusers' order of attention: the way down, the way up, the middle."""
        levels, count = range(len(self.channels)), self.layers_per_block
        sides = {"down": levels, "up": reversed(levels)}
        places = [
            (f"{side}_blocks_{i}_attentions_{j}", self.depths[level], self.channels[level])
            for side, order in sides.items()
            for i, level in enumerate(order)
            for j in range(count + (side == "up"))
        ]
        places.append(("mid_block_attentions_0", self.mid_depth, self.channels[-1]))
        return tuple(Transformer(*place) for place in places if place[1])

    @property
    def adapted(self) -> tuple[tuple[int, int], ...]:
        """Channels, and latents along each side, of what an adapter's features are added to: each level, the middle.

        A level without transformers takes them after it was halved, as diffusers adds them.
        """
        last = len(self.channels) - 1
        sides = [2 ** (i + (not self.depths[i] and i < last)) for i in range(last + 1)]
        return (*zip(self.channels, sides, strict=True), (self.channels[-1], 2**last))

    def example_inputs(self) -> tuple[Array, Array, Cond]:
        """Noisy latents, timesteps and a condition of the smallest size, for initialisation."""
        vector, guidance = (None if n is None else jnp.zeros((1, n)) for n in (self.vector_dim, self.guidance_dim))
        label = None if self.classes is None else jnp.zeros(1, jnp.int32)
        cond = Cond(jnp.zeros((1, 1, self.context_dim)), vector=vector, label=label, guidance=guidance)
        return jnp.zeros((1, self.divisor, self.divisor, self.in_channels)), jnp.zeros(1), cond


SD1 = UNetConfig()
SD2 = UNetConfig(heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True)
SDXL = replace(
    SD2,
    channels=(320, 640, 1280),
    depths=(0, 2, 10),
    mid_depth=10,
    heads=(5, 10, 20),
    context_dim=2048,
    vector_dim=2816,
)
LDM_VQ_F4 = UNetConfig(
    channels=(192, 384, 576, 960), depths=(0, 1, 1, 1), context_dim=512, in_channels=3, out_channels=3
)
VARIANTS = {
    # The LDM paper's, with cross-attention (CompVis/latent-diffusion, configs/).
    "ldm_cin_f4": replace(LDM_VQ_F4, heads=(1, 1, 1, 1)),  # 400,920,579: cin256-v2
    "ldm_cin_f8": UNetConfig(  # 394,984,196
        channels=(256, 512, 1024), depths=(1, 1, 1), heads=(8, 16, 32), context_dim=512
    ),
    "ldm_text_f4": replace(LDM_VQ_F4, heads=(6, 12, 18, 30), context_dim=640),  # 403,623,939: text2img256
    "ldm_text": replace(SD1, context_dim=1280),  # 872,300,484: txt2img-1p4B
    "ldm_layout": replace(  # 246,277,379: layout2img-openimages256
        LDM_VQ_F4, channels=(128, 256, 384, 512), depths=(0, 3, 3, 3), mid_depth=3, heads=(4, 8, 12, 16)
    ),
    "ldm_rdm": UNetConfig(  # 1,335,480,400: retrieval-augmented, 768 pixels
        channels=(448, 896, 1344, 1792), heads=(14, 28, 42, 56), in_channels=16, out_channels=16
    ),
    "sd1": SD1,  # 859,520,964 parameters
    "sd1_inpaint": replace(SD1, in_channels=9),  # 859,535,364
    "sd1_lcm": replace(SD1, guidance_dim=256),  # 859,602,884
    "sd2": SD2,  # 865,910,724
    "sd2_inpaint": replace(SD2, in_channels=9),  # 865,925,124
    "sd2_depth": replace(SD2, in_channels=5),  # 865,913,604
    "x4_upscaler": UNetConfig(  # 473,398,020
        channels=(256, 512, 512, 1024),
        depths=(0, 1, 1, 1),
        context_dim=1024,
        classes=1000,
        cross_only=(1, 2),
        linear_projection=True,
        in_channels=7,
    ),
    "sdxl": SDXL,  # 2,567,463,684
    "sdxl_inpaint": replace(SDXL, in_channels=9),  # 2,567,478,084
    "sdxl_lcm": replace(SDXL, guidance_dim=256),  # 2,567,545,604
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


class UNetEncoder(nn.Module):
    """Encoder shared by a UNet and a ControlNet: the embedding, the way down, the middle.

    Attributes:
        config: the sizes.
        remat: what residual and transformer blocks compute again in the backward pass: a key of `remat.POLICIES`.
        dtype: the type of the arithmetic; parameters stay float32.
    """

    config: UNetConfig
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    def _encoded(self, x: Array, temb: Array, cond: Cond, hint: Array | None = None) -> tuple[Array, list[Array]]:
        """The middle's output, and those of all input blocks, the first convolution's first, to which `hint` is
        added."""
        width = self.config.channels[-1]
        skips = self._down(constrain_image(x).astype(self.dtype), temb, cond, hint)
        x = self._res("mid_block_resnets_0", width, skips[-1], temb)
        x = self._attend("mid_block_attentions_0", -1, x, cond, self.config.mid_depth)
        x = self._res("mid_block_resnets_1", width, x, temb)
        return _adapted(x, cond, len(self.config.channels)), skips

    def _embedding(self, t: Array, cond: Cond) -> Array:
        """Embedding for every residual block: the timestep, joined by the guidance scale, a label and a vector."""
        c, width = self.config, 4 * self.config.channels[0]
        sinusoid = timestep_embedding(t, c.channels[0]).astype(self.dtype)
        guidance = None
        if c.guidance_dim is not None:
            assert cond.guidance is not None, "this UNet was built for an embedding of the guidance scale"
            guidance = cond.guidance.astype(self.dtype)
        temb = EmbeddingMLP(width, self.dtype, name="time_embedding")(sinusoid, guidance)
        if c.classes is not None:
            assert cond.label is not None, "this UNet was built for a label"
            normal = nn.initializers.normal(1.0)  # as torch's embeddings, which LDM trained
            temb += nn.Embed(c.classes, width, self.dtype, embedding_init=normal, name="class_embedding")(cond.label)
        if c.vector_dim is not None:
            assert cond.vector is not None, "this UNet was built for a condition vector"
            temb += EmbeddingMLP(width, self.dtype, name="add_embedding")(cond.vector.astype(self.dtype))
        return constrain(temb, BATCH, None)

    def _res(self, name: str, features: int, x: Array, temb: Array) -> Array:
        block = recomputed(ResBlock, self.remat)
        return block(features, self.config.groups, zero=True, dtype=self.dtype, name=name)(x, temb)

    def _attend(self, name: str, level: int, x: Array, cond: Cond, depth: int) -> Array:
        """Args: `level` is -1 in the middle, which has the last level's heads."""
        c = self.config
        if depth == 0:
            return x
        context = None if cond.context is None else cond.context.astype(self.dtype)
        only = level in c.cross_only
        transformer = SpatialTransformer(c.heads[level], depth, c.groups, only, self.remat, self.dtype, name=name)
        return transformer(x, context, cond.mask, None if cond.images is None else cond.images[name])

    def _down(self, x: Array, temb: Array, cond: Cond, hint: Array | None) -> list[Array]:
        c = self.config
        x = Conv(c.channels[0], dtype=self.dtype, name="conv_in")(x)
        x = x if hint is None else x + hint.astype(self.dtype)
        skips = [x]
        for i, features in enumerate(c.channels):
            for j in range(c.layers_per_block):
                x = self._res(f"down_blocks_{i}_resnets_{j}", features, x, temb)
                x = self._attend(f"down_blocks_{i}_attentions_{j}", i, x, cond, c.depths[i])
                skips.append(x)
            last = i == len(c.channels) - 1
            if c.depths[i] or last:
                x = skips[-1] = _adapted(x, cond, i)
            if not last:
                x = Downsample(dtype=self.dtype, name=f"down_blocks_{i}_downsamplers_0")(x)
                # An adapter's features of a level without transformers are as large as the next level (diffusers).
                x = x if c.depths[i] else _adapted(x, cond, i)
                skips.append(x)
        return skips


class UNet(UNetEncoder):
    """Predicts noise, velocity or the clean latents from noisy ones."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], t: Float[Array, " b"], cond: Cond = UNCONDITIONAL
    ) -> Float[Array, "b h w o"]:
        """The raw output of the network, in float32.

        Args:
            x: noisy latents of unit variance (x / sqrt(sigma^2 + 1) of a k-diffusion state).
            t: timesteps in [0, 999]; fractional ones are allowed.
            cond: `context` always; `vector`, `label` and `guidance` where the config has them; `concat` is joined to x
                on channels; `control`, `images` and `features` act where they are given. A label of `classes` or more
                makes NaN.
        """
        c = self.config
        x = x if cond.concat is None else jnp.concatenate([x, cond.concat], axis=-1)
        temb = self._embedding(t, cond)
        x, skips = self._encoded(x, temb, cond)
        if cond.control is not None:
            *residuals, mid = cond.control
            skips = [skip + r.astype(self.dtype) for skip, r in zip(skips, residuals, strict=True)]
            x = x + mid.astype(self.dtype)
        x = self._up(x, skips, temb, cond)
        x = nn.silu(GroupNorm(c.groups, dtype=self.dtype, name="conv_norm_out")(x))
        return Conv(c.out_channels, zero=True, dtype=self.dtype, name="conv_out")(x).astype(jnp.float32)

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


def _adapted(x: Array, cond: Cond, place: int) -> Array:
    """x with the adapter's features of a place, a level or after them the middle, where it has some."""
    features = cond.features or ()
    return x + features[place].astype(x.dtype) if place < len(features) else x
