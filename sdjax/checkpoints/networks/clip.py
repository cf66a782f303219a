"""CLIP's text encoder as Hugging Face transformers stores it (`CLIPTextModel`, `CLIPTextModelWithProjection`).

Files in the original layout hold either that, or OpenCLIP's names (mlfoundations/open_clip model.py), which join the
weights of queries, keys and values, and keep the projection transposed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from sdjax.checkpoints import config_fields, mapping
from sdjax.checkpoints.config_fields import MAX_SIZE, Field
from sdjax.checkpoints.mapping import KeyTable, Shapes, at, embedding, layer, norm, renamed
from sdjax.checkpoints.networks.blocks import TRANSFORMER_LAYER
from sdjax.checkpoints.original_keys import TRANSPOSED, OriginalSizes, Piece
from sdjax.core.errors import UserError
from sdjax.models.clip import ACTIVATIONS, CLIPText, CLIPTextConfig

PLAIN, PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"

ALLOWED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("quick_gelu", *sorted(set(ACTIVATIONS) - {"quick_gelu"})),
    "layer_norm_eps": (1e-5,),
    "model_type": ("clip_text_model",),
}
FIELDS = (
    Field("vocab_size", "vocab_size", 49408),
    Field("width", "hidden_size", 512),
    Field("layers", "num_hidden_layers", 12),
    Field("heads", "num_attention_heads", 8),
    Field("feed_forward", "intermediate_size", 2048),
    Field("activation", "hidden_act", "quick_gelu"),
    Field("max_length", "max_position_embeddings", 77),
)
VOCABULARY = 49408  # single files hold no tokenizer, so theirs is CLIP's own

TABLE = KeyTable(
    rows=(
        *embedding("token_embedding", "text_model.embeddings.token_embedding"),
        *embedding("position_embedding", "text_model.embeddings.position_embedding"),
        *at("layers_*", "text_model.encoder.layers.*", TRANSFORMER_LAYER),
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
    return mapping.traced(CLIPText(config).init, jnp.zeros((1, 1), jnp.int32))


def from_diffusers_config(config: Mapping[str, Any], place: str = "text_encoder/config.json") -> CLIPTextConfig:
    """Sizes from a config.json; a missing key means what it means to transformers.

    Raises:
        UserError: a value asks for a structure that `CLIPText` does not have.
    """
    config_fields.check(config, ALLOWED, place)
    architectures = config.get("architectures") or [PLAIN]
    if architectures not in ([PLAIN], [PROJECTED]):
        raise config_fields.unsupported(config, "architectures", place, f"{[PLAIN]} or {[PROJECTED]}")
    sizes = config_fields.read_fields(config, FIELDS, place)
    if sizes["width"] % sizes["heads"]:
        raise config_fields.unsupported(
            config, "num_attention_heads", place, f"a divisor of hidden_size {sizes['width']}"
        )
    eos = config.get("eos_token_id", 49407)
    if type(eos) is not int or not 0 <= eos < MAX_SIZE:
        raise config_fields.unsupported(config, "eos_token_id", place, f"an integer below {MAX_SIZE}")
    projection = config_fields.integer(config, "projection_dim", 512, place) if architectures == [PROJECTED] else None
    return CLIPTextConfig(projection_dim=projection, eos_token_id=eos, **sizes)


def to_diffusers_config(config: CLIPTextConfig) -> dict[str, Any]:
    """The config.json of a text encoder."""
    projected = config.projection_dim is not None
    return ({"projection_dim": config.projection_dim} if projected else {}) | {
        **config_fields.write_fields(config, FIELDS),
        "architectures": [PROJECTED if projected else PLAIN],
        "eos_token_id": config.eos_token_id,
        "layer_norm_eps": 1e-5,
        "model_type": "clip_text_model",
    }


OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
OPEN_CLIP_ENDS = {
    "text_model.embeddings.token_embedding.weight": Piece("token_embedding.weight"),
    "text_model.embeddings.position_embedding.weight": Piece("positional_embedding"),
    "text_model.final_layer_norm.weight": Piece("ln_final.weight"),
    "text_model.final_layer_norm.bias": Piece("ln_final.bias"),
    "text_projection.weight": Piece("text_projection", TRANSPOSED),
}
THIRDS = {"q_proj": 0, "k_proj": 1, "v_proj": 2}


def pieces(config: CLIPTextConfig, open_clip: bool = False) -> dict[str, Piece]:
    """The place of every tensor in the original layout, by transformers' key."""

    def piece(key: str) -> Piece:
        if not open_clip:
            return Piece(key)
        if key in OPEN_CLIP_ENDS:
            return OPEN_CLIP_ENDS[key]
        number, _, rest = key.removeprefix("text_model.encoder.layers.").partition(".")
        block, parts = f"transformer.resblocks.{number}", rest.split(".")
        if parts[1] in THIRDS:
            return Piece(f"{block}.attn.in_proj_{parts[2]}", third=THIRDS[parts[1]])
        return Piece(f"{block}.{renamed(rest, OPEN_CLIP_LAYER)}")

    return {key: piece(key) for key in mapping.stored_shapes(TABLE, shapes(config))}


def original_config(found: Shapes, open_clip: bool, projected: bool, place: object) -> CLIPTextConfig:
    """The sizes of a text encoder whose original tensors have the shapes `found`.

    Of an OpenCLIP encoder without `projected` (Stable Diffusion 2) what is used ends with the last layer but one. A
    file holds the layer after it exactly where it holds the projection, which is not used either.

    Raises:
        UserError: a tensor that says a size is missing, or the vocabulary is not CLIP's.
    """
    sizes, stem = OriginalSizes(found, place), "" if open_clip else "text_model.embeddings."
    tokens, positions = f"{stem}token_embedding.weight", f"{stem}position_embedding.weight"
    layers, feed_forward = "text_model.encoder.layers", "0.mlp.fc1.weight"
    if open_clip:
        positions, layers, feed_forward = "positional_embedding", "transformer.resblocks", "0.mlp.c_fc.weight"
    vocabulary, width = sizes.axis(tokens, 0), sizes.axis(tokens, -1)
    if vocabulary != VOCABULARY:
        raise UserError(
            f"{place} has a text encoder of {vocabulary} tokens; single files hold no tokenizer, so it must be CLIP's, "
            f"of {VOCABULARY}"
        )
    unused = open_clip and not projected and "text_projection" in sizes
    return CLIPTextConfig(
        vocab_size=vocabulary,
        width=width,
        layers=sizes.count(layers) - unused,
        heads=max(width // 64, 1),
        feed_forward=sizes.axis(f"{layers}.{feed_forward}", 0),
        activation="gelu" if open_clip else "quick_gelu",
        max_length=sizes.axis(positions, 0),
        projection_dim=sizes.axis("text_projection", -1) if projected else None,
        eos_token_id=vocabulary - 1,  # CLIP's last token (openai/CLIP simple_tokenizer.py)
    )
