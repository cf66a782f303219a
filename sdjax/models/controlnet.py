"""ControlNet: a trainable copy of a UNet's encoder that sees a hint (Zhang et al. 2023; lllyasviel/ControlNet cldm.py).

Module names follow PyTorch diffusers' `ControlNetModel`, with `_` where its checkpoints have `.` before a number.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from sdjax.core.tree import Tree, flatten, unflatten
from sdjax.models.conditioning import Cond
from sdjax.models.layers import Conv
from sdjax.models.unet import SD1, SD2, SDXL, UNetConfig, UNetEncoder

HINT_ENCODER = "controlnet_cond_embedding"


@dataclass(frozen=True)
class ControlNetConfig:
    """Sizes of a ControlNet.

    Attributes:
        encoder: of the UNet that it controls; it takes that one's latents alone, without what is joined to them.
        hint_channels: of the hint.
        hint_features: of the hint's encoder, finest first; each but the last halves height and width.
        bgr: whether the hint's channels are reversed.
        global_pool: whether each residual is replaced by its mean over height and width ("shuffle").
        zero_hint: whether the hint's encoder ends at zero when training begins, as published.
    """

    encoder: UNetConfig = field(default_factory=UNetConfig)
    hint_channels: int = 3
    hint_features: tuple[int, ...] = (16, 32, 96, 256)
    bgr: bool = False
    global_pool: bool = False
    zero_hint: bool = True

    @property
    def blocks(self) -> int:
        """Residual blocks and transformers, each of which has parameters of its own."""
        c = self.encoder
        return c.layers_per_block * (len(c.channels) + sum(c.depths)) + c.mid_depth + 2

    @property
    def residuals(self) -> tuple[int, ...]:
        """The level of each residual, 0 the finest; the middle's is the last."""
        levels = range(len(self.encoder.channels))
        # The convolution that halves a level makes the first feature of the next.
        each = [level for level in levels for _ in range(self.encoder.layers_per_block + 1)]
        return (*each, levels[-1])

    @property
    def factor(self) -> int:
        """Pixels of the hint along each side of a latent."""
        return 2 ** (len(self.hint_features) - 1)

    def example_inputs(self) -> tuple[Array, Array, Cond, Array]:
        """Noisy latents, timesteps, a condition and a hint of the smallest size, for initialisation."""
        x, t, cond = self.encoder.example_inputs()
        side = x.shape[1] * self.factor
        return x, t, cond, jnp.zeros((1, side, side, self.hint_channels))


VARIANTS = {
    "sd1": ControlNetConfig(SD1),  # 361,279,120 parameters
    "sd2": ControlNetConfig(SD2),  # 364,228,240
    "sdxl": ControlNetConfig(SDXL),  # 1,251,014,160
    "sdxl_small": ControlNetConfig(replace(SDXL, depths=(0, 1, 1), mid_depth=1)),  # 292,596,240
}


class HintEncoder(nn.Module):
    """Convolutions that make a hint as small as the latents.

    Attributes:
        features: that come out, as many as the UNet's first convolution has.
    """

    config: ControlNetConfig
    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, hint: Float[Array, "b H W k"]) -> Float[Array, "b h w f"]:
        """Args: hint in [0, 1], red first whatever the order that the network was trained with."""
        c = self.config
        x = (hint[..., ::-1] if c.bgr else hint).astype(self.dtype)
        x = nn.silu(Conv(c.hint_features[0], dtype=self.dtype, name="conv_in")(x))
        for i, (features, wider) in enumerate(zip(c.hint_features, c.hint_features[1:], strict=False)):
            x = nn.silu(Conv(features, dtype=self.dtype, name=f"blocks_{2 * i}")(x))
            x = nn.silu(Conv(wider, stride=2, dtype=self.dtype, name=f"blocks_{2 * i + 1}")(x))
        return Conv(self.features, zero=c.zero_hint, dtype=self.dtype, name="conv_out")(x)


class ControlNet(UNetEncoder):
    """Residuals for a UNet's skip connections and its middle.

    Attributes:
        control: the sizes; `config` is those of its encoder: see `controlnet_of`.
    """

    control: ControlNetConfig = ControlNetConfig()

    def setup(self) -> None:
        self.controlnet_cond_embedding = HintEncoder(self.control, self.config.channels[0], self.dtype)

    def __call__(
        self, x: Float[Array, "b h w c"], t: Float[Array, " b"], cond: Cond, hint: Float[Array, "b H W k"]
    ) -> tuple[Array, ...]:
        """The residuals under a hint in [0, 1]."""
        return self.residuals(x, t, cond, self.features(hint))

    def features(self, hint: Float[Array, "b H W k"]) -> Float[Array, "b h w f"]:
        """Features of a hint in [0, 1], which depend on no timestep."""
        return self.controlnet_cond_embedding(hint)

    @nn.compact
    def residuals(
        self, x: Float[Array, "b h w c"], t: Float[Array, " b"], cond: Cond, features: Float[Array, "b h w f"]
    ) -> tuple[Array, ...]:
        """Terms for the skip connections, that of the first convolution first, and last one for the middle.

        Args:
            x, t, cond: as the UNet is given them; of the condition only what the UNet itself was trained with is read.
            features: of the hint.
        """
        cond = cond._replace(images=None, features=None)
        middle, skips = self._encoded(x, self._embedding(t, cond), cond, features)
        names = [*(f"controlnet_down_blocks_{i}" for i in range(len(skips))), "controlnet_mid_block"]

        def zero(name: str, x: Array) -> Array:
            x = Conv(x.shape[-1], kernel=1, zero=True, dtype=self.dtype, name=name)(x)
            return x.mean((1, 2), keepdims=True) if self.control.global_pool else x

        return tuple(zero(name, x) for name, x in zip(names, [*skips, middle], strict=True))


def controlnet_of(config: ControlNetConfig, remat: str = "none", dtype: DTypeLike = jnp.float32) -> ControlNet:
    """The module of these sizes."""
    return ControlNet(config.encoder, remat, dtype, config)


def config_for(unet: UNetConfig, factor: int = 8, **sizes: Any) -> ControlNetConfig:
    """Sizes of a ControlNet for a UNet over latents of `factor` pixels a side.

    Args:
        sizes: further fields of the config.
    """
    halvings = factor.bit_length() - 1
    features = (*ControlNetConfig.hint_features, *[ControlNetConfig.hint_features[-1]] * halvings)[: halvings + 1]
    encoder = replace(unet, in_channels=unet.out_channels, guidance_dim=None)
    return ControlNetConfig(encoder, hint_features=features, **sizes)


def trainable_copy(config: ControlNetConfig, unet: Tree, key: PRNGKeyArray) -> dict[str, Any]:
    """Parameters that begin from a UNet's: its encoder's, a fresh encoder of the hint, convolutions at zero; traceable.

    Of a UNet whose input is joined with others, e.g. for inpainting, the first convolution is cut to the latents'
    channels, which come first.

    Args:
        config: of `config_for`.
        unet: the UNet's parameters.
    """
    fresh, own = flatten(controlnet_of(config).init(key, *config.example_inputs())["params"]), flatten(unet)
    copied = {name: own.get(name, leaf) for name, leaf in fresh.items()}
    copied["conv_in/kernel"] = copied["conv_in/kernel"][:, :, : config.encoder.in_channels]
    return unflatten(copied)
