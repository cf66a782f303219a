"""LDM's class embedder and label map rescaler, under the keys that they have in its checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.convert import configs
from sdjax.convert.rules import POINTWISE, Row, Table, embedding
from sdjax.models.embedders import ClassEmbedder, ClassEmbedderConfig, Rescaler, RescalerConfig

CLASSES = Table(embedding("embedding", "embedding"))
RESCALER = Table((Row("channel_mapper/kernel", "channel_mapper.weight", POINTWISE),))


@functools.cache
def class_shapes(config: ClassEmbedderConfig) -> dict[str, Any]:
    """The parameters as a tree of `jax.ShapeDtypeStruct`; shared: not to be changed."""
    return jax.eval_shape(ClassEmbedder(config).init, jax.random.key(0), jnp.zeros(1, jnp.int32))["params"]


@functools.cache
def rescaler_shapes(config: RescalerConfig) -> dict[str, Any]:
    """The parameters as a tree of `jax.ShapeDtypeStruct`; shared: not to be changed."""
    side = 2**config.stages
    return jax.eval_shape(Rescaler(config).init, jax.random.key(0), jnp.zeros((1, side, side), jnp.int32))["params"]


def class_config(config: Mapping[str, Any], place: str = "class_embedder/config.json") -> ClassEmbedderConfig:
    """Sizes from a config.json, whose keys are LDM's."""
    return ClassEmbedderConfig(
        classes=configs.integer(config, "n_classes", 1000, place),
        width=configs.integer(config, "embed_dim", 512, place),
    )


def to_class_config(config: ClassEmbedderConfig) -> dict[str, Any]:
    """The config.json of a class embedder."""
    return {"_class_name": "ClassEmbedder", "n_classes": config.classes, "embed_dim": config.width}


def rescaler_config(config: Mapping[str, Any], place: str = "rescaler/config.json") -> RescalerConfig:
    """Sizes from a config.json, whose keys are LDM's."""
    return RescalerConfig(
        classes=configs.integer(config, "in_channels", 182, place),
        stages=configs.integer(config, "n_stages", 2, place),
        features=configs.integer(config, "out_channels", 3, place),
    )


def to_rescaler_config(config: RescalerConfig) -> dict[str, Any]:
    """The config.json of a rescaler."""
    return {
        "_class_name": "SpatialRescaler",
        "in_channels": config.classes,
        "n_stages": config.stages,
        "out_channels": config.features,
    }
