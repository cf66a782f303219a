"""Attention as a module, and the transformer blocks of latent diffusion."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sdjax.models.conditioning import KeysValues
from sdjax.models.layers import GroupNorm
from sdjax.models.remat import is_scanned, recomputed, scan_blocks
from sdjax.ops.attention import dot_product_attention
from sdjax.ops.partition import BATCH, SPATIAL, TENSOR, constrain, constrain_image


class Attention(nn.Module):
    """Multi-head attention from x to a context, or to itself; output has x's width.

    Attributes:
        heads: the number of heads.
        head_size: of each; None divides x's width among them.
        qkv_bias: CLIP and the autoencoder have biases on q, k and v; the UNet's transformers do not.
    """

    heads: int
    head_size: int | None = None
    qkv_bias: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b q c"],
        context: Float[Array, "b k d"] | None = None,
        mask: Bool[Array, "b k"] | None = None,
        *,
        causal: bool = False,
        images: KeysValues | None = None,
    ) -> Float[Array, "b q c"]:
        """Args: `images` are attended to apart from the context, and both results added (Ye et al. 2023, eq. 5)."""
        context = x if context is None else context
        size = self.head_size or x.shape[-1] // self.heads

        def by_head(tokens: Array) -> Array:
            return tokens.astype(self.dtype).reshape(*tokens.shape[:-1], self.heads, size)

        def project(name: str, tokens: Array) -> Array:
            return by_head(nn.Dense(self.heads * size, self.qkv_bias, dtype=self.dtype, name=name)(tokens))

        q, k, v = project("to_q", x), project("to_k", context), project("to_v", context)
        out = dot_product_attention(q, k, v, mask=mask, causal=causal)
        if images is not None:
            out = out + dot_product_attention(q, by_head(images.keys), by_head(images.values))
        joined = out.reshape(*x.shape[:-1], self.heads * size)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="to_out")(joined)


class SelfAttention(nn.Module):
    """A norm, attention of all pixels to all, and what was there."""

    heads: int
    groups: int = 32
    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        tokens = GroupNorm(self.groups, self.eps, self.dtype, name="group_norm")(x).reshape(b, h * w, c)
        tokens = Attention(heads=self.heads, qkv_bias=True, dtype=self.dtype, name="attention")(tokens)
        return constrain_image(x + tokens.reshape(b, h, w, c))


class GEGLU(nn.Module):
    """Feed-forward with a gated GELU of the exact (erf) kind; four times as wide inside (Shazeer 2020)."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l c"]) -> Float[Array, "b l c"]:
        width = x.shape[-1]
        value, gate = jnp.split(nn.Dense(8 * width, dtype=self.dtype, name="proj_in")(x), 2, axis=-1)
        hidden = constrain(value * nn.gelu(gate, approximate=False), BATCH, SPATIAL, TENSOR)
        return nn.Dense(width, dtype=self.dtype, name="proj_out")(hidden)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each on a LayerNorm and added (LDM, appendix E.2.1).

    Attributes:
        cross_only: the first attention, too, attends to the context (`disable_self_attn` in
            Stability-AI/stablediffusion attention.py).
    """

    heads: int
    cross_only: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l c"],
        context: Float[Array, "b k d"] | None,
        mask: Bool[Array, "b k"] | None,
        images: KeysValues | None = None,
    ) -> Float[Array, "b l c"]:
        def norm(name: str, x: Array) -> Array:
            return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)(x)

        first = (context, mask) if self.cross_only else (None, None)
        x = x + Attention(self.heads, dtype=self.dtype, name="attn1")(norm("norm1", x), *first)
        x = x + Attention(self.heads, dtype=self.dtype, name="attn2")(norm("norm2", x), context, mask, images=images)
        x = x + GEGLU(dtype=self.dtype, name="ff")(norm("norm3", x))
        return constrain(x, BATCH, SPATIAL, None)


class SpatialTransformer(nn.Module):
    """An image's pixels as tokens, through `depth` transformer blocks, added back to the image (LDM).

    SD1's 1x1 convolutions and SD2's linear layers around the blocks are the same map: one Dense serves both,
    and the difference lives in the conversion table.
    """

    heads: int
    depth: int = 1
    groups: int = 32
    cross_only: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        context: Float[Array, "b k d"] | None,
        mask: Bool[Array, "b k"] | None,
        images: Sequence[KeysValues] | None = None,
    ) -> Float[Array, "b h w c"]:
        """Args: `images` are of each block."""
        b, h, w, c = x.shape
        tokens = GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x).reshape(b, h * w, c)
        tokens = nn.Dense(c, dtype=self.dtype, name="proj_in")(tokens)
        names = [f"transformer_blocks_{i}" for i in range(self.depth)]
        if is_scanned(self.remat) and self.depth > 1 and images is None and not self.is_initializing():
            block = TransformerBlock(self.heads, self.cross_only, self.dtype, parent=None)
            own = self.variables["params"]
            tokens = scan_blocks(block, [own[name] for name in names], tokens, context, mask)
        else:
            for name, own in zip(names, images or [None] * self.depth, strict=True):
                block = recomputed(TransformerBlock, self.remat)(self.heads, self.cross_only, self.dtype, name=name)
                tokens = block(tokens, context, mask, own)
        tokens = nn.Dense(c, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="proj_out")(tokens)
        return x + tokens.reshape(b, h, w, c)
