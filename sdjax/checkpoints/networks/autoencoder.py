"""The autoencoders as PyTorch diffusers stores them (`AutoencoderKL`; `VQModel` with a codebook), and as LDM does."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.checkpoints import config_fields, mapping
from sdjax.checkpoints.config_fields import Field
from sdjax.checkpoints.mapping import (
    SAME,
    KeyMapping,
    KeyTable,
    Modules,
    Shapes,
    at,
    below,
    conv,
    embedding,
    norm,
    renamed,
)
from sdjax.checkpoints.networks.blocks import ATTENTION_ALIASES, ATTENTION_BLOCK
from sdjax.checkpoints.original_keys import GROUPS, SQUEEZED, OriginalSizes, Piece
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
    "norm_type": ("group",),
    "out_channels": (3,),
    "shift_factor": (None, 0, 0.0),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}

FIELDS = (
    Field("layers_per_block", "layers_per_block", 1),
    Field("groups", "norm_num_groups", 32),
    Field("scaling_factor", "scaling_factor", 0.18215),
    Field("mid_attention", "mid_block_add_attention", True),
)

RESBLOCK = (*norm("norm1"), *conv("conv1"), *norm("norm2"), *conv("conv2"), *conv("conv_shortcut"))
MID_BLOCK = (*at("resnets_*", "resnets.*", RESBLOCK), *at("attentions_*", "attentions.*", ATTENTION_BLOCK))


def _half(blocks: str, resampler: str) -> tuple[KeyMapping, ...]:
    return (
        *conv("conv_in"),
        *at(f"{blocks}_*_resnets_*", f"{blocks}.*.resnets.*", RESBLOCK),
        *at(f"{blocks}_*_attentions_*", f"{blocks}.*.attentions.*", ATTENTION_BLOCK),
        *conv(f"{blocks}_*_{resampler}_*/conv", f"{blocks}.*.{resampler}.*.conv"),
        *at("mid_block", "mid_block", MID_BLOCK),
        *norm("conv_norm_out"),
        *conv("conv_out"),
    )


TABLE = KeyTable(
    rows=(
        *at("encoder", "encoder", _half("down_blocks", "downsamplers")),
        *at("decoder", "decoder", _half("up_blocks", "upsamplers")),
        *conv("quant_conv"),
        *conv("post_quant_conv"),
        *embedding("quantize/embedding", "quantize.embedding"),
    ),
    aliases=ATTENTION_ALIASES,
)


@functools.cache
def shapes(config: AutoencoderConfig) -> dict[str, Any]:
    """The parameters as a tree of `jax.ShapeDtypeStruct`; traced once a config, and shared: not to be changed."""
    image = jax.ShapeDtypeStruct((1, config.factor, config.factor, 3), jnp.float32)
    return mapping.traced(autoencoder_of(config).init, image, jax.random.key(0))


def from_diffusers_config(config: Mapping[str, Any], place: str = "vae/config.json") -> AutoencoderConfig:
    """Sizes from a config.json; a missing key means what it means to diffusers.

    Raises:
        UserError: a value asks for a structure that the autoencoders here do not have.
    """
    config_fields.check(config, ALLOWED, place)
    channels = config_fields.integers(config, "block_out_channels", (64,), 0, place)
    sides = (("down_block_types", DOWN, [DOWN[False]]), ("up_block_types", UP, [UP[False]]))
    attends = config_fields.attention_levels(config, sides, len(channels), place)
    is_vq = config.get("_class_name") == VQ_CLASS_NAME
    width = config_fields.integer(config, "latent_channels", 3 if is_vq else 4, place)
    if config.get("vq_embed_dim") not in (None, width):
        raise config_fields.unsupported(config, "vq_embed_dim", place, f"latent_channels, which is {width}")
    sizes = config_fields.read_fields(config, FIELDS, place)
    config_fields.check_groups(sizes["groups"], channels, place)
    codes = {"codes": config_fields.integer(config, "num_vq_embeddings", 256, place)} if is_vq else {}
    return (VQConfig if is_vq else AutoencoderConfig)(
        channels=channels,
        latent_channels=width,
        attention_levels=tuple(level for level, here in enumerate(attends) if here),
        **codes,
        **sizes,
    )


def to_diffusers_config(config: AutoencoderConfig) -> dict[str, Any]:
    """The config.json of an autoencoder, without what the sizes do not say (`sample_size`, `force_upcast`)."""
    attends = [level in config.attention_levels for level in range(len(config.channels))]
    found = {
        **config_fields.write_fields(config, FIELDS),
        "_class_name": CLASS_NAME,
        "act_fn": "silu",
        "block_out_channels": list(config.channels),
        "down_block_types": [DOWN[here] for here in attends],
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "out_channels": 3,
        "up_block_types": [UP[here] for here in reversed(attends)],
    }
    if config.mid_attention:
        del found["mid_block_add_attention"]
    if isinstance(config, VQConfig):
        found |= {"_class_name": VQ_CLASS_NAME, "num_vq_embeddings": config.codes}
    return found


CODEBOOK = "quantize.embedding.weight"
ORIGINAL_RESBLOCK = {"conv_shortcut": "nin_shortcut"} | {name: name for name in ("norm1", "conv1", "norm2", "conv2")}
ORIGINAL_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def pieces(config: AutoencoderConfig) -> dict[str, Piece]:
    """The place of every tensor in the original layout (CompVis/latent-diffusion model.py), by diffusers' key."""
    levels, layers = len(config.channels), config.layers_per_block
    modules: Modules = {name: name for name in ("quant_conv", "post_quant_conv", "quantize.embedding")}

    def add(theirs: str, ours: str, block: str, attention: str) -> None:
        modules.update(below(theirs.format("resnets"), f"{ours}.{block}", ORIGINAL_RESBLOCK))
        modules.update(below(theirs.format("attentions"), f"{ours}.{attention}", ORIGINAL_ATTENTION))

    for half in ("encoder", "decoder"):
        modules |= below(half, half, {"conv_in": "conv_in", "conv_out": "conv_out", "conv_norm_out": "norm_out"})
        for number in (0, 1):
            add(f"{half}.mid_block.{{}}.{number}", f"{half}.mid", f"block_{number + 1}", f"attn_{number + 1}")
    for i in range(levels):
        down, up = f"encoder.down.{i}", f"decoder.up.{levels - 1 - i}"
        for j in range(layers + 1):
            add(f"encoder.down_blocks.{i}.{{}}.{j}", down, f"block.{j}", f"attn.{j}")
            add(f"decoder.up_blocks.{i}.{{}}.{j}", up, f"block.{j}", f"attn.{j}")
        modules[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"{down}.downsample.conv"
        modules[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"{up}.upsample.conv"
    found = {key: renamed(key, modules) for key in mapping.stored_shapes(TABLE, shapes(config))}
    return {key: Piece(name, SQUEEZED if is_attention(name) else SAME) for key, name in found.items()}


def is_attention(key: str) -> bool:
    """Tell whether an original key is one of the matrices that are stored as 1x1 convolutions."""
    return re.search(r"\.(attn_1|attn\.\d+)\.(q|k|v|proj_out)\.weight$", key) is not None


def original_config(found: Shapes, scaling_factor: float, place: object) -> AutoencoderConfig:
    """The sizes of an autoencoder whose original tensors have the shapes `found`.

    Raises:
        UserError: a tensor that says a size is missing.
    """
    sizes = OriginalSizes(found, place)
    levels = range(max(sizes.count("encoder.down"), 1))
    channels = tuple(sizes.axis(f"encoder.down.{i}.block.0.conv1.weight", 0) for i in levels)
    config_fields.check_groups(GROUPS, channels, str(place))
    codes = {"codes": sizes.axis(CODEBOOK, 0)} if CODEBOOK in sizes else {}
    return (VQConfig if codes else AutoencoderConfig)(
        channels=channels,
        latent_channels=sizes.axis("post_quant_conv.weight", 0),
        layers_per_block=max(sizes.count("encoder.down.0.block"), 1),
        groups=GROUPS,
        scaling_factor=scaling_factor,
        attention_levels=tuple(i for i in levels if sizes.count(f"encoder.down.{i}.attn")),
        mid_attention="encoder.mid.attn_1.norm.weight" in sizes,
        **codes,
    )
