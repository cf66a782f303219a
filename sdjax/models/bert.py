"""LDM's own text encoder: a transformer over BERT's tokens or a layout's that learns with the UNet (LDM, E.2.1).

CompVis/latent-diffusion, ldm/modules/encoders/modules.py BERTEmbedder: all tokens attend to all, the padding too.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sdjax.models.attention import Attention
from sdjax.ops.partition import BATCH, TENSOR, constrain


@dataclass(frozen=True)
class BertConfig:
    """Sizes; heads of any model are 64 wide."""

    vocab_size: int = 30522
    width: int = 1280
    layers: int = 32
    heads: int = 8
    head_size: int = 64
    max_length: int = 77

    @property
    def blocks(self) -> int:
        """Layers, each of which has parameters of its own."""
        return self.layers

    @property
    def feed_forward(self) -> int:
        """Hidden features of a layer's second half."""
        return 4 * self.width


VARIANTS = {
    "ldm_text": BertConfig(),  # 542,895,360 parameters; stored with 39,098,682 more that are not used
    "ldm_text_f4": BertConfig(width=640),
    "ldm_layout": BertConfig(vocab_size=8192, width=512, layers=16, max_length=92),
}


class BertLayer(nn.Module):
    """Attention and a feed-forward, each on a LayerNorm and added."""

    config: BertConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        c = self.config
        h = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="layer_norm1")(x)
        x = x + Attention(c.heads, c.head_size, dtype=self.dtype, name="self_attn")(h)
        h = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="layer_norm2")(x)
        h = nn.gelu(nn.Dense(c.feed_forward, dtype=self.dtype, name="fc1")(h), approximate=False)
        h = constrain(h, BATCH, None, TENSOR)
        return constrain(x + nn.Dense(c.width, dtype=self.dtype, name="fc2")(h), BATCH, None, None)


class Bert(nn.Module):
    """Token ids to states."""

    config: BertConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """Args: ids, at most `config.max_length` of them."""
        c, normal = self.config, nn.initializers.normal(0.02)
        x = nn.Embed(c.vocab_size, c.width, embedding_init=normal, name="token_embedding")(ids)
        places = jnp.arange(ids.shape[1])
        x = x + nn.Embed(c.max_length, c.width, embedding_init=normal, name="position_embedding")(places)
        x = x.astype(self.dtype)
        for i in range(c.layers):
            x = BertLayer(c, self.dtype, name=f"layers_{i}")(x)
        return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="final_layer_norm")(x)
