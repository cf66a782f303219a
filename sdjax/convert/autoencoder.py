"""The autoencoders as PyTorch diffusers stores them: `AutoencoderKL`, and `VQModel` with a codebook."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.convert import configs
from sdjax.convert.rules import Row, Table, at, conv, embedding, layer, norm
from sdjax.models.autoencoder import AutoencoderConfig, VQConfig, autoencoder_of

CLASS_NAME, VQ_CLASS_NAME = "AutoencoderKL", "VQModel"
# Blocks by whether self-attention follows each of their residual blocks.
DOWN = {False: "DownEncoderBlock2D", True: "AttnDownEncoderBlock2D"}
UP = {False: "UpDecoderBlock2D", True: "AttnUpDecoderBlock2D"}

ALLOWED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "in_channels": (3,),
    "latents_mean": (None,),
    "latents_std": (None,),
    "lookup_from_codebook": (False,),
    "mid_block_add_attention": (True, False),
    "norm_type": ("group",),
    "out_channels": (3,),
    "shift_factor": (None, 0, 0.0),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}

RESBLOCK = (*norm("norm1"), *conv("conv1"), *norm("norm2"), *conv("conv2"), *conv("conv_shortcut"))
ATTENTION = (*layer("to_q"), *layer("to_k"), *layer("to_v"), *layer("to_out", "to_out.0"))
ATTENTION_BLOCK = (*norm("group_norm"), *(Row(f"attention/{row.ours}", row.theirs, row.kind) for row in ATTENTION))
MID_BLOCK = (*at("resnets_*", "resnets.*", RESBLOCK), *at("attentions_*", "attentions.*", ATTENTION_BLOCK))


def _half(blocks: str, resampler: str) -> tuple[Row, ...]:
    return (
        *conv("conv_in"),
        *at(f"{blocks}_*_resnets_*", f"{blocks}.*.resnets.*", RESBLOCK),
        *at(f"{blocks}_*_attentions_*", f"{blocks}.*.attentions.*", ATTENTION_BLOCK),
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
        *embedding("quantize/embedding", "quantize.embedding"),
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
        return autoencoder_of(config).init(key, jnp.zeros((1, config.factor, config.factor, 3)), key)

    return jax.eval_shape(init)["params"]


def from_diffusers_config(config: Mapping[str, Any], place: str = "vae/config.json") -> AutoencoderConfig:
    """Sizes from a config.json; a missing key means what it means to diffusers.

    Raises:
        UserError: a value asks for a structure that the autoencoders here do not have.
    """
    configs.check(config, ALLOWED, place)
    channels = configs.integers(config, "block_out_channels", (64,), 0, place)
    attends = _attention(config, "down_block_types", DOWN, len(channels), place)
    if attends[::-1] != _attention(config, "up_block_types", UP, len(channels), place):
        raise configs.unsupported(config, "up_block_types", place, "the reverse of down_block_types")
    scale = config.get("scaling_factor", 0.18215)
    if type(scale) not in (int, float) or scale <= 0:
        raise configs.unsupported(config, "scaling_factor", place, "a positive number")
    is_vq = config.get("_class_name") == VQ_CLASS_NAME
    width = configs.integer(config, "latent_channels", 3 if is_vq else 4, place)
    if config.get("vq_embed_dim") not in (None, width):
        raise configs.unsupported(config, "vq_embed_dim", place, f"latent_channels, which is {width}")
    codes = {"codes": configs.integer(config, "num_vq_embeddings", 256, place)} if is_vq else {}
    return (VQConfig if is_vq else AutoencoderConfig)(
        channels=channels,
        latent_channels=width,
        layers_per_block=configs.integer(config, "layers_per_block", 1, place),
        groups=configs.groups(config, channels, place),
        scaling_factor=float(scale),
        attention_levels=tuple(level for level, here in enumerate(attends) if here),
        mid_attention=config.get("mid_block_add_attention", True),
        **codes,
    )


def _attention(
    config: Mapping[str, Any], key: str, names: Mapping[bool, str], levels: int, place: str
) -> tuple[bool, ...]:
    """Which blocks have attention."""
    found = {name: here for here, name in names.items()}
    blocks = config.get(key, [names[False]])
    if not isinstance(blocks, list | tuple) or len(blocks) != levels or any(block not in found for block in blocks):
        raise configs.unsupported(config, key, place, f"{levels} of {' and '.join(found)}")
    return tuple(found[block] for block in blocks)


def to_diffusers_config(config: AutoencoderConfig) -> dict[str, Any]:
    """The config.json of an autoencoder, without what the sizes do not say (`sample_size`, `force_upcast`)."""
    attends = [level in config.attention_levels for level in range(len(config.channels))]
    found = {
        "_class_name": CLASS_NAME,
        "act_fn": "silu",
        "block_out_channels": list(config.channels),
        "down_block_types": [DOWN[here] for here in attends],
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.groups,
        "out_channels": 3,
        "scaling_factor": config.scaling_factor,
        "up_block_types": [UP[here] for here in reversed(attends)],
    }
    if not config.mid_attention:
        found["mid_block_add_attention"] = False
    if isinstance(config, VQConfig):
        found |= {"_class_name": VQ_CLASS_NAME, "num_vq_embeddings": config.codes}
    return found
