"""Prompts through T5, whose states are the context (Imagen, Saharia et al. 2022; deep-floyd/IF)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from sdjax.core.errors import UserError
from sdjax.core.tree import Params
from sdjax.data.text.captions import read_caption
from sdjax.data.text.t5_tokenizer import EOS, PAD, T5Tokenizer
from sdjax.diffusion_model.conditioner import STATES, Columns, Conditioner, Host, Traits
from sdjax.diffusion_model.conditioners.tokens import TOKENS
from sdjax.diffusion_model.text_encoders import T5TextEncoder
from sdjax.models.conditioning import Cond

ENCODER = "text_encoder"
NEGATIVE = "negative_tokens"
LENGTH = 77  # IF's

logger = logging.getLogger("sdjax")


@dataclass(frozen=True)
class CaptionConditioner(Conditioner):
    """`tokens`, int32 [b l]; sampling has `negative_tokens` beside them. The null condition is the empty caption.

    Their states (`tokens_states`, `negative_tokens_states`) may be there already.

    Attributes:
        encoder: of the tokens.
        length: tokens of a caption, its end and the pads included.
    """

    encoder: T5TextEncoder
    length: int = LENGTH

    @property
    def traits(self) -> Traits:
        return Traits(
            required=("prompt",),
            optional=("negative_prompt",),
            context_width=self.encoder.width,
            has_null=True,
            guidance_scale=7.0,
            steps=100,
            strength=0.7,
            feather=0.0,
            keeps_clean=True,
            text_columns=(TOKENS, NEGATIVE),
        )

    @property
    def components(self) -> dict[str, Any]:
        return {self.encoder.name: self.encoder.config}

    @property
    def settings(self) -> dict[str, Any]:
        return {"text_length": self.length}

    def init(self, key: PRNGKeyArray) -> Params:
        return {self.encoder.name: self.encoder.init(key)}

    def encode(self, inputs: Mapping[str, Any], host: Host) -> dict[str, Any]:
        if self.encoder.name not in host.tokenizers:
            raise UserError(f"{host.name} has no tokenizer: T5's tokenizer.json or spiece.model")
        tokenizer: Any = host.tokenizers[self.encoder.name]
        prompt, negative = inputs["prompt"], inputs.get("negative_prompt") or ""
        return {TOKENS: caption_tokens(tokenizer, prompt), NEGATIVE: caption_tokens(tokenizer, negative)}

    def encode_text(self, params: Params, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        return self.encoder.encode(params, tokens)

    def cond(self, params: Params, columns: Columns, keys: Key[Array, " b"] | None = None) -> Cond:
        if TOKENS + STATES in columns:
            return Cond(context=jnp.asarray(columns[TOKENS + STATES]))
        return Cond(context=self.encode_text(params, jnp.asarray(columns[TOKENS])))

    def null(self, columns: Columns) -> Columns | None:
        if NEGATIVE in columns:
            ends = [end for end in ("", STATES) if TOKENS + end in columns]
            return {**columns, **{TOKENS + end: columns[NEGATIVE + end] for end in ends}}
        empty = np.array([EOS] + [PAD] * (self.length - 1), np.int32)
        return {**columns, TOKENS: jnp.broadcast_to(empty, columns[TOKENS].shape)}


def caption_tokens(tokenizer: T5Tokenizer, caption: str) -> np.ndarray:
    """The ids of a caption as it is read, int32 [l]; what was cut is said in the log."""
    text = read_caption(caption)
    if cut := tokenizer.truncated(text):
        logger.warning("%r was cut from the prompt %.40r: it has more than %d tokens", cut, caption, tokenizer.length)
    return tokenizer.encode([text])[0]
