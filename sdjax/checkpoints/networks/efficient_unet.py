"""Imagen's Efficient U-Net as this project stores it: nobody else has a class or published weights of it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax

from sdjax.checkpoints import config_fields, mapping
from sdjax.checkpoints.config_fields import Field
from sdjax.checkpoints.mapping import KeyMapping, KeyTable, at, conv, layer, norm
from sdjax.checkpoints.networks.added_kv_unet import POOLING
from sdjax.checkpoints.networks.blocks import ATTENTION_BLOCK, EMBEDDING_MLP, RESBLOCK
from sdjax.models.efficient_unet import EfficientUNet, EfficientUNetConfig

CLASS_NAME = "EfficientUNet"
FIELDS = (
    *(Field(name, name, size) for name, size in (("first", 128), ("heads", 8), ("head_width", 64), ("groups", 32))),
    *(Field(name, name, size) for name, size in (("text_dim", 4096), ("cross_dim", 512), ("pool_heads", 64))),
    *(Field(name, name, size) for name, size in (("in_channels", 6), ("out_channels", 3))),
    Field("classes", "classes", None),
)
ATTENTION = ("self_attention", "text_attention")


def _side(blocks: str) -> tuple[KeyMapping, ...]:
    return (
        *conv(f"{blocks}_*_conv", f"{blocks}.*.conv"),
        *layer(f"{blocks}_*_emb_proj", f"{blocks}.*.emb_proj"),
        *at(f"{blocks}_*_resnets_*", f"{blocks}.*.resnets.*", RESBLOCK),
        *(row for name in ATTENTION for row in at(f"{blocks}_*_{name}", f"{blocks}.*.{name}", ATTENTION_BLOCK)),
    )


TABLE = KeyTable(
    (
        *at("time_embedding", "time_embedding", EMBEDDING_MLP),
        *at("class_embedding", "class_embedding", EMBEDDING_MLP),
        *at("add_embedding", "add_embedding", POOLING),
        *norm("text_norm"),
        *layer("text_proj"),
        *conv("conv_in"),
        *_side("down_blocks"),
        *_side("up_blocks"),
        *layer("conv_out"),
    )
)


@functools.cache
def shapes(config: EfficientUNetConfig) -> dict[str, Any]:
    """The parameters as a tree of `jax.ShapeDtypeStruct`; traced once a config, and shared: not to be changed."""
    return mapping.traced(EfficientUNet(config).init, *jax.eval_shape(config.example_inputs))


def from_diffusers_config(config: Mapping[str, Any], place: str = "unet/config.json") -> EfficientUNetConfig:
    """Sizes from a config.json.

    Raises:
        UserError: a value is none, or levels with attention are not one a level.
    """
    channels = config_fields.integers(config, "channels", EfficientUNetConfig.channels, 0, place)
    levels = {name: _levels(config, name, len(channels), place) for name in ATTENTION}
    sizes = config_fields.read_fields(config, FIELDS, place)
    config_fields.check_groups(sizes["groups"], channels, place)
    layers = config_fields.integers(config, "layers", EfficientUNetConfig.layers, len(channels), place)
    if sizes["text_dim"] % sizes["pool_heads"]:
        raise config_fields.unsupported(config, "pool_heads", place, f"a divisor of {sizes['text_dim']}")
    return EfficientUNetConfig(channels=channels, layers=layers, **levels, **sizes)


def _levels(config: Mapping[str, Any], key: str, levels: int, place: str) -> tuple[int, ...]:
    """Numbers of the levels with attention; a config.json says of each whether it has."""
    values = config.get(key)
    if not isinstance(values, list) or len(values) != levels or any(type(value) is not bool for value in values):
        raise config_fields.unsupported(config, key, place, f"{levels} of true and false")
    return tuple(level for level, here in enumerate(values) if here)


def to_diffusers_config(config: EfficientUNetConfig) -> dict[str, Any]:
    """The config.json of a UNet, without what the sizes do not say (`sample_size`)."""
    levels = range(len(config.channels))
    return {
        "_class_name": CLASS_NAME,
        **config_fields.write_fields(config, FIELDS),
        "channels": list(config.channels),
        "layers": list(config.layers),
        **{name: [level in getattr(config, name) for level in levels] for name in ATTENTION},
    }
