"""Attention, by the kernel that suits the platform: cuDNN's on GPUs, Pallas' on TPUs, blocks of queries on CPUs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sdjax.ops.partition import BATCH, SPATIAL, TENSOR, per_shard

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
    bias: Float[Array, "h q k"] | None = None,
) -> Float[Array, "b q h d"]:
    """softmax(q k^T / sqrt(d)) v, or with a bias softmax(q k^T + bias) v, the softmax in float32.

    Over a mesh every device attends with its own images, heads and, unless causal, queries; kernels need not know.

    Args:
        mask: which keys may be attended to.
        causal: whether query i sees only keys up to i.
        bias: of scores that are not scaled, as T5 has them; the same for all images.
    """
    split = None if causal else SPATIAL
    queries, keys = (BATCH, split, TENSOR, None), (BATCH, None, TENSOR, None)
    wishes = (queries, keys, keys, (BATCH, None), (TENSOR, split, None))
    return per_shard(partial(_on_one_device, causal=causal), (q, k, v, mask, bias), wishes)


def _on_one_device(q: Array, k: Array, v: Array, mask: Array | None, bias: Array | None, *, causal: bool) -> Array:
    bias_mask = None if mask is None else mask[:, None, None, :]
    if bias is not None:  # of a text, which is short and encoded once
        return jax.nn.dot_product_attention(
            q, k, v, bias[None], bias_mask, is_causal=causal, scale=1.0, implementation="xla"
        )
    platform = _platform.get() or jax.default_backend()
    if platform == "cpu":
        return _blocked(q, k, v, mask, causal)
    if platform == "tpu" and mask is None and not causal and _flash_takes(q, k):
        return _tpu_flash(q, k, v)
    kernel = "cudnn" if platform == "gpu" and _cudnn_takes(q) else "xla"
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
