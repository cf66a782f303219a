"""The KL autoencoder as PyTorch diffusers stores it (`AutoencoderKL`)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.convert import configs
from sdjax.convert.rules import Row, Table, at, conv, layer, norm
from sdjax.models.autoencoder import Autoencoder, AutoencoderConfig

CLASS_NAME = "AutoencoderKL"
DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"

ALLOWED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "in_channels": (3,),
    "latents_mean": (None,),
    "latents_std": (None,),
    "mid_block_add_attention": (True,),
    "out_channels": (3,),
    "shift_factor": (None, 0, 0.0),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}

RESBLOCK = (*norm("norm1"), *conv("conv1"), *norm("norm2"), *conv("conv2"), *conv("conv_shortcut"))
ATTENTION = (*layer("to_q"), *layer("to_k"), *layer("to_v"), *layer("to_out", "to_out.0"))
MID_BLOCK = (
    *at("resnets_*", "resnets.*", RESBLOCK),
    *norm("attentions_*/group_norm", "attentions.*.group_norm"),
    *at("attentions_*/attention", "attentions.*", ATTENTION),
)


def _half(blocks: str, resampler: str) -> tuple[Row, ...]:
    return (
        *conv("conv_in"),
        *at(f"{blocks}_*_resnets_*", f"{blocks}.*.resnets.*", RESBLOCK),
        *conv(f"{blocks}_*_{resampler}_*/conv", f"{blocks}.*.{resampler}.*.conv"),
        *at("mid_block", "mid_block", MID_BLOCK),
        *norm("conv_norm_out"),
        *conv("conv_out"),
    )


TABLE = Table(
    rows=(
        *at("encoder", "encoder", _half("down_blocks", "downsamplers")),
        *at("decoder", "decoder", _half("up_blocks", "upsamplers")),
        *conv("quant_conv"),
        *conv("post_quant_conv"),
    ),
    # What diffusers called the attention's layers before 0.17; the published SD 1 and SD 2 folders still say so.
    aliases=(
        (r"(attentions\.\d+)\.query\.", r"\1.to_q."),
        (r"(attentions\.\d+)\.key\.", r"\1.to_k."),
        (r"(attentions\.\d+)\.value\.", r"\1.to_v."),
        (r"(attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
    ),
)


@functools.cache
def shapes(config: AutoencoderConfig) -> dict[str, Any]:
    """The parameters as a tree of `jax.ShapeDtypeStruct`; traced once a config, and shared: not to be changed."""

    def init() -> Any:
        key = jax.random.key(0)
        return Autoencoder(config).init(key, jnp.zeros((1, config.factor, config.factor, 3)), key)

    return jax.eval_shape(init)["params"]


def from_diffusers_config(config: Mapping[str, Any], place: str = "vae/config.json") -> AutoencoderConfig:
    """Sizes from a config.json; a missing key means what it means to diffusers.

    Raises:
        UserError: a value asks for a structure that `Autoencoder` does not have.
    """
    configs.check(config, ALLOWED, place)
    channels = configs.integers(config, "block_out_channels", (64,), 0, place)
    for key, block in (("down_block_types", DOWN), ("up_block_types", UP)):
        if list(config.get(key, [block])) != [block] * len(channels):
            raise configs.unsupported(config, key, place, f"{len(channels)} times {block}")
    scale = config.get("scaling_factor", 0.18215)
    if type(scale) not in (int, float) or scale <= 0:
        raise configs.unsupported(config, "scaling_factor", place, "a positive number")
    return AutoencoderConfig(
        channels=channels,
        latent_channels=configs.integer(config, "latent_channels", 4, place),
        layers_per_block=configs.integer(config, "layers_per_block", 1, place),
        groups=configs.groups(config, channels, place),
        scaling_factor=float(scale),
    )


def to_diffusers_config(config: AutoencoderConfig) -> dict[str, Any]:
    """The config.json of an autoencoder, without what the sizes do not say (`sample_size`, `force_upcast`)."""
    levels = len(config.channels)
    return {
        "_class_name": CLASS_NAME,
        "act_fn": "silu",
        "block_out_channels": list(config.channels),
        "down_block_types": [DOWN] * levels,
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.groups,
        "out_channels": 3,
        "scaling_factor": config.scaling_factor,
        "up_block_types": [UP] * levels,
    }
