"""CLIP's text encoder as Hugging Face transformers stores it (`CLIPTextModel`, `CLIPTextModelWithProjection`)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.convert import configs
from sdjax.convert.rules import Table, at, embedding, layer, norm
from sdjax.models.clip import ACTIVATIONS, CLIPText, CLIPTextConfig

PLAIN, PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"

ALLOWED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("quick_gelu", *sorted(set(ACTIVATIONS) - {"quick_gelu"})),
    "layer_norm_eps": (1e-5,),
    "model_type": ("clip_text_model",),
}

LAYER = (
    *norm("layer_norm1"),
    *layer("self_attn/to_q", "self_attn.q_proj"),
    *layer("self_attn/to_k", "self_attn.k_proj"),
    *layer("self_attn/to_v", "self_attn.v_proj"),
    *layer("self_attn/to_out", "self_attn.out_proj"),
    *norm("layer_norm2"),
    *layer("fc1", "mlp.fc1"),
    *layer("fc2", "mlp.fc2"),
)

TABLE = Table(
    rows=(
        *embedding("token_embedding", "text_model.embeddings.token_embedding"),
        *embedding("position_embedding", "text_model.embeddings.position_embedding"),
        *at("layers_*", "text_model.encoder.layers.*", LAYER),
        *norm("final_layer_norm", "text_model.final_layer_norm"),
        *layer("text_projection"),
    ),
    # transformers 5 names a bare CLIPTextModel's parameters without the prefix.
    aliases=((r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1."),),
    # The numbers 0 to 76, which transformers before 4.31 stored with the weights.
    ignored=(r"(text_model\.)?embeddings\.position_ids",),
)


@functools.cache
def shapes(config: CLIPTextConfig) -> dict[str, Any]:
    """The parameters as a tree of `jax.ShapeDtypeStruct`; traced once a config, and shared: not to be changed."""
    return jax.eval_shape(lambda: CLIPText(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]


def from_diffusers_config(config: Mapping[str, Any], place: str = "text_encoder/config.json") -> CLIPTextConfig:
    """Sizes from a config.json; a missing key means what it means to transformers.

    Raises:
        UserError: a value asks for a structure that `CLIPText` does not have.
    """
    configs.check(config, ALLOWED, place)
    architectures = config.get("architectures") or [PLAIN]
    if architectures not in ([PLAIN], [PROJECTED]):
        raise configs.unsupported(config, "architectures", place, f"{[PLAIN]} or {[PROJECTED]}")
    width = configs.integer(config, "hidden_size", 512, place)
    heads = configs.integer(config, "num_attention_heads", 8, place)
    if width % heads:
        raise configs.unsupported(config, "num_attention_heads", place, f"a divisor of hidden_size {width}")
    eos = config.get("eos_token_id", 49407)
    if type(eos) is not int:
        raise configs.unsupported(config, "eos_token_id", place, "an integer")
    projected = architectures == [PROJECTED]
    return CLIPTextConfig(
        vocab_size=configs.integer(config, "vocab_size", 49408, place),
        width=width,
        layers=configs.integer(config, "num_hidden_layers", 12, place),
        heads=heads,
        feed_forward=configs.integer(config, "intermediate_size", 2048, place),
        activation=config.get("hidden_act", "quick_gelu"),
        max_length=configs.integer(config, "max_position_embeddings", 77, place),
        projection_dim=configs.integer(config, "projection_dim", 512, place) if projected else None,
        eos_token_id=eos,
    )


def to_diffusers_config(config: CLIPTextConfig) -> dict[str, Any]:
    """The config.json of a text encoder."""
    projected = config.projection_dim is not None
    return ({"projection_dim": config.projection_dim} if projected else {}) | {
        "architectures": [PROJECTED if projected else PLAIN],
        "eos_token_id": config.eos_token_id,
        "hidden_act": config.activation,
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": config.max_length,
        "model_type": "clip_text_model",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "vocab_size": config.vocab_size,
    }
