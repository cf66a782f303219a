"""CLIP's image tower as Hugging Face transformers stores it (`CLIPModel`, `CLIPVisionModelWithProjection`)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.checkpoints import config_fields, mapping
from sdjax.checkpoints.config_fields import MAX_SIDE, Field
from sdjax.checkpoints.mapping import CONV, SAME, KeyMapping, KeyTable, at, embedding, layer, norm
from sdjax.checkpoints.networks.blocks import TRANSFORMER_LAYER
from sdjax.models.clip_image import CLIPImage, CLIPImageConfig

CLASS_NAME = "CLIPVisionModelWithProjection"
ALLOWED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("quick_gelu", "gelu"),
    "layer_norm_eps": (1e-5,),
    "num_channels": (3,),
}
FIELDS = (
    Field("size", "image_size", 224, MAX_SIDE),
    Field("patch", "patch_size", 32),
    Field("width", "hidden_size", 768),
    Field("layers", "num_hidden_layers", 12),
    Field("heads", "num_attention_heads", 12),
    Field("feed_forward", "intermediate_size", 3072),
    Field("activation", "hidden_act", "quick_gelu"),
    Field("projection_dim", "projection_dim", 512),
)
TABLE = KeyTable(
    rows=(
        KeyMapping("class_embedding", "vision_model.embeddings.class_embedding", SAME),
        KeyMapping("patch_embedding/kernel", "vision_model.embeddings.patch_embedding.weight", CONV),
        *embedding("position_embedding", "vision_model.embeddings.position_embedding"),
        *norm("pre_layrnorm", "vision_model.pre_layrnorm"),
        *at("layers_*", "vision_model.encoder.layers.*", TRANSFORMER_LAYER),
        *norm("post_layernorm", "vision_model.post_layernorm"),
        *layer("visual_projection"),
    ),
    # transformers 5 names a bare tower's parameters without the prefix.
    aliases=((r"^(embeddings|encoder|pre_layrnorm|post_layernorm)\.", r"vision_model.\1."),),
    ignored=(r"(vision_model\.)?embeddings\.position_ids", r"text_model\..*", r"text_projection\..*", r"logit_scale"),
)


@functools.cache
def shapes(config: CLIPImageConfig) -> dict[str, Any]:
    """The parameters as a tree of `jax.ShapeDtypeStruct`; traced once a config, and shared: not to be changed."""
    images = jax.ShapeDtypeStruct((1, config.size, config.size, 3), jnp.float32)
    return mapping.traced(CLIPImage(config).init, images)


def from_config(config: Mapping[str, Any], place: str) -> CLIPImageConfig:
    """Sizes from the config.json of a tower, or of a whole CLIP; a missing key means what it means to transformers.

    Raises:
        UserError: a value asks for a structure that `CLIPImage` does not have.
    """
    tower = {"projection_dim": config.get("projection_dim", 512), **config.get("vision_config", config)}
    if "vision_config" in config:
        tower["projection_dim"] = config.get("projection_dim", 512)
    config_fields.check(tower, ALLOWED, place)
    sizes = CLIPImageConfig(**config_fields.read_fields(tower, FIELDS, place))
    if sizes.patch > sizes.size:
        raise config_fields.unsupported(tower, "patch_size", place, f"at most image_size, {sizes.size}")
    return sizes


def to_config(config: CLIPImageConfig) -> dict[str, Any]:
    """The config.json of a tower."""
    fixed = {"architectures": [CLASS_NAME], "model_type": "clip_vision_model", "layer_norm_eps": 1e-5}
    return {**config_fields.write_fields(config, FIELDS), **fixed}
