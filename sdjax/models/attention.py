"""Attention, with the kernel that suits the platform, and the transformer blocks of latent diffusion."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sdjax.core.partition import BATCH, SPATIAL, TENSOR, constrain, constrain_picture, per_shard
from sdjax.models.layers import GroupNorm
from sdjax.models.remat import is_scanned, recomputed, scan_blocks

_platform: ContextVar[str | None] = ContextVar("attention_platform", default=None)
CACHED_SCORES = 2**22  # 16 MiB in float32


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Traces attention for another platform ("cpu", "gpu", "tpu") than the default one, for ahead-of-time compiling."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def dot_product_attention(
    q: Float[Array, "b q h d"],
    k: Float[Array, "b k h d"],
    v: Float[Array, "b k h d"],
    *,
    mask: Bool[Array, "b k"] | None = None,
    causal: bool = False,
) -> Float[Array, "b q h d"]:
    """softmax(q k^T / sqrt(d)) v, the softmax in float32.

    Over a mesh every device attends with its own images, heads and, unless causal, queries; kernels need not know.

    Args:
        mask: which keys may be attended to.
        causal: whether query i sees only keys up to i.
    """
    queries = (BATCH, None if causal else SPATIAL, TENSOR, None)
    keys = (BATCH, None, TENSOR, None)
    return per_shard(partial(_on_one_device, causal=causal), (q, k, v, mask), (queries, keys, keys, (BATCH, None)))


def _on_one_device(q: Array, k: Array, v: Array, mask: Array | None, *, causal: bool) -> Array:
    platform = _platform.get() or jax.default_backend()
    if platform == "cpu":
        return _blocked(q, k, v, mask, causal)
    if platform == "tpu" and mask is None and not causal and _flash_takes(q, k):
        return _tpu_flash(q, k, v)
    kernel = "cudnn" if platform == "gpu" and _cudnn_takes(q) else "xla"
    bias_mask = None if mask is None else mask[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=bias_mask, is_causal=causal, implementation=kernel)


def _cudnn_takes(q: Array) -> bool:
    """cuDNN's fused kernel is for half precision and head sizes up to 128 that are multiples of 8."""
    return q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def _flash_takes(q: Array, k: Array) -> bool:
    """The Pallas kernel wants whole blocks of 128 tokens, and pays only for long sequences."""
    return q.shape[1] % 128 == 0 and k.shape[1] % 128 == 0 and q.shape[1] >= 1024


def _tpu_flash(q: Array, k: Array, v: Array) -> Array:
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    heads_first = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    return jnp.swapaxes(flash_attention(*heads_first, sm_scale=1 / math.sqrt(q.shape[-1])), 1, 2)


def _blocked(q: Array, k: Array, v: Array, mask: Array | None, causal: bool) -> Array:
    """A head at a time, and of its queries so many that their scores stay in a CPU's last-level cache."""
    batch, length, heads, size = q.shape
    rows = min(length, max(1, CACHED_SCORES // k.shape[1]))
    starts = jnp.arange(0, length, rows)[:, None]

    def one_head(head: tuple[Array, Array, Array, Array | None]) -> Array:
        hq, hk, hv, seen = head  # [n r d], [d k], [k d+1], [k]

        def one_block(block: tuple[Array, Array]) -> Array:
            queries, start = block
            scores = jnp.matmul(queries, hk, preferred_element_type=jnp.float32)
            if seen is not None:
                scores = jnp.where(seen, scores, -jnp.inf)
            if causal:
                scores = jnp.where(jnp.arange(k.shape[1]) <= start + jnp.arange(rows)[:, None], scores, -jnp.inf)
            weights = jnp.exp((scores - scores.max(axis=-1, keepdims=True)) / math.sqrt(size))
            # The values' last column is ones: it sums the weights on the way.
            out = jnp.matmul(weights.astype(v.dtype), hv, preferred_element_type=jnp.float32)
            return (out[:, :size] / out[:, size:]).astype(v.dtype)

        return jax.lax.map(one_block, (hq, starts))

    padded = jnp.pad(q, ((0, 0), (0, -length % rows), (0, 0), (0, 0)))
    blocks = padded.reshape(batch, -1, rows, heads, size).transpose(0, 3, 1, 2, 4)  # [b h n r d]
    summed = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    arrays = blocks, k.transpose(0, 2, 3, 1), summed.transpose(0, 2, 1, 3)
    seen = None if mask is None else jnp.repeat(mask, heads, axis=0)
    out = jax.lax.map(one_head, (*(x.reshape(-1, *x.shape[2:]) for x in arrays), seen))
    return out.reshape(blocks.shape).transpose(0, 2, 3, 1, 4).reshape(padded.shape)[:, :length]


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
    ) -> Float[Array, "b q c"]:
        context = x if context is None else context
        size = self.head_size or x.shape[-1] // self.heads

        def project(name: str, tokens: Array) -> Array:
            out = nn.Dense(self.heads * size, use_bias=self.qkv_bias, dtype=self.dtype, name=name)(tokens)
            return out.reshape(*out.shape[:-1], self.heads, size)

        q, k, v = project("to_q", x), project("to_k", context), project("to_v", context)
        out = dot_product_attention(q, k, v, mask=mask, causal=causal)
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
        return constrain_picture(x + tokens.reshape(b, h, w, c))


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
        self, x: Float[Array, "b l c"], context: Float[Array, "b k d"] | None, mask: Bool[Array, "b k"] | None
    ) -> Float[Array, "b l c"]:
        def norm(name: str, x: Array) -> Array:
            return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)(x)

        first = (context, mask) if self.cross_only else (None, None)
        x = x + Attention(self.heads, dtype=self.dtype, name="attn1")(norm("norm1", x), *first)
        x = x + Attention(self.heads, dtype=self.dtype, name="attn2")(norm("norm2", x), context, mask)
        x = x + GEGLU(dtype=self.dtype, name="ff")(norm("norm3", x))
        return constrain(x, BATCH, SPATIAL, None)


class SpatialTransformer(nn.Module):
    """A picture's pixels as tokens, through `depth` transformer blocks, added back to the picture (LDM).

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
        self, x: Float[Array, "b h w c"], context: Float[Array, "b k d"] | None, mask: Bool[Array, "b k"] | None
    ) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        tokens = GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x).reshape(b, h * w, c)
        tokens = nn.Dense(c, dtype=self.dtype, name="proj_in")(tokens)
        names = [f"transformer_blocks_{i}" for i in range(self.depth)]
        if is_scanned(self.remat) and self.depth > 1 and not self.is_initializing():
            block = TransformerBlock(self.heads, self.cross_only, self.dtype, parent=None)
            own = self.variables["params"]
            tokens = scan_blocks(block, [own[name] for name in names], tokens, context, mask)
        else:
            for name in names:
                block = recomputed(TransformerBlock, self.remat)(self.heads, self.cross_only, self.dtype, name=name)
                tokens = block(tokens, context, mask)
        tokens = nn.Dense(c, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="proj_out")(tokens)
        return x + tokens.reshape(b, h, w, c)
