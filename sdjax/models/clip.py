"""CLIP's text encoder (Radford et al. 2021): OpenAI's ViT-L/14 and OpenCLIP's ViT-H/14 and ViT-bigG/14."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sdjax.core.errors import UserError
from sdjax.core.tree import Tree
from sdjax.models.attention import Attention
from sdjax.models.layers import gelu
from sdjax.ops.partition import BATCH, TENSOR, constrain

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": gelu,
}


@dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of a text encoder.

    Attributes:
        activation: "quick_gelu" for OpenAI's weights, "gelu" (erf) for OpenCLIP's.
        projection_dim: width of the pooled, projected output; None for models without a projection.
        eos_token_id: marks the token whose state is the pooled one. 2 is what OpenAI's configs say by mistake: the
            position is then that of the highest id (transformers does the same).
    """

    vocab_size: int = 49408
    width: int = 768
    layers: int = 12
    heads: int = 12
    feed_forward: int = 3072
    activation: str = "quick_gelu"
    max_length: int = 77
    projection_dim: int | None = None
    eos_token_id: int = 2

    @property
    def blocks(self) -> int:
        """Layers, each of which has parameters of its own."""
        return self.layers


WORDS = "words"
VARIANTS = {
    "clip_l": CLIPTextConfig(),  # 123,060,480 parameters
    "openclip_h": CLIPTextConfig(width=1024, layers=24, heads=16, feed_forward=4096, activation="gelu"),
    "openclip_h_sd2": CLIPTextConfig(width=1024, layers=23, heads=16, feed_forward=4096, activation="gelu"),
    "openclip_bigg": CLIPTextConfig(  # 694,659,840
        width=1280, layers=32, heads=20, feed_forward=5120, activation="gelu", projection_dim=1280
    ),
}


class CLIPTextOutput(NamedTuple):
    """Outputs of a text encoder.

    Attributes:
        hidden: the embeddings and then every layer's output, `layers + 1` arrays; none is normalised.
        last: the last layer's output after the final LayerNorm.
        pooled: `last` at the end-of-text token, projected where the model has a projection.
    """

    hidden: tuple[Float[Array, "b l d"], ...]
    last: Float[Array, "b l d"]
    pooled: Float[Array, "b p"]


class TowerSizes(Protocol):
    """Sizes of a tower that its layers need."""

    @property
    def width(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def feed_forward(self) -> int: ...
    @property
    def activation(self) -> str: ...


class CLIPLayer(nn.Module):
    """Self-attention, causal for text, and a feed-forward, each on a LayerNorm and added."""

    config: TowerSizes
    causal: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None = None) -> Float[Array, "b l d"]:
        """Args: `mask`, the tokens that may be attended to; None means all."""
        c = self.config
        h = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="layer_norm1")(x)
        x = x + Attention(c.heads, qkv_bias=True, dtype=self.dtype, name="self_attn")(h, mask=mask, causal=self.causal)
        h = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="layer_norm2")(x)
        h = ACTIVATIONS[c.activation](nn.Dense(c.feed_forward, dtype=self.dtype, name="fc1")(h))
        h = constrain(h, BATCH, None, TENSOR)
        return constrain(x + nn.Dense(c.width, dtype=self.dtype, name="fc2")(h), BATCH, None, None)


class TokenEmbedding(nn.Embed):
    """Vectors of a vocabulary, and of `words` further ids, which stand apart so that they can learn alone.

    They are the parameter "words" [words, d] (textual inversion; Gal et al. 2022).
    """

    words: int = 0

    def setup(self) -> None:
        super().setup()
        if self.words:
            self.vectors = self.param(WORDS, self.embedding_init, (self.words, self.features), self.param_dtype)

    def __call__(self, inputs: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        if not self.words:
            return super().__call__(inputs)
        own = inputs - self.num_embeddings
        known = jnp.take(self.embedding, inputs, axis=0, mode="clip")
        return jnp.where(own[..., None] < 0, known, jnp.take(self.vectors, own, axis=0, mode="clip"))


class CLIPText(nn.Module):
    """Token ids to states. The final LayerNorm is a method of its own: SD 2 applies it to an earlier layer.

    Attributes:
        words: vectors of ids beyond the vocabulary, as of `TokenEmbedding`.
    """

    config: CLIPTextConfig
    dtype: DTypeLike = jnp.float32
    words: int = 0

    def setup(self) -> None:
        c = self.config
        normal = nn.initializers.normal(0.02)
        self.token_embedding = TokenEmbedding(c.vocab_size, c.width, embedding_init=normal, words=self.words)
        self.position_embedding = nn.Embed(c.max_length, c.width, embedding_init=nn.initializers.normal(0.01))
        self.layers = [CLIPLayer(c, dtype=self.dtype, name=f"layers_{i}") for i in range(c.layers)]
        self.final_layer_norm = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype)
        if c.projection_dim is not None:
            self.text_projection = nn.Dense(c.projection_dim, use_bias=False, dtype=self.dtype)

    def __call__(self, ids: Int[Array, "b l"]) -> CLIPTextOutput:
        """All states of a batch of token ids; pads are ordinary tokens, as in Stable Diffusion."""
        x = self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))
        hidden = [x.astype(self.dtype)]
        for layer in self.layers:
            hidden.append(layer(hidden[-1]))
        last = self.normalise(hidden[-1])
        pooled = last[jnp.arange(len(ids)), eos_position(ids, self.config.eos_token_id)]
        if self.config.projection_dim is not None:
            pooled = self.text_projection(pooled)
        return CLIPTextOutput(tuple(hidden), last, pooled)

    def normalise(self, hidden: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """The final LayerNorm."""
        return self.final_layer_norm(hidden)


def eos_position(ids: Int[Array, "b l"], eos_token_id: int) -> Int[Array, " b"]:
    """Index of each prompt's end: the first end-of-text token."""
    return jnp.argmax(ids if eos_token_id == 2 else ids == eos_token_id, axis=-1)


@dataclass(frozen=True)
class TextLayer:
    """Hidden layer of a text encoder used as cross-attention context.

    Attributes:
        back: counted from the end; 1 is the last.
        normalised: whether the final LayerNorm is applied to it.
    """

    back: int
    normalised: bool


TEXT_LAYERS = {
    "last": TextLayer(1, normalised=True),  # SD 1; SD 2 as published for diffusers, with 23 of 24 layers
    "penultimate": TextLayer(2, normalised=True),  # SD 2 with all of ViT-H's 24 layers
    "penultimate_raw": TextLayer(2, normalised=False),  # SDXL, both encoders
}


def layer_states(
    output: CLIPTextOutput,
    layer: TextLayer,
    normalise: Callable[[Float[Array, "b l d"]], Float[Array, "b l d"]],
    clip_skip: int = 0,
) -> Float[Array, "b l d"]:
    """The states that a diffusion model attends to; the pooled output is the last layer's whatever is skipped here.

    Args:
        output, layer: of the encoder, and of `TEXT_LAYERS`.
        normalise: `CLIPText.normalise` with its parameters.
        clip_skip: layers skipped beyond `layer`, as diffusers counts: SD 1's 1 is A1111's "clip skip 2".

    Raises:
        UserError: the encoder has no so early a layer.
    """
    most = len(output.hidden) - layer.back
    if not 0 <= clip_skip <= most:
        raise UserError(f"clip_skip {clip_skip} does not fit this text encoder; choose 0 to {most}")
    if not layer.normalised:
        return output.hidden[-(layer.back + clip_skip)]
    return output.last if layer.back + clip_skip == 1 else normalise(output.hidden[-(layer.back + clip_skip)])


def emphasise(states: Float[Array, "*b l d"], weights: Float[Array, "*b l"]) -> Float[Array, "*b l d"]:
    """Weighs the states of tokens, then scales all to the mean that they had (A1111, sd_emphasis.py, "Original").

    The mean is of one encoder's states of one chunk of one prompt, so that a prompt looks the same in any batch; A1111
    takes it over all prompts of a batch, which is the same where there is one. Chunks whose weights are all 1 come back
    bit for bit.
    """
    x = states.astype(jnp.float32)
    weighted = x * weights[..., None]
    before, after = (y.mean((-2, -1), keepdims=True) for y in (x, weighted))
    restored = weighted * jnp.where(after == 0, 1.0, before / after)
    untouched = (weights == 1).all(-1)[..., None, None]
    return jnp.where(untouched, states, restored.astype(states.dtype))


def extend_vocabulary(
    config: CLIPTextConfig, params: Tree, rows: Float[Array | np.ndarray, "n d"], eos: int
) -> tuple[CLIPTextConfig, dict[str, Any]]:
    """The encoder whose new ids, from `config.vocab_size` on, have the given embeddings (textual inversion).

    Args:
        config, params: the encoder.
        rows: a vector each new id.
        eos: the tokenizer's end of text. The pooled state is looked for there: with the new ids, the end of a prompt
            no longer has its highest id.

    Raises:
        UserError: the vectors are not as wide as the encoder.
    """
    if rows.shape[1] != config.width:
        raise UserError(f"embeddings of {rows.shape[1]} numbers do not fit a text encoder of width {config.width}")
    table = params["token_embedding"]["embedding"]
    extended = jnp.concatenate([table, jnp.asarray(rows, table.dtype)])
    eos_token_id = eos if config.eos_token_id == 2 else config.eos_token_id
    config = replace(config, vocab_size=len(extended), eos_token_id=eos_token_id)
    return config, {**params, "token_embedding": {"embedding": extended}}
