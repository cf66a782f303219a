"""T5's encoder as Hugging Face transformers stores it: a `T5EncoderModel`, or a whole T5 with a decoder."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from sdjax.checkpoints import config_fields, mapping
from sdjax.checkpoints.config_fields import Field
from sdjax.checkpoints.mapping import KeyTable, at, embedding, layer, norm
from sdjax.data.text.t5_tokenizer import EOS, PAD
from sdjax.models.t5 import ACTIVATIONS, BUCKETS, FARTHEST, T5Config, T5Encoder

CLASS_NAME, MODEL_TYPE = "T5EncoderModel", "t5"

ALLOWED: dict[str, tuple[Any, ...]] = {
    "feed_forward_proj": ("relu", *sorted(set(ACTIVATIONS) - {"relu"})),
    "layer_norm_epsilon": (1e-6,),
    "model_type": (MODEL_TYPE,),
    "relative_attention_max_distance": (FARTHEST,),
    "relative_attention_num_buckets": (BUCKETS,),
    "eos_token_id": (EOS,),
    "pad_token_id": (PAD,),
}
FIELDS = (
    Field("vocab_size", "vocab_size", 32128),
    Field("width", "d_model", 512),
    Field("layers", "num_layers", 6),
    Field("heads", "num_heads", 8),
    Field("head_size", "d_kv", 64),
    Field("feed_forward", "d_ff", 2048),
    Field("activation", "feed_forward_proj", "relu"),
)
LAYER = (
    *norm("layer_norm1", "layer.0.layer_norm"),
    *layer("self_attn/to_q", "layer.0.SelfAttention.q"),
    *layer("self_attn/to_k", "layer.0.SelfAttention.k"),
    *layer("self_attn/to_v", "layer.0.SelfAttention.v"),
    *layer("self_attn/to_out", "layer.0.SelfAttention.o"),
    *norm("layer_norm2", "layer.1.layer_norm"),
    *layer("ff/wi", "layer.1.DenseReluDense.wi"),
    *layer("ff/wi_0", "layer.1.DenseReluDense.wi_0"),  # this is its name in gated ones, too
    *layer("ff/wi_1", "layer.1.DenseReluDense.wi_1"),
    *layer("ff/wo", "layer.1.DenseReluDense.wo"),
)
TABLE = KeyTable(
    rows=(
        *embedding("token_embedding", "shared"),
        *embedding("relative_attention_bias", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
        *at("layers_*", "encoder.block.*", LAYER),
        *norm("final_layer_norm", "encoder.final_layer_norm"),
    ),
    ignored=(r"decoder\..*", r"lm_head\..*"),
    copies={"encoder.embed_tokens.weight": "shared.weight"},  # written before transformers 5
)


@functools.cache
def shapes(config: T5Config) -> dict[str, Any]:
    """The parameters as a tree of `jax.ShapeDtypeStruct`; traced once a config, and shared: not to be changed."""
    return mapping.traced(T5Encoder(config).init, jnp.zeros((1, 1), jnp.int32))


def is_t5(config: Mapping[str, Any]) -> bool:
    """Tell whether a text encoder's config.json is of a T5."""
    return config.get("model_type") == MODEL_TYPE or config.get("architectures") == [CLASS_NAME]


def from_diffusers_config(config: Mapping[str, Any], place: str = "text_encoder/config.json") -> T5Config:
    """Sizes from a config.json; a missing key means what it means to transformers.

    Raises:
        UserError: a value asks for a structure that `T5Encoder` does not have.
    """
    config_fields.check(config, ALLOWED, place)
    return T5Config(**config_fields.read_fields(config, FIELDS, place))


def to_diffusers_config(config: T5Config) -> dict[str, Any]:
    """The config.json of an encoder alone."""
    fixed = {key: choices[0] for key, choices in ALLOWED.items()}
    return {**fixed, **config_fields.write_fields(config, FIELDS), "architectures": [CLASS_NAME]}
