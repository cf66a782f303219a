"""The UNet of Stable Diffusion 1, 2 and XL as PyTorch diffusers stores it (`UNet2DConditionModel`), and as LDM does."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from sdjax.checkpoints import config_fields, mapping
from sdjax.checkpoints.config_fields import Field
from sdjax.checkpoints.mapping import (
    LINEAR,
    POINTWISE,
    KeyMapping,
    KeyTable,
    Shapes,
    at,
    conv,
    embedding,
    layer,
    norm,
    renamed,
)
from sdjax.checkpoints.networks.blocks import EMBEDDING_MLP, RESBLOCK, TRANSFORMER_BLOCK, original_modules
from sdjax.checkpoints.original_keys import GROUPS, Heads, OriginalSizes, Piece
from sdjax.core.errors import UserError
from sdjax.models.unet import UNet, UNetConfig

CLASS_NAME = "UNet2DConditionModel"
# Blocks by whether they have transformers.
DOWN = {False: "DownBlock2D", True: "CrossAttnDownBlock2D"}
UP = {False: "UpBlock2D", True: "CrossAttnUpBlock2D"}
SIDES = (
    ("down_block_types", DOWN, [DOWN[True]] * 3 + [DOWN[False]]),
    ("up_block_types", UP, [UP[False]] + [UP[True]] * 3),
)
SIZE_WIDTH = "addition_time_embed_dim"
"""SDXL's sinusoidal features of each size and crop: 256, and fewer in small models. They are made outside of the
network, so its sizes do not tell, and a config.json's own value is kept."""
GUIDANCE = "time_embed.cond_proj.weight"  # of latent consistency models, which are conditioned on the guidance scale
DEFAULT_CHANNELS = (320, 640, 1280, 1280)
VECTOR_DIM = "projection_class_embeddings_input_dim"

ALLOWED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False, True),  # read by another mid_block_type only
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
}
ALLOWED |= dict.fromkeys(
    ("center_input_sample", "class_embeddings_concat", "dual_cross_attention", "resnet_skip_time_act"), (False,)
)
ALLOWED |= dict.fromkeys(
    ("class_embed_type", "cross_attention_norm", "encoder_hid_dim", "encoder_hid_dim_type", "num_attention_heads"),
    (None,),
)
ALLOWED |= dict.fromkeys(("time_embedding_act_fn", "timestep_post_act"), (None,))
FIELDS = (
    Field("classes", "num_class_embeds", None),
    Field("guidance_dim", "time_cond_proj_dim", None),
    Field("linear_projection", "use_linear_projection", False),
    Field("in_channels", "in_channels", 4),
    Field("out_channels", "out_channels", 4),
    Field("groups", "norm_num_groups", 32),
)


def table(config: UNetConfig) -> KeyTable:
    """Rows for this config: only the projections around the transformers depend on it."""
    projection = LINEAR if config.linear_projection else POINTWISE
    transformer = (
        *norm("norm"),
        *layer("proj_in", kind=projection),
        *at("transformer_blocks_*", "transformer_blocks.*", TRANSFORMER_BLOCK),
        *layer("proj_out", kind=projection),
    )
    blocks: tuple[KeyMapping, ...] = (
        *at("mid_block_resnets_*", "mid_block.resnets.*", RESBLOCK),
        *at("mid_block_attentions_*", "mid_block.attentions.*", transformer),
        *conv("down_blocks_*_downsamplers_*/conv", "down_blocks.*.downsamplers.*.conv"),
        *conv("up_blocks_*_upsamplers_*/conv", "up_blocks.*.upsamplers.*.conv"),
    )
    for side in ("down_blocks", "up_blocks"):
        blocks += at(f"{side}_*_resnets_*", f"{side}.*.resnets.*", RESBLOCK)
        blocks += at(f"{side}_*_attentions_*", f"{side}.*.attentions.*", transformer)
    return KeyTable(
        (
            *at("time_embedding", "time_embedding", EMBEDDING_MLP),
            *at("add_embedding", "add_embedding", EMBEDDING_MLP),
            *embedding("class_embedding", "class_embedding"),
            *conv("conv_in"),
            *blocks,
            *norm("conv_norm_out"),
            *conv("conv_out"),
        )
    )


@functools.cache
def shapes(config: UNetConfig) -> dict[str, Any]:
    """The parameters as a tree of `jax.ShapeDtypeStruct`; traced once a config, and shared: not to be changed."""
    return mapping.traced(UNet(config).init, *jax.eval_shape(config.example_inputs))


def from_diffusers_config(
    config: Mapping[str, Any], place: str = "unet/config.json", sides: Sequence[Any] = SIDES
) -> UNetConfig:
    """Sizes from a config.json; a missing key means what it means to diffusers.

    diffusers' `attention_head_dim` is the number of heads of each level (huggingface/diffusers issue 2011).

    Args:
        sides: as of `config_fields.attention_levels`; a ControlNet has only the first.

    Raises:
        UserError: a value asks for a structure that `UNet` does not have.
    """
    channels = config_fields.integers(config, "block_out_channels", DEFAULT_CHANNELS, 0, place)
    config_fields.check(config, ALLOWED | {"time_embedding_dim": (None, 4 * channels[0])}, place)
    levels = len(channels)
    crossed = config_fields.attention_levels(config, sides, levels, place)
    depths = _depths(config, crossed, place)
    heads = config_fields.integers(config, "attention_head_dim", 8, levels, place)
    _check_heads(heads, channels, crossed, place)
    equal = {}
    for key, default in (("cross_attention_dim", 1280), ("layers_per_block", 2)):
        equal[key] = config_fields.integers(config, key, default, levels, place)
        if len(set(equal[key])) > 1:
            raise config_fields.unsupported(config, key, place, "the same at every level")
    only = config.get("only_cross_attention", False)  # without self-attention; counted from the finest on both sides
    only = [only] * levels if isinstance(only, bool) else only
    if not isinstance(only, list | tuple) or len(only) != levels or any(type(here) is not bool for here in only):
        raise config_fields.unsupported(config, "only_cross_attention", place, f"True or False or {levels} of them")
    vector_dim = None
    if config.get("addition_embed_type") is not None:
        if config.get(VECTOR_DIM) is None:
            raise config_fields.unsupported(
                config, VECTOR_DIM, place, "a positive integer where addition_embed_type is 'text_time'"
            )
        vector_dim = config_fields.integer(config, VECTOR_DIM, 0, place)
        config_fields.integer({SIZE_WIDTH: 256, **config}, SIZE_WIDTH, 256, place)
    sizes = config_fields.read_fields(config, FIELDS, place)
    config_fields.check_groups(sizes["groups"], channels, place)
    return UNetConfig(
        channels=channels,
        depths=tuple(depth if here else 0 for depth, here in zip(depths, crossed, strict=True)),
        mid_depth=depths[-1],
        heads=heads,
        context_dim=equal["cross_attention_dim"][0],
        vector_dim=vector_dim,
        cross_only=tuple(level for level in range(levels) if only[level] and crossed[level]),
        layers_per_block=equal["layers_per_block"][0],
        **sizes,
    )


def _check_heads(heads: Sequence[int], channels: Sequence[int], crossed: Sequence[bool], place: object) -> None:
    if any(c % h for c, h, here in zip(channels, heads, (*crossed[:-1], True), strict=True) if here):
        key, wanted = "attention_head_dim", f"divisors of the channels {list(channels)}"
        raise config_fields.unsupported({key: list(heads)}, key, str(place), wanted)


def _depths(config: Mapping[str, Any], crossed: Sequence[bool], place: str) -> tuple[int, ...]:
    """Transformer blocks of each level, the last one's being the middle's too; a level without them may say 0."""
    key, mirrored = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
    said = config.get(key, 1)
    if isinstance(said, list | tuple) and len(said) == len(crossed):
        used = [*crossed[:-1], True]
        said = [depth if here or depth != 0 else 1 for depth, here in zip(said, used, strict=True)]
    depths = config_fields.integers({**config, key: said}, key, 1, len(crossed), place)
    if config.get(mirrored) not in (None, list(reversed(depths))):
        raise config_fields.unsupported(config, mirrored, place, f"None or the mirror image of {key}")
    return depths


def to_diffusers_config(config: UNetConfig) -> dict[str, Any]:
    """The config.json of a UNet, without what the sizes do not say (`sample_size`, `upcast_attention`).

    Raises:
        UserError: diffusers cannot express it: its middle block has as many transformers as the last level.
    """
    if config.mid_depth == 0 or config.depths[-1] not in (0, config.mid_depth):
        raise UserError(f"diffusers has no UNet with depths {config.depths} and mid_depth {config.mid_depth}")
    crossed = [bool(depth) for depth in config.depths]
    added: dict[str, Any] = {"addition_embed_type": None}
    if config.vector_dim is not None:
        added = {"addition_embed_type": "text_time", SIZE_WIDTH: 256}
        added[VECTOR_DIM] = config.vector_dim
    if config.cross_only:
        added["only_cross_attention"] = [level in config.cross_only for level in range(len(crossed))]
    return {
        **added,
        **config_fields.write_fields(config, FIELDS),
        "_class_name": CLASS_NAME,
        "attention_head_dim": list(config.heads),
        "block_out_channels": list(config.channels),
        "cross_attention_dim": config.context_dim,
        "down_block_types": [DOWN[here] for here in crossed],
        "layers_per_block": config.layers_per_block,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "transformer_layers_per_block": [depth or 1 for depth in config.depths[:-1]] + [config.mid_depth],
        "up_block_types": [UP[here] for here in reversed(crossed)],
    }


def pieces(config: UNetConfig) -> dict[str, Piece]:
    """The place of every tensor in the original layout, by diffusers' key."""
    modules = original_modules([depth > 0 for depth in config.depths], config.layers_per_block)
    return {key: Piece(renamed(key, modules)) for key in mapping.stored_shapes(table(config), shapes(config))}


def original_config(found: Shapes, heads: Heads, place: object) -> UNetConfig:
    """The sizes of a UNet whose original tensors have the shapes `found`.

    Raises:
        UserError: a tensor that says a size is missing, or the levels are not alike.
    """
    sizes, levels = OriginalSizes(found, place), [[]]
    for i in range(1, sizes.count("input_blocks")):  # of each level its residual blocks: (channels, depth)
        if f"input_blocks.{i}.0.op.weight" in sizes:
            levels.append([])
        else:
            depth = sizes.count(f"input_blocks.{i}.1.transformer_blocks")
            levels[-1].append((sizes.axis(f"input_blocks.{i}.0.out_layers.3.weight", 0), depth))
    if not all(levels):
        raise UserError(f"{place} lacks residual blocks of its UNet")
    if len({len(level) for level in levels}) > 1 or any(len(set(level)) > 1 for level in levels):
        raise UserError(f"{place} has levels of unlike blocks (a distilled or pruned model), which are not supported")
    channels, depths = zip(*(level[0] for level in levels), strict=True)
    mid_depth = sizes.count("middle_block.1.transformer_blocks")
    if depths[-1] not in (0, mid_depth) or mid_depth == 0:
        raise UserError(f"{place} has depths {list(depths)} and {mid_depth} in the middle, which is not supported")
    config_fields.check_groups(GROUPS, channels, str(place))
    found_heads = tuple(map(heads.of, channels))
    _check_heads(found_heads, channels, depths, place)
    classes = sizes.axis("label_emb.weight", 0) if "label_emb.weight" in sizes else None
    last = len(channels) - 1
    return UNetConfig(
        channels=channels,
        depths=depths,
        mid_depth=mid_depth,
        heads=found_heads,
        context_dim=sizes.axis("middle_block.1.transformer_blocks.0.attn2.to_k.weight", 1),
        vector_dim=sizes.axis("label_emb.0.0.weight", 1) if "label_emb.0.0.weight" in sizes else None,
        guidance_dim=sizes.axis(GUIDANCE, 1) if GUIDANCE in sizes else None,
        classes=classes,
        # The x4 upscaler, which alone has classes, has no self-attention but at the coarsest level.
        cross_only=tuple(level for level in range(last) if classes and depths[level]),
        linear_projection=sizes.rank("middle_block.1.proj_in.weight") == 2,
        in_channels=sizes.axis("input_blocks.0.0.weight", 1),
        out_channels=sizes.axis("out.2.weight", 0),
        layers_per_block=len(levels[0]),
    )
