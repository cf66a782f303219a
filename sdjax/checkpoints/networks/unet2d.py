"""The UNet without cross-attention as PyTorch diffusers stores it (`UNet2DModel`), and as LDM and ADM do.

ADM's classifier of noisy images, which is its encoder, is stored alike (openai/guided-diffusion).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.checkpoints import config_fields, mapping
from sdjax.checkpoints.config_fields import MAX_SIDE, Field
from sdjax.checkpoints.mapping import SAME, KeyMapping, KeyTable, Shapes, at, conv, embedding, layer, norm, renamed
from sdjax.checkpoints.networks.blocks import (
    ATTENTION_ALIASES,
    ATTENTION_BLOCK,
    EMBEDDING_MLP,
    RESBLOCK,
    original_modules,
)
from sdjax.checkpoints.original_keys import CONV_1D, GROUPS, TRANSPOSED, Heads, OriginalSizes, Piece
from sdjax.core.errors import UserError
from sdjax.models.adm_classifier import ClassifierConfig, classifier_of
from sdjax.models.unet2d import UNet2D, UNet2DConfig

CLASS_NAME = "UNet2DModel"
OWN_CLASS_NAME = "UNetModel"  # guided-diffusion's and LDM's own class, for sizes that diffusers' cannot express
# Blocks by whether residual blocks resample, then by whether they have attention.
DOWN = {
    False: {False: "DownBlock2D", True: "AttnDownBlock2D"},
    True: {False: "ResnetDownsampleBlock2D", True: "AttnDownBlock2D"},
}
UP = {
    False: {False: "UpBlock2D", True: "AttnUpBlock2D"},
    True: {False: "ResnetUpsampleBlock2D", True: "AttnUpBlock2D"},
}

ALLOWED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "attn_norm_num_groups": (None, 32),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "downsample_padding": (1, 0),
    "downsample_type": ("conv", "resnet"),
    "freq_shift": (0, 1),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2D", None),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "upsample_type": ("conv", "resnet"),
}
FIELDS = (
    Field("in_channels", "in_channels", 3),
    Field("out_channels", "out_channels", 3),
    Field("layers_per_block", "layers_per_block", 2),
    Field("groups", "norm_num_groups", 32),
    Field("classes", "num_class_embeds", None),
    Field("cosines_first", "flip_sin_to_cos", True),
    Field("eps", "norm_eps", 1e-5),
)
NUMBERS = ("freq_shift", "downsample_padding")  # 0 or 1, and called so here, too
OWN_FIELDS = (
    *(Field(field.ours, field.ours, field.default) for field in FIELDS),
    *(Field("width", "width", None), Field("scale_shift", "scale_shift", False)),
    Field("resblock_updown", "resblock_updown", False),
)
CLASSIFIER_FIELDS = (Field("size", "size", 0, MAX_SIDE), Field("classes", "classes", 0))


def _side(blocks: str, resampler: str) -> tuple[KeyMapping, ...]:
    return (
        *at(f"{blocks}_*_resnets_*", f"{blocks}.*.resnets.*", RESBLOCK),
        *at(f"{blocks}_*_attentions_*", f"{blocks}.*.attentions.*", ATTENTION_BLOCK),
        *conv(f"{blocks}_*_{resampler}_*/conv", f"{blocks}.*.{resampler}.*.conv"),
        *at(f"{blocks}_*_{resampler}_*", f"{blocks}.*.{resampler}.*", RESBLOCK),
    )


TABLE = KeyTable(
    rows=(
        *at("time_embedding", "time_embedding", EMBEDDING_MLP),
        *embedding("class_embedding", "class_embedding"),
        *conv("conv_in"),
        *_side("down_blocks", "downsamplers"),
        *at("mid_block_resnets_*", "mid_block.resnets.*", RESBLOCK),
        *at("mid_block_attentions_*", "mid_block.attentions.*", ATTENTION_BLOCK),
        *_side("up_blocks", "upsamplers"),
        *norm("conv_norm_out"),
        *conv("conv_out"),
    ),
    aliases=ATTENTION_ALIASES,
)
POOL = (
    KeyMapping("positional_embedding", "positional_embedding", TRANSPOSED),
    *(*layer("to_q"), *layer("to_k"), *layer("to_v"), *layer("to_out", "c_proj")),
)
CLASSIFIER_TABLE = KeyTable((*TABLE.rows, *at("pool", "out.2", POOL)))


@functools.cache
def shapes(config: UNet2DConfig) -> dict[str, Any]:
    """The parameters as a tree of `jax.ShapeDtypeStruct`; traced once a config, and shared: not to be changed."""
    return mapping.traced(UNet2D(config).init, *jax.eval_shape(config.example_inputs))


@functools.cache
def classifier_shapes(config: ClassifierConfig) -> dict[str, Any]:
    """The same of a classifier."""
    images = jax.ShapeDtypeStruct((1, config.size, config.size, 3), jnp.float32)
    return mapping.traced(classifier_of(config).init, images, jnp.zeros(1))


def from_diffusers_config(config: Mapping[str, Any], place: str = "unet/config.json") -> UNet2DConfig:
    """Sizes from a config.json; a missing key means what it means to diffusers.

    Raises:
        UserError: a value asks for a structure that `UNet2D` does not have.
    """
    config_fields.check(config, ALLOWED, place)
    channels = config_fields.integers(config, "block_out_channels", (224, 448, 672, 896), 0, place)
    resampled = config.get("downsample_type", "conv")
    if config.get("upsample_type", "conv") != resampled:
        raise config_fields.unsupported(config, "upsample_type", place, f"{resampled!r} as the other")
    updown, default = resampled == "resnet", [level > 0 for level in range(len(channels))]
    sides = (
        ("down_block_types", DOWN[updown], [DOWN[False][here] for here in default]),
        ("up_block_types", UP[updown], [UP[False][here] for here in reversed(default)]),
    )
    attends = config_fields.attention_levels(config, sides, len(channels), place)
    wide = config.get("attention_head_dim", 8)
    if wide is not None and (type(wide) is not int or wide < 1):
        raise config_fields.unsupported(config, "attention_head_dim", place, "a positive integer or null")
    sizes = config_fields.read_fields(config, FIELDS, place)
    config_fields.check_groups(sizes["groups"], channels, place)
    return UNet2DConfig(
        channels=channels,
        attention_levels=tuple(level for level, here in enumerate(attends) if here),
        heads=tuple(1 if wide is None else max(level // wide, 1) for level in channels),
        scale_shift=config.get("resnet_time_scale_shift") == "scale_shift",
        resblock_updown=updown,
        **{key: config.get(key, ALLOWED[key][0]) for key in NUMBERS},
        **sizes,
    )


def to_diffusers_config(config: UNet2DConfig) -> dict[str, Any]:
    """The config.json of a UNet.

    Raises:
        UserError: it has heads of different widths, or sinusoids of another width than its first level: diffusers'
            class has neither.
    """
    widths = _head_widths(config)
    if not is_diffusers(config):
        raise UserError(
            f"diffusers' {CLASS_NAME} has neither heads of different widths ({sorted(widths)}) nor an embedding of the "
            f"timestep that is {config.width} wide where the first level has {config.channels[0]} channels"
        )
    attends = [level in config.attention_levels for level in range(len(config.channels))]
    resample = "resnet" if config.resblock_updown else "conv"
    return {
        **config_fields.write_fields(config, FIELDS),
        **{key: getattr(config, key) for key in NUMBERS},
        "_class_name": CLASS_NAME,
        "act_fn": "silu",
        "attention_head_dim": widths.pop(),
        "attn_norm_num_groups": config.groups if config.scale_shift else None,
        "block_out_channels": list(config.channels),
        "down_block_types": [DOWN[config.resblock_updown][here] for here in attends],
        "downsample_type": resample,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "up_block_types": [UP[config.resblock_updown][here] for here in reversed(attends)],
        "upsample_type": resample,
    }


def is_diffusers(config: UNet2DConfig) -> bool:
    """Tell whether diffusers' class has such sizes: heads of one width, as many sinusoids as first channels."""
    return len(_head_widths(config)) == 1 and config.width in (None, config.channels[0])


def _head_widths(config: UNet2DConfig) -> set[int]:
    used = {*config.attention_levels, len(config.channels) - 1}
    return {config.channels[level] // config.heads[level] for level in used}


def to_config(config: UNet2DConfig) -> dict[str, Any]:
    """The config.json of a UNet: diffusers', or the sizes as they are where diffusers' class cannot express them."""
    if is_diffusers(config):
        return to_diffusers_config(config)
    return {"_class_name": OWN_CLASS_NAME, **dataclasses.asdict(config)}


def from_config(config: Mapping[str, Any], place: str = "unet/config.json") -> UNet2DConfig:
    """Sizes from what `to_config` made.

    Raises:
        UserError: a size is missing, of another type or unknown, or a value asks for a structure that is not here.
    """
    if config.get("_class_name") != OWN_CLASS_NAME:
        return from_diffusers_config(config, place)
    channels = config_fields.integers(config, "channels", (), 0, place)
    levels = config.get("attention_levels", ())
    if not isinstance(levels, list | tuple) or any(level not in range(len(channels)) for level in levels):
        raise config_fields.unsupported(config, "attention_levels", place, f"some of {list(range(len(channels)))}")
    heads = config_fields.integers(config, "heads", (), len(channels), place)
    if any(channels[level] % heads[level] for level in (*levels, len(channels) - 1)):
        raise config_fields.unsupported(config, "heads", place, f"divisors of {list(channels)}")
    config_fields.check(config, {key: ALLOWED[key] for key in NUMBERS}, place)
    sizes = config_fields.read_fields(config, OWN_FIELDS, place)
    if sizes["width"] == 1:
        raise config_fields.unsupported(config, "width", place, "2 at least, a sine and a cosine")
    config_fields.check_groups(sizes["groups"], channels, place)
    sizes |= {key: config.get(key, ALLOWED[key][0]) for key in NUMBERS}
    return UNet2DConfig(channels=channels, attention_levels=tuple(levels), heads=heads, **sizes)


def classifier_from_config(config: Mapping[str, Any], place: str = "classifier/config.json") -> ClassifierConfig:
    """Sizes from the config.json that `classifier_to_config` made.

    Raises:
        UserError: a size is missing, or there is one that is unknown.
    """
    encoder = config.get("encoder")
    if not isinstance(encoder, dict):
        raise config_fields.unsupported(config, "encoder", place, "the sizes of a UNet")
    sizes = config_fields.read_fields(config, CLASSIFIER_FIELDS, place)
    half = from_config({**encoder, "_class_name": OWN_CLASS_NAME}, place)
    if half.classes is not None:
        raise config_fields.unsupported(encoder, "classes", place, "null: it is the classifier that has classes")
    if sizes["size"] % half.divisor:
        raise config_fields.unsupported(config, "size", place, f"a multiple of {half.divisor}, which its levels halve")
    return ClassifierConfig(half, **sizes)


def classifier_to_config(config: ClassifierConfig) -> dict[str, Any]:
    """The config.json of a classifier."""
    return {"_class_name": "EncoderUNetModel", **dataclasses.asdict(config)}


ORIGINAL_ATTENTION = {"group_norm": "norm", **dict.fromkeys(("to_q", "to_k", "to_v"), "qkv"), "to_out.0": "proj_out"}


def pieces(config: UNet2DConfig, new_order: bool = False) -> dict[str, Piece]:
    """The place of every tensor in guided-diffusion's or LDM's layout, by diffusers' key.

    Args:
        new_order: whether queries, keys and values of all heads stand together (`use_new_attention_order`, ADM at 64
            pixels); else those of each head do.
    """
    return _pieces(config, mapping.stored_shapes(TABLE, shapes(config)), new_order)


def _pieces(config: UNet2DConfig, keys: Mapping[str, Any], new_order: bool) -> dict[str, Piece]:
    levels = len(config.channels)
    attends = [level in config.attention_levels for level in range(levels)]
    modules = original_modules(attends, config.layers_per_block, ORIGINAL_ATTENTION)

    def piece(key: str) -> Piece:
        parts = key.split(".")
        if ".attentions." not in key or parts[-2] == "group_norm":
            return Piece(renamed(key, modules))
        level = -1 if parts[0] == "mid_block" else int(parts[1]) if parts[0] == "down_blocks" else -1 - int(parts[1])
        kind = CONV_1D if parts[-1] == "weight" else SAME
        third = {"to_q": 0, "to_k": 1, "to_v": 2}.get(parts[-2])
        return Piece(renamed(key, modules), kind, third, 1 if new_order else config.heads[level])

    return {key: piece(key) for key in keys}


def classifier_pieces(config: ClassifierConfig) -> dict[str, Piece]:
    """The same of a classifier, whose last layer attends from the mean of all pixels."""
    keys = mapping.stored_shapes(CLASSIFIER_TABLE, classifier_shapes(config))
    found = _pieces(config.encoder, {key: shape for key, shape in keys.items() if not key.startswith("out.2.")}, False)
    found["out.2.positional_embedding"] = Piece("out.2.positional_embedding")
    for suffix, kind in (("weight", CONV_1D), ("bias", SAME)):
        for third, letter in enumerate("qkv"):
            found[f"out.2.to_{letter}.{suffix}"] = Piece(f"out.2.qkv_proj.{suffix}", kind, third)
        found[f"out.2.c_proj.{suffix}"] = Piece(f"out.2.c_proj.{suffix}", kind)
    return found


def original_config(found: Shapes, heads: Heads, place: object) -> UNet2DConfig:
    """The sizes of a UNet without cross-attention whose original tensors have the shapes `found`.

    Where residual blocks change the resolution their keys are as any other's; only that one stands behind another in
    the last block of each level on the way up tells how many levels there are.

    Raises:
        UserError: a tensor that says a size is missing.
    """
    sizes = OriginalSizes(found, place)
    blocks = sizes.count("output_blocks")
    samplers = [
        (f"output_blocks.{i}.{j}", kind) for i in range(blocks) for kind in ("in_layers.2", "conv") for j in (1, 2)
    ]
    raised = [kind for block, kind in samplers if f"{block}.{kind}.weight" in sizes]
    levels = len(raised) + 1
    if blocks % levels or blocks <= levels:
        raise UserError(f"{place} has {blocks} blocks on the way up, which are no {levels} levels of equal length")
    layers = blocks // levels - 1
    firsts = [1 + level * (layers + 1) for level in range(levels)]
    channels = tuple(sizes.axis(f"input_blocks.{i}.0.out_layers.3.weight", 0) for i in firsts)
    config_fields.check_levels(channels, str(place))
    if any(level % GROUPS for level in channels):
        raise UserError(f"{place} has a UNet of {list(channels)} channels; each must be a multiple of {GROUPS}")
    width = sizes.axis("time_embed.0.weight", 1)
    return UNet2DConfig(
        channels=channels,
        attention_levels=tuple(n for n, i in enumerate(firsts) if f"input_blocks.{i}.1.qkv.weight" in sizes),
        heads=tuple(map(heads.of, channels)),
        width=None if width == channels[0] else width,
        in_channels=sizes.axis("input_blocks.0.0.weight", 1),
        out_channels=sizes.axis("out.2.weight", 0),
        layers_per_block=layers,
        classes=sizes.axis("label_emb.weight", 0) if "label_emb.weight" in sizes else None,
        scale_shift=sizes.axis("input_blocks.1.0.emb_layers.1.weight", 0) == 2 * channels[0],
        resblock_updown="in_layers.2" in raised,
    )
