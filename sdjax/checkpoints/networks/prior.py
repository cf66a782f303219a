"""unCLIP's prior as PyTorch diffusers stores it (`PriorTransformer`)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax

from sdjax.checkpoints import config_fields, mapping
from sdjax.checkpoints.config_fields import MAX_TOKENS, Field
from sdjax.checkpoints.mapping import SAME, KeyMapping, KeyTable, at, layer, norm
from sdjax.checkpoints.networks.blocks import ATTENTION, EMBEDDING_MLP
from sdjax.models.prior import ADDED, PriorConfig, PriorTransformer

CLASS_NAME = "PriorTransformer"
# The other values are those of Shap-E's networks.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "added_emb_type": ("prd",),
    "additional_embeddings": (ADDED,),
    "dropout": (0.0,),
    "embedding_proj_norm_type": (None,),
    "encoder_hid_proj_type": ("linear",),
    "norm_in_type": (None,),
    "time_embed_act_fn": ("silu", "swish"),
}
FIELDS = (
    Field("embedding_dim", "embedding_dim", 768),
    Field("layers", "num_layers", 20),
    Field("heads", "num_attention_heads", 32),
    Field("head_size", "attention_head_dim", 64),
    Field("tokens", "num_embeddings", 77, MAX_TOKENS),
)
LAYER = (
    *norm("layer_norm1", "norm1"),
    *at("self_attn", "attn1", ATTENTION),
    *norm("layer_norm2", "norm3"),  # norm2 is that of cross-attention, which the prior does not have
    *layer("fc1", "ff.net.0.proj"),
    *layer("fc2", "ff.net.2"),
)
TABLE = KeyTable(
    (
        *layer("encoder_hidden_states_proj"),
        *layer("embedding_proj"),
        *at("time_embedding", "time_embedding", EMBEDDING_MLP),
        *layer("proj_in"),
        KeyMapping("prd_embedding", "prd_embedding", SAME),
        KeyMapping("positional_embedding", "positional_embedding", SAME),
        *at("layers_*", "transformer_blocks.*", LAYER),
        *norm("norm_out"),
        *layer("proj_to_clip_embeddings"),
        KeyMapping("clip_mean", "clip_mean", SAME),
        KeyMapping("clip_std", "clip_std", SAME),
    )
)


@functools.cache
def shapes(config: PriorConfig) -> dict[str, Any]:
    """The parameters as a tree of `jax.ShapeDtypeStruct`; traced once a config, and shared: not to be changed."""
    return mapping.traced(PriorTransformer(config).init, *jax.eval_shape(config.example_inputs))


def from_diffusers_config(config: Mapping[str, Any], place: str = "prior/config.json") -> PriorConfig:
    """Sizes from a config.json; a missing key means what it means to diffusers.

    Raises:
        UserError: a value asks for a structure that `PriorTransformer` does not have.
    """
    config_fields.check(config, ALLOWED, place)
    sizes = PriorConfig(**config_fields.read_fields(config, FIELDS, place))
    widths = {
        "clip_embed_dim": sizes.embedding_dim,
        "embedding_proj_dim": sizes.embedding_dim,
        "time_embed_dim": sizes.width,
    }
    for key, width in widths.items():
        if config.get(key) not in (None, width):
            raise config_fields.unsupported(config, key, place, f"null or {width}")
    return sizes


def to_diffusers_config(config: PriorConfig) -> dict[str, Any]:
    """The config.json of a prior."""
    fixed = {key: choices[0] for key, choices in ALLOWED.items()}
    return {**fixed, **config_fields.write_fields(config, FIELDS), "_class_name": CLASS_NAME}
