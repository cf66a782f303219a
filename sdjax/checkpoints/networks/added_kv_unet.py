"""The UNet of DeepFloyd IF and of Karlo's decoder as PyTorch diffusers stores it (`UNet2DConditionModel`)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax

from sdjax.checkpoints import config_fields, mapping
from sdjax.checkpoints.config_fields import Field
from sdjax.checkpoints.mapping import SAME, KeyMapping, KeyTable, at, conv, layer, norm
from sdjax.checkpoints.networks.blocks import ATTENTION, EMBEDDING_MLP, RESBLOCK
from sdjax.models.added_kv_unet import TEXT_GROUPS, AddedKVUNet, AddedKVUNetConfig

CLASS_NAME = "UNet2DConditionModel"
MIDDLE = "UNetMidBlock2DSimpleCrossAttn"
LEVELS = 1000  # of noise; the config does not say how many, since they are sinusoids
# Blocks by whether they have attention.
DOWN = {False: "ResnetDownsampleBlock2D", True: "SimpleCrossAttnDownBlock2D"}
UP = {False: "ResnetUpsampleBlock2D", True: "SimpleCrossAttnUpBlock2D"}

REQUIRED = {"mid_block_type": MIDDLE, "resnet_time_scale_shift": "scale_shift"}
ALLOWED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish", "gelu"),
    "addition_embed_type": (None, "text"),
    "class_embed_type": (None, "timestep", "identity"),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None, "group_norm"),
    "encoder_hid_dim_type": (None, "text_proj"),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "norm_eps": (1e-5,),
    "time_embedding_type": ("positional",),
}
ALLOWED |= dict.fromkeys(("center_input_sample", "class_embeddings_concat"), (False,))
ALLOWED |= dict.fromkeys(
    ("num_attention_heads", "num_class_embeds", "time_cond_proj_dim", "timestep_post_act"), (None,)
)
FIELDS = (
    Field("text_dim", "encoder_hid_dim", None),
    Field("embedding_dim", "time_embedding_dim", None),
    Field("cross_only", "only_cross_attention", False),
    Field("activated", "resnet_skip_time_act", False),
    Field("output_divisor", "resnet_out_scale_factor", 1.0),
    Field("in_channels", "in_channels", 4),
    Field("out_channels", "out_channels", 4),
    Field("groups", "norm_num_groups", 32),
)

_ATTENTION = (*norm("group_norm"), *norm("norm_cross"), *layer("add_k_proj"), *layer("add_v_proj"), *ATTENTION)
POOLING = (
    *norm("norm1"),
    KeyMapping("positional_embedding", "pool.positional_embedding", SAME),
    *(row for name in ("q_proj", "k_proj", "v_proj") for row in layer(name, f"pool.{name}")),
    *layer("proj"),
    *norm("norm2"),
)


def _side(blocks: str, resampler: str) -> tuple[KeyMapping, ...]:
    return (
        *at(f"{blocks}_*_resnets_*", f"{blocks}.*.resnets.*", RESBLOCK),
        *at(f"{blocks}_*_attentions_*", f"{blocks}.*.attentions.*", _ATTENTION),
        *at(f"{blocks}_*_{resampler}_*", f"{blocks}.*.{resampler}.*", RESBLOCK),
    )


TABLE = KeyTable(
    (
        *at("time_embedding", "time_embedding", EMBEDDING_MLP),
        *at("class_embedding", "class_embedding", EMBEDDING_MLP),
        *at("add_embedding", "add_embedding", POOLING),
        *layer("encoder_hid_proj"),
        *conv("conv_in"),
        *_side("down_blocks", "downsamplers"),
        *at("mid_block_resnets_*", "mid_block.resnets.*", RESBLOCK),
        *at("mid_block_attentions_*", "mid_block.attentions.*", _ATTENTION),
        *_side("up_blocks", "upsamplers"),
        *norm("conv_norm_out"),
        *conv("conv_out"),
    )
)


@functools.cache
def shapes(config: AddedKVUNetConfig) -> dict[str, Any]:
    """The parameters as a tree of `jax.ShapeDtypeStruct`; traced once a config, and shared: not to be changed."""
    return mapping.traced(AddedKVUNet(config).init, *jax.eval_shape(config.example_inputs))


def is_added_kv(config: Mapping[str, Any]) -> bool:
    """Tell whether a config of diffusers' class means this UNet, not Stable Diffusion's."""
    return config.get("mid_block_type") == MIDDLE


def from_diffusers_config(config: Mapping[str, Any], place: str = "unet/config.json") -> AddedKVUNetConfig:
    """Sizes from a config.json; a missing key means what it means to diffusers.

    Raises:
        UserError: a value asks for a structure that `AddedKVUNet` does not have.
    """
    for key, wanted in REQUIRED.items():
        if config.get(key) != wanted:
            raise config_fields.unsupported(config, key, place, repr(wanted))
    config_fields.check(config, ALLOWED, place)
    channels = config_fields.integers(config, "block_out_channels", (320, 640, 1280, 1280), 0, place)
    levels = len(channels)
    sides = (("down_block_types", DOWN, []), ("up_block_types", UP, []))
    attends = config_fields.attention_levels(config, sides, levels, place)
    sizes = config_fields.read_fields(config, FIELDS, place)
    config_fields.check_groups(sizes["groups"], channels, place)
    _check_pairs(config, sizes, place)
    kind = config.get("class_embed_type")
    made = AddedKVUNetConfig(
        channels=channels,
        layers=config_fields.integers(config, "layers_per_block", 2, levels, place),
        attention_levels=tuple(level for level, here in enumerate(attends) if here),
        head_width=_equal(config, "attention_head_dim", 8, levels, place),
        cross_dim=_equal(config, "cross_attention_dim", 1280, levels, place),
        pool_heads=_pool_heads(config, place),
        classes=LEVELS if kind == "timestep" else None,
        takes_vector=kind == "identity",
        text_norm=config.get("cross_attention_norm") is not None,
        activation="gelu" if config.get("act_fn") == "gelu" else "silu",
        **sizes,
    )
    _check_widths(config, made, place)
    return made


def _equal(config: Mapping[str, Any], key: str, default: int, levels: int, place: str) -> int:
    """A size that is the same at every level."""
    values = config_fields.integers(config, key, default, levels, place)
    if len(set(values)) > 1:
        raise config_fields.unsupported(config, key, place, "the same at every level")
    return values[0]


def _pool_heads(config: Mapping[str, Any], place: str) -> int | None:
    if config.get("addition_embed_type") is None:
        return None
    return config_fields.integer(config, "addition_embed_type_num_heads", 64, place)


def _check_pairs(config: Mapping[str, Any], sizes: Mapping[str, Any], place: str) -> None:
    """Hold to each other keys that IF's configs have together."""
    act = config.get("act_fn", "silu")
    pairs = {
        "time_embedding_act_fn": (None, act if sizes["activated"] else None, "resnet_skip_time_act"),
        "mid_block_scale_factor": (1.0, sizes["output_divisor"], "resnet_out_scale_factor"),
    }
    for key, (default, wanted, beside) in pairs.items():
        if config.get(key, default) != wanted:
            raise config_fields.unsupported(config, key, place, f"{wanted!r} beside its {beside}")
    key = "mid_block_only_cross_attention"
    if config.get(key) not in (None, sizes["cross_only"]):
        raise config_fields.unsupported(config, key, place, "null, or as only_cross_attention")


def _check_widths(config: Mapping[str, Any], sizes: AddedKVUNetConfig, place: str) -> None:
    """Hold heads and the text's groups to divisors of what they divide."""
    attending = [sizes.channels[level] for level in (*sizes.attention_levels, -1)]
    heads = sizes.pool_heads or 1
    faults = {
        "attention_head_dim": (any(c % sizes.head_width for c in attending), f"a divisor of each of {attending}"),
        "addition_embed_type_num_heads": (sizes.context_dim % heads, f"a divisor of {sizes.context_dim}"),
        "cross_attention_dim": (sizes.text_norm and sizes.cross_dim % TEXT_GROUPS, f"a multiple of {TEXT_GROUPS}"),
    }
    for key, (is_wrong, wanted) in faults.items():
        if is_wrong:
            raise config_fields.unsupported(config, key, place, wanted)


def to_diffusers_config(config: AddedKVUNetConfig) -> dict[str, Any]:
    """The config.json of a UNet, without what the sizes do not say (`sample_size`)."""
    attends = [level in config.attention_levels for level in range(len(config.channels))]
    kind = "identity" if config.takes_vector else None if config.classes is None else "timestep"
    return {
        **config_fields.write_fields(config, FIELDS),
        **REQUIRED,
        "_class_name": CLASS_NAME,
        "act_fn": config.activation,
        "addition_embed_type": None if config.pool_heads is None else "text",
        "addition_embed_type_num_heads": config.pool_heads or 64,
        "attention_head_dim": config.head_width,
        "block_out_channels": list(config.channels),
        "class_embed_type": kind,
        "cross_attention_dim": config.cross_dim,
        "cross_attention_norm": "group_norm" if config.text_norm else None,
        "down_block_types": [DOWN[here] for here in attends],
        "encoder_hid_dim_type": None if config.text_dim is None else "text_proj",
        "layers_per_block": list(config.layers),
        "mid_block_scale_factor": config.output_divisor,
        "time_embedding_act_fn": config.activation if config.activated else None,
        "up_block_types": [UP[here] for here in reversed(attends)],
    }
