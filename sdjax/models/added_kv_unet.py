"""The UNet of DeepFloyd IF and Karlo's decoder (deep-floyd/IF unet.py; kakaobrain/karlo): ADM's, conditioned on text.

Where ADM's pixels attend to each other, here the text's keys and values are added to theirs. Module names follow
PyTorch diffusers' `UNet2DConditionModel`, with `_` where its checkpoints have `.` before a number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sdjax.models.conditioning import Cond
from sdjax.models.layers import Activation, Conv, EmbeddingMLP, GroupNorm, ResBlock, gelu, timestep_embedding
from sdjax.models.remat import recomputed
from sdjax.ops.attention import dot_product_attention
from sdjax.ops.partition import BATCH, constrain, constrain_image

ACTIVATIONS: dict[str, Activation] = {"gelu": gelu, "silu": nn.silu}
TEXT_GROUPS = 32  # of the text's norm in attention, whatever the groups of other norms


@dataclass(frozen=True)
class AddedKVUNetConfig:
    """Sizes of a UNet; each level but the last halves height and width.

    Attributes:
        layers: residual blocks of each level on the way down; there is one more on the way up.
        attention_levels: levels, 0 the finest, whose every residual block is followed by attention, as is the middle's.
        head_width: channels of an attention head.
        cross_dim: width of the text where attention projects it.
        text_dim: width of `Cond.context`, which a linear layer brings to `cross_dim`; None where it has that already.
        pool_heads: heads of the attention that pools the text for the embedding; None for no pooling.
        embedding_dim: of the timestep's embedding; None for four times the first level's channels.
        classes: how many values `Cond.label`, a noise level, has; None where there is none.
        takes_vector: whether `Cond.vector` is added to the embedding as it is (Karlo).
        text_norm: whether attention normalises the text, over groups of channels and all tokens.
        cross_only: whether pixels attend to the text alone.
        activation: a key of ACTIVATIONS.
        activated: whether the activation acts on the embedding once, not in every residual block (IF's stage II).
        output_divisor: of the sum that each residual block makes.
    """

    channels: tuple[int, ...] = (192, 384, 576, 768)
    layers: tuple[int, ...] = (3, 3, 3, 3)
    attention_levels: tuple[int, ...] = (1, 2, 3)
    head_width: int = 64
    cross_dim: int = 768
    text_dim: int | None = 4096
    pool_heads: int | None = 64
    embedding_dim: int | None = None
    classes: int | None = None
    takes_vector: bool = False
    text_norm: bool = True
    cross_only: bool = False
    activation: str = "gelu"
    activated: bool = False
    output_divisor: float = 1.0
    in_channels: int = 3
    out_channels: int = 6
    groups: int = 32

    @property
    def context_dim(self) -> int:
        """Features of the tokens that the network is given."""
        return self.text_dim or self.cross_dim

    @property
    def embedding_width(self) -> int:
        """Features of the timestep's embedding."""
        return self.embedding_dim or 4 * self.channels[0]

    @property
    def vector_dim(self) -> int | None:
        """Features of the condition vector; None where there is none."""
        return self.embedding_width if self.takes_vector else None

    @property
    def guidance_dim(self) -> None:
        """There is no embedding of the guidance scale."""

    @property
    def blocks(self) -> int:
        """Residual blocks, each of which has parameters of its own."""
        return 2 * sum(self.layers) + 3 * len(self.channels)

    @property
    def divisor(self) -> int:
        """Sides of images that are multiples of it are halved evenly at every level."""
        return 2 ** (len(self.channels) - 1)

    def example_inputs(self) -> tuple[Array, Array, Cond]:
        """Noisy images, timesteps and a condition of the smallest size, for initialisation."""
        label = None if self.classes is None else jnp.zeros(1, jnp.int32)
        vector = None if self.vector_dim is None else jnp.zeros((1, self.vector_dim))
        cond = Cond(jnp.zeros((1, 1, self.context_dim)), vector=vector, label=label)
        return jnp.zeros((1, self.divisor, self.divisor, self.in_channels)), jnp.zeros(1), cond


IF_I = AddedKVUNetConfig()
IF_II = AddedKVUNetConfig(
    channels=(128, 256, 512, 768, 768),
    layers=(2, 2, 3, 4, 4),
    attention_levels=(3, 4),
    embedding_dim=768,
    classes=1000,
    activated=True,
    output_divisor=1 / 0.7071,
    in_channels=6,
)
VARIANTS = {
    "if_i_m": IF_I,  # 371,605,830 parameters
    "if_i_l": replace(IF_I, channels=(320, 640, 960, 1280), cross_dim=1280),  # 935,365,830
    "if_i_xl": replace(IF_I, channels=(704, 1408, 2112, 2816), cross_dim=2816),  # 4,304,695,110
    "if_ii_m": IF_II,  # 535,441,926
    "if_ii_l": replace(  # 1,243,277,190
        IF_II, channels=(160, 320, 640, 960, 1280), layers=(2, 2, 3, 5, 5), cross_dim=1280, embedding_dim=1280
    ),
    # Imagen's base, a reading of the paper that reports 2B; its text is normalised in groups here, as IF's.
    "imagen_base": replace(  # 2,305,382,403
        IF_I, channels=(512, 1024, 1536, 2048), cross_dim=2048, activation="silu", out_channels=3
    ),
    "karlo": replace(  # 885,439,686: the decoder, of 64 pixels
        IF_I,
        channels=(320, 640, 960, 1280),
        cross_dim=1536,
        text_dim=None,
        pool_heads=None,
        takes_vector=True,
        text_norm=False,
        activation="silu",
    ),
}


class TextPooling(nn.Module):
    """A vector of a text, whose mean attends to all tokens and to itself (deep-floyd/IF nn.py, AttentionPooling).

    Attributes:
        features: that come out.
    """

    heads: int
    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, text: Float[Array, "b l d"]) -> Float[Array, "b f"]:
        text = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm1")(text)
        b, _, width = text.shape
        place = self.param("positional_embedding", nn.initializers.normal(width**-0.5), (1, width))
        mean = text.mean(1, keepdims=True) + place.astype(self.dtype)
        tokens = jnp.concatenate([mean, text], axis=1)

        def project(name: str, tokens: Array) -> Array:
            out = nn.Dense(width, dtype=self.dtype, name=name)(tokens)
            return out.reshape(b, -1, self.heads, width // self.heads)

        # Only what the mean sees is used.
        q, k, v = project("q_proj", mean), project("k_proj", tokens), project("v_proj", tokens)
        pooled = nn.Dense(self.features, dtype=self.dtype, name="proj")(dot_product_attention(q, k, v).reshape(b, -1))
        return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm2")(pooled)


class AddedKVAttention(nn.Module):
    """A norm, attention of all pixels to the text and, unless `cross_only`, to all pixels, and what was there."""

    head_width: int
    groups: int = 32
    text_norm: bool = True
    cross_only: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], text: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None
    ) -> Float[Array, "b h w c"]:
        """Args: `mask` tells which tokens may be attended to; pixels always may."""
        b, h, w, c = x.shape
        tokens = GroupNorm(self.groups, dtype=self.dtype, name="group_norm")(x).reshape(b, h * w, c)
        if self.text_norm:
            text = GroupNorm(TEXT_GROUPS, dtype=self.dtype, name="norm_cross")(text)

        def project(name: str, tokens: Array) -> Array:
            out = nn.Dense(c, dtype=self.dtype, name=name)(tokens)
            return out.reshape(b, -1, c // self.head_width, self.head_width)

        q, k, v = project("to_q", tokens), project("add_k_proj", text), project("add_v_proj", text)
        if not self.cross_only:
            k = jnp.concatenate([k, project("to_k", tokens)], axis=1)
            v = jnp.concatenate([v, project("to_v", tokens)], axis=1)
            mask = None if mask is None else jnp.pad(mask, ((0, 0), (0, h * w)), constant_values=True)
        out = dot_product_attention(q, k, v, mask=mask).reshape(b, h * w, c)
        out = nn.Dense(c, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="to_out")(out)
        return constrain_image(x + out.reshape(x.shape))


class _Given(NamedTuple):
    """The condition as blocks read it."""

    temb: Float[Array, "b e"]
    text: Float[Array, "b l d"]
    mask: Bool[Array, "b l"] | None


class AddedKVUNet(nn.Module):
    """Predicts noise, and log-variances where it has the channels, from noisy images and a text.

    Attributes:
        config: the sizes.
        remat: what blocks compute again in the backward pass: a key of `remat.POLICIES`.
        dtype: the type of the arithmetic; parameters stay float32.
    """

    config: AddedKVUNetConfig
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], t: Float[Array, " b"], cond: Cond) -> Float[Array, "b h w o"]:
        """The raw output of the network, in float32.

        Args:
            x: noisy images of unit variance.
            t: timesteps in [0, 999]; fractional ones are allowed.
            cond: `context`, and its `mask` where not all tokens may be attended to; `label` and `vector` where the
                config has them; `concat` is joined to x on channels.
        """
        c = self.config
        x = x if cond.concat is None else jnp.concatenate([x, cond.concat], axis=-1)
        given = self._given(t, cond)
        x = Conv(c.channels[0], dtype=self.dtype, name="conv_in")(constrain_image(x).astype(self.dtype))
        x, skips = self._down(x, given)
        x = self._res("mid_block_resnets_0", c.channels[-1], x, given)
        x = self._attend("mid_block_attentions_0", x, given)
        x = self._res("mid_block_resnets_1", c.channels[-1], x, given)
        x = self._up(x, skips, given)
        x = ACTIVATIONS[c.activation](GroupNorm(c.groups, dtype=self.dtype, name="conv_norm_out")(x))
        return Conv(c.out_channels, zero=True, dtype=self.dtype, name="conv_out")(x).astype(jnp.float32)

    def _given(self, t: Array, cond: Cond) -> _Given:
        c = self.config
        assert cond.context is not None, "this UNet was built for a text"
        text = cond.context.astype(self.dtype)
        temb = self._embed("time_embedding", t)
        if c.classes is not None:
            assert cond.label is not None, "this UNet was built for a noise level"
            temb += self._embed("class_embedding", cond.label)
        if c.takes_vector:
            assert cond.vector is not None, "this UNet was built for a condition vector"
            temb += cond.vector.astype(self.dtype)
        if c.pool_heads is not None:
            temb += TextPooling(c.pool_heads, c.embedding_width, self.dtype, name="add_embedding")(text)
        temb = ACTIVATIONS[c.activation](temb) if c.activated else temb
        if c.text_dim is not None:
            text = nn.Dense(c.cross_dim, dtype=self.dtype, name="encoder_hid_proj")(text)
        return _Given(constrain(temb, BATCH, None), text, cond.mask)

    def _embed(self, name: str, t: Array) -> Array:
        """The embedding of timesteps, or of noise levels, which have sinusoids of the same width."""
        c = self.config
        sinusoids = timestep_embedding(t, c.channels[0]).astype(self.dtype)
        return EmbeddingMLP(c.embedding_width, self.dtype, ACTIVATIONS[c.activation], name=name)(sinusoids)

    def _res(
        self, name: str, features: int, x: Array, given: _Given, resample: str = "", size: tuple[int, ...] | None = None
    ) -> Array:
        c = self.config
        block = recomputed(ResBlock, self.remat)(
            features,
            c.groups,
            zero=True,
            scale_shift=True,
            resample=resample,
            size=size,
            activation=ACTIVATIONS[c.activation],
            activated=c.activated,
            output_divisor=c.output_divisor,
            dtype=self.dtype,
            name=name,
        )
        return block(x, given.temb)

    def _attend(self, name: str, x: Array, given: _Given) -> Array:
        c, block = self.config, recomputed(AddedKVAttention, self.remat)
        attention = block(c.head_width, c.groups, c.text_norm, c.cross_only, self.dtype, name=name)
        return attention(x, given.text, given.mask)

    def _layer(self, place: str, number: int, level: int, x: Array, given: _Given) -> Array:
        """A residual block and, where the level has it, attention."""
        x = self._res(f"{place}_resnets_{number}", self.config.channels[level], x, given)
        return self._attend(f"{place}_attentions_{number}", x, given) if level in self.config.attention_levels else x

    def _down(self, x: Array, given: _Given) -> tuple[Array, list[Array]]:
        c, skips = self.config, [x]
        for i, features in enumerate(c.channels):
            for j in range(c.layers[i]):
                x = self._layer(f"down_blocks_{i}", j, i, x, given)
                skips.append(x)
            if i < len(c.channels) - 1:
                x = self._res(f"down_blocks_{i}_downsamplers_0", features, x, given, "down")
                skips.append(x)
        return x, skips

    def _up(self, x: Array, skips: list[Array], given: _Given) -> Array:
        c = self.config
        for i, level in enumerate(reversed(range(len(c.channels)))):
            for j in range(c.layers[level] + 1):
                x = self._layer(f"up_blocks_{i}", j, level, jnp.concatenate([x, skips.pop()], -1), given)
            if level:
                size = skips[-1].shape[1:3]
                x = self._res(f"up_blocks_{i}_upsamplers_0", c.channels[level], x, given, "up", size)
        return x
