"""LDM's text encoder as PyTorch diffusers stores it (`LDMBertModel`), and as LDM does (x-transformers)."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.convert import configs
from sdjax.convert.rules import Stored, Table, at, embedding, layer, norm
from sdjax.core.errors import UserError
from sdjax.models.bert import Bert, BertConfig

CLASS_NAME = "LDMBertModel"
ALLOWED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu",),
    "model_type": ("ldmbert",),
    "scale_embedding": (False,),
}
LAYER = (
    *norm("layer_norm1", "self_attn_layer_norm"),
    *layer("self_attn/to_q", "self_attn.q_proj"),
    *layer("self_attn/to_k", "self_attn.k_proj"),
    *layer("self_attn/to_v", "self_attn.v_proj"),
    *layer("self_attn/to_out", "self_attn.out_proj"),
    *norm("layer_norm2", "final_layer_norm"),
    *layer("fc1"),
    *layer("fc2"),
)
TABLE = Table(
    rows=(
        *embedding("token_embedding", "model.embed_tokens"),
        *embedding("position_embedding", "model.embed_positions"),
        *at("layers_*", "model.layers.*", LAYER),
        *norm("final_layer_norm", "model.layer_norm"),
    ),
    ignored=(r"to_logits\..*",),  # of a language model, which nobody trained it as
)
# Below `cond_stage_model.transformer.`: attention and feed-forward are layers of their own, in turns.
ORIGINAL = (
    (r"^token_emb\.", "model.embed_tokens."),
    (r"^pos_emb\.emb\.", "model.embed_positions."),
    (r"^norm\.", "model.layer_norm."),
)
HALVES = (
    {"0": "self_attn_layer_norm", "1.to_q": "self_attn.q_proj", "1.to_k": "self_attn.k_proj"}
    | {"1.to_v": "self_attn.v_proj", "1.to_out": "self_attn.out_proj"},
    {"0": "final_layer_norm", "1.net.0.0": "fc1", "1.net.2": "fc2"},
)


@functools.cache
def shapes(config: BertConfig) -> dict[str, Any]:
    """The parameters as a tree of `jax.ShapeDtypeStruct`; traced once a config, and shared: not to be changed."""
    return jax.eval_shape(lambda: Bert(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]


def from_diffusers_config(config: Mapping[str, Any], place: str = "bert/config.json") -> BertConfig:
    """Sizes from a config.json; a missing key means what it means to diffusers.

    Raises:
        UserError: a value asks for a structure that `Bert` does not have.
    """
    configs.check(config, ALLOWED, place)
    width = configs.integer(config, "d_model", 1280, place)
    if config.get("encoder_ffn_dim", 5120) != 4 * width:
        raise configs.unsupported(config, "encoder_ffn_dim", place, f"four times d_model, {4 * width}")
    return BertConfig(
        vocab_size=configs.integer(config, "vocab_size", 30522, place),
        width=width,
        layers=configs.integer(config, "encoder_layers", 32, place),
        heads=configs.integer(config, "encoder_attention_heads", 8, place),
        head_size=configs.integer(config, "head_dim", 64, place),
        max_length=configs.integer(config, "max_position_embeddings", 77, place),
    )


def to_diffusers_config(config: BertConfig) -> dict[str, Any]:
    """The config.json of an encoder."""
    return {
        "activation_function": "gelu",
        "architectures": [CLASS_NAME],
        "d_model": config.width,
        "encoder_attention_heads": config.heads,
        "encoder_ffn_dim": config.feed_forward,
        "encoder_layers": config.layers,
        "head_dim": config.head_size,
        "max_position_embeddings": config.max_length,
        "model_type": "ldmbert",
        "vocab_size": config.vocab_size,
    }


def from_original(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Tensors below LDM's `cond_stage_model.transformer.` under diffusers' keys.

    Raises:
        UserError: a key is not one of such an encoder.
    """
    return {_renamed(key): tensor for key, tensor in tensors.items()}


def _renamed(key: str) -> str:
    if match := re.fullmatch(r"attn_layers\.layers\.(\d+)\.(.+)\.(weight|bias)", key):
        number, name = int(match[1]), HALVES[int(match[1]) % 2].get(match[2])
        if name is not None:
            return f"model.layers.{number // 2}.{name}.{match[3]}"
    for pattern, replacement in ORIGINAL:
        if re.match(pattern, key):
            return re.sub(pattern, replacement, key)
    if key.startswith("to_logits."):
        return key
    raise UserError(f"{key} is no part of LDM's text encoder")
