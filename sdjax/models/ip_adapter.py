"""IP-Adapter: an image as a prompt (Ye et al. 2023; tencent-ailab/IP-Adapter).

An image's tokens have keys and values of their own in every cross-attention of the UNet, which `Cond.images` takes
there. Plain adapters make tokens of CLIP's embedding; plus has a resampler that reads all of CLIP's states.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sdjax.models.conditioning import KeysValues
from sdjax.models.unet import SD1, Transformer
from sdjax.ops.attention import dot_product_attention

HEAD = 64  # features of a resampler's head


@dataclass(frozen=True)
class ResamplerConfig:
    """Sizes of a perceiver (Alayrac et al. 2022, Flamingo)."""

    width: int = 768
    depth: int = 4
    heads: int = 12

    @property
    def feed_forward(self) -> int:
        """Features within a layer's feed-forward."""
        return 4 * self.width


@dataclass(frozen=True)
class IPAdapterConfig:
    """Sizes of an IP-Adapter; the defaults are plain SD 1.5's.

    Attributes:
        image_dim: features of CLIP's embedding or, with a resampler, of each of its states.
        context_dim: of a token, the UNet's.
        tokens: of an image.
        resampler: plus's; None for a plain adapter.
        transformers: the UNet's: see `UNetConfig.transformers`.
    """

    image_dim: int = 1024
    context_dim: int = 768
    tokens: int = 4
    resampler: ResamplerConfig | None = None
    transformers: tuple[Transformer, ...] = SD1.transformers

    @property
    def blocks(self) -> int:
        """Layers, each of which has parameters of its own."""
        return (0 if self.resampler is None else self.resampler.depth) + sum(t.depth for t in self.transformers) // 2


class IPAdapter(nn.Module):
    """Embeddings or states of CLIP's image tower to `Cond.images`."""

    config: IPAdapterConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c = self.config
        kind = Projection if c.resampler is None else Resampler
        self.image_proj = kind(c, self.dtype)
        names = [block_name(t.name, i) for t in c.transformers for i in range(t.depth)]
        widths = [t.width for t in c.transformers for _ in range(t.depth)]
        self.layers = {
            name: ImageKeysValues(width, self.dtype, name=name) for name, width in zip(names, widths, strict=True)
        }

    def __call__(self, states: Float[Array, "b *n w"]) -> dict[str, tuple[KeysValues, ...]]:
        """Keys and values of one image a row."""
        return self.keys_values(self.tokens(states))

    def tokens(self, states: Float[Array, "b *n w"]) -> Float[Array, "b t d"]:
        """Tokens of images, of CLIP's embeddings [b w] or its states [b n w]."""
        return self.image_proj(states.astype(self.dtype))

    def keys_values(self, tokens: Float[Array, "b t d"]) -> dict[str, tuple[KeysValues, ...]]:
        """Keys and values of any number of tokens, for each block of a transformer."""
        x = tokens.astype(self.dtype)
        return {
            t.name: tuple(self.layers[block_name(t.name, i)](x) for i in range(t.depth))
            for t in self.config.transformers
        }


def block_name(transformer: str, number: int) -> str:
    """The name of a cross-attention layer, of which keys and values have theirs."""
    return f"{transformer}_transformer_blocks_{number}_attn2"


class ImageKeysValues(nn.Module):
    """Keys and values of one layer."""

    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "b t d"]) -> KeysValues:
        return KeysValues(
            *(nn.Dense(self.width, use_bias=False, dtype=self.dtype, name=name)(tokens) for name in ("to_k", "to_v"))
        )


class Projection(nn.Module):
    """A few tokens of an embedding."""

    config: IPAdapterConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b w"]) -> Float[Array, "b t d"]:
        c = self.config
        x = nn.Dense(c.tokens * c.context_dim, dtype=self.dtype, name="proj")(x)
        return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(x.reshape(len(x), c.tokens, c.context_dim))


class Resampler(nn.Module):
    """Learned queries that read CLIP's states, layer after layer."""

    config: IPAdapterConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n w"]) -> Float[Array, "b t d"]:
        c = self.config
        assert c.resampler is not None
        latents = self.param("latents", nn.initializers.normal(c.resampler.width**-0.5), (c.tokens, c.resampler.width))
        latents = jnp.broadcast_to(latents.astype(self.dtype), (len(x), *latents.shape))
        x = nn.Dense(c.resampler.width, dtype=self.dtype, name="proj_in")(x)
        for i in range(c.resampler.depth):
            latents = ResamplerLayer(c.resampler, self.dtype, name=f"layers_{i}")(x, latents)
        x = nn.Dense(c.context_dim, dtype=self.dtype, name="proj_out")(latents)
        return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm_out")(x)


class ResamplerLayer(nn.Module):
    """Attention of queries to states and to themselves, and a feed-forward, each added; without biases."""

    config: ResamplerConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n w"], latents: Float[Array, "b t w"]) -> Float[Array, "b t w"]:
        c = self.config

        def norm(name: str, x: Array) -> Array:
            return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)(x)

        def dense(name: str, features: int, x: Array) -> Array:
            return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name)(x)

        queries = norm("norm2", latents)
        seen = jnp.concatenate([norm("norm1", x), queries], axis=1)
        inner = c.heads * HEAD
        q, k, v = dense("to_q", inner, queries), *jnp.split(dense("to_kv", 2 * inner, seen), 2, axis=-1)
        out = dot_product_attention(*(y.reshape(*y.shape[:-1], c.heads, HEAD) for y in (q, k, v)))
        latents = latents + dense("to_out", c.width, out.reshape(*out.shape[:-2], inner))
        hidden = nn.gelu(dense("fc1", c.feed_forward, norm("ff_norm", latents)), approximate=False)
        return latents + dense("fc2", c.width, hidden)
