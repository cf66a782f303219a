"""The networks that the conditions of LDM's models go through: its text encoder, class embedder, label map rescaler.

The first is stored as PyTorch diffusers does (`LDMBertModel`), or as LDM does (x-transformers); the others under the
keys, and with the sizes' names, of LDM's checkpoints and configs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.checkpoints import config_fields, mapping
from sdjax.checkpoints.config_fields import MAX_LEVELS, Field
from sdjax.checkpoints.mapping import POINTWISE, KeyMapping, KeyTable, Shapes, at, embedding, layer, norm, renamed
from sdjax.checkpoints.original_keys import OriginalSizes, Piece
from sdjax.models.bert import Bert, BertConfig
from sdjax.models.embedders import ClassEmbedder, ClassEmbedderConfig, Rescaler, RescalerConfig

BERT_ALLOWED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu",),
    "model_type": ("ldmbert",),
    "scale_embedding": (False,),
}
BERT_FIELDS = (
    Field("vocab_size", "vocab_size", 30522),
    Field("width", "d_model", 1280),
    Field("layers", "encoder_layers", 32),
    Field("heads", "encoder_attention_heads", 8),
    Field("head_size", "head_dim", 64),
    Field("max_length", "max_position_embeddings", 77),
)
CLASS_FIELDS = (Field("classes", "n_classes", 1000), Field("width", "embed_dim", 512))
RESCALER_FIELDS = (
    Field("classes", "in_channels", 182),
    Field("stages", "n_stages", 2, MAX_LEVELS),
    Field("features", "out_channels", 3),
)
BERT_LAYER = (
    *norm("layer_norm1", "self_attn_layer_norm"),
    *layer("self_attn/to_q", "self_attn.q_proj"),
    *layer("self_attn/to_k", "self_attn.k_proj"),
    *layer("self_attn/to_v", "self_attn.v_proj"),
    *layer("self_attn/to_out", "self_attn.out_proj"),
    *norm("layer_norm2", "final_layer_norm"),
    *layer("fc1"),
    *layer("fc2"),
)
BERT_TABLE = KeyTable(
    rows=(
        *embedding("token_embedding", "model.embed_tokens"),
        *embedding("position_embedding", "model.embed_positions"),
        *at("layers_*", "model.layers.*", BERT_LAYER),
        *norm("final_layer_norm", "model.layer_norm"),
    ),
    ignored=(r"to_logits\..*",),  # of a language model, which nobody trained it as
)
CLASS_TABLE = KeyTable(embedding("embedding", "embedding"))
RESCALER_TABLE = KeyTable((KeyMapping("channel_mapper/kernel", "channel_mapper.weight", POINTWISE),))


@functools.cache
def bert_shapes(config: BertConfig) -> dict[str, Any]:
    """The parameters as a tree of `jax.ShapeDtypeStruct`; traced once a config, and shared: not to be changed."""
    return mapping.traced(Bert(config).init, jnp.zeros((1, 1), jnp.int32))


@functools.cache
def class_shapes(config: ClassEmbedderConfig) -> dict[str, Any]:
    """The same of a class embedder."""
    return mapping.traced(ClassEmbedder(config).init, jnp.zeros(1, jnp.int32))


@functools.cache
def rescaler_shapes(config: RescalerConfig) -> dict[str, Any]:
    """The same of a rescaler."""
    labels = jax.ShapeDtypeStruct((1, 2**config.stages, 2**config.stages), jnp.int32)
    return mapping.traced(Rescaler(config).init, labels)


def bert_from_config(config: Mapping[str, Any], place: str = "bert/config.json") -> BertConfig:
    """Sizes from a config.json; a missing key means what it means to diffusers.

    Raises:
        UserError: a value asks for a structure that `Bert` does not have.
    """
    config_fields.check(config, BERT_ALLOWED, place)
    sizes = BertConfig(**config_fields.read_fields(config, BERT_FIELDS, place))
    if config.get("encoder_ffn_dim", 5120) != sizes.feed_forward:
        wanted = f"four times d_model, {sizes.feed_forward}"
        raise config_fields.unsupported(config, "encoder_ffn_dim", place, wanted)
    return sizes


def bert_to_config(config: BertConfig) -> dict[str, Any]:
    """The config.json of a text encoder."""
    fixed = {"activation_function": "gelu", "architectures": ["LDMBertModel"], "model_type": "ldmbert"}
    return {**config_fields.write_fields(config, BERT_FIELDS), **fixed, "encoder_ffn_dim": config.feed_forward}


def class_from_config(config: Mapping[str, Any], place: str = "class_embedder/config.json") -> ClassEmbedderConfig:
    """Sizes from a config.json."""
    return ClassEmbedderConfig(**config_fields.read_fields(config, CLASS_FIELDS, place))


def class_to_config(config: ClassEmbedderConfig) -> dict[str, Any]:
    """The config.json of a class embedder."""
    return {"_class_name": "ClassEmbedder", **config_fields.write_fields(config, CLASS_FIELDS)}


def rescaler_from_config(config: Mapping[str, Any], place: str = "rescaler/config.json") -> RescalerConfig:
    """Sizes from a config.json."""
    return RescalerConfig(**config_fields.read_fields(config, RESCALER_FIELDS, place))


def rescaler_to_config(config: RescalerConfig) -> dict[str, Any]:
    """The config.json of a rescaler."""
    return {"_class_name": "SpatialRescaler", **config_fields.write_fields(config, RESCALER_FIELDS)}


# In x-transformers attention and feed-forward are layers of their own, in turns.
HALVES = (
    {"self_attn_layer_norm": "0", "self_attn.out_proj": "1.to_out"}
    | {f"self_attn.{letter}_proj": f"1.to_{letter}" for letter in "qkv"},
    {"final_layer_norm": "0", "fc1": "1.net.0.0", "fc2": "1.net.2"},
)
BERT_ENDS = {"embed_tokens": "token_emb", "embed_positions": "pos_emb.emb", "layer_norm": "norm"}


def bert_pieces(config: BertConfig) -> dict[str, Piece]:
    """The place of every tensor below LDM's `cond_stage_model.transformer.`, by diffusers' key."""
    modules = {f"model.{theirs}": ours for theirs, ours in BERT_ENDS.items()}
    for number in range(2 * config.layers):
        for theirs, ours in HALVES[number % 2].items():
            modules[f"model.layers.{number // 2}.{theirs}"] = f"attn_layers.layers.{number}.{ours}"
    return {key: Piece(renamed(key, modules)) for key in mapping.stored_shapes(BERT_TABLE, bert_shapes(config))}


def original_bert(found: Shapes, place: object) -> BertConfig:
    """The sizes of LDM's text encoder whose original tensors have the shapes `found`; it has eight heads.

    Raises:
        UserError: a tensor that says a size is missing.
    """
    sizes = OriginalSizes(found, place)
    return BertConfig(
        vocab_size=sizes.axis("token_emb.weight", 0),
        width=sizes.axis("token_emb.weight", 1),
        layers=sizes.count("attn_layers.layers") // 2,
        heads=BertConfig.heads,
        head_size=sizes.axis("attn_layers.layers.0.1.to_q.weight", 0) // BertConfig.heads,
        max_length=sizes.axis("pos_emb.emb.weight", 0),
    )


def original_class_embedder(found: Shapes, place: object) -> ClassEmbedderConfig:
    """The same of a class embedder."""
    sizes = OriginalSizes(found, place)
    return ClassEmbedderConfig(sizes.axis("embedding.weight", 0), sizes.axis("embedding.weight", 1))


def original_rescaler(found: Shapes, factor: int, place: object) -> RescalerConfig:
    """The same of a rescaler to latents that are `factor` times smaller than the image."""
    sizes, key = OriginalSizes(found, place), "channel_mapper.weight"
    return RescalerConfig(sizes.axis(key, 1), int(math.log2(factor)), sizes.axis(key, 0))
