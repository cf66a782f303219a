from __future__ import annotations

import contextlib

import jax
import numpy as np
import pytest

from sdjax.ops.attention import _blocked, compiling_for, dot_product_attention

LENGTHS = {1024: "whole blocks of queries", 1100: "no whole number of blocks"}


def derivation(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None, causal: bool) -> np.ndarray:
    """softmax(q k^T / sqrt(d)) v in float64, one query at a time."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, i, h in np.ndindex(q.shape[:3]):
        seen = np.ones(k.shape[1], bool) if mask is None else mask[b].copy()
        if causal:
            seen[i + 1 :] = False
        scores = k[b, seen, h] @ q[b, i, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, i, h] = weights @ v[b, seen, h] / weights.sum()
    return out


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_kernels_match_float64(length: int, masked: bool, causal: bool):
    rng = np.random.default_rng(length)
    q, k, v = (rng.standard_normal((2, length, 3, 8), np.float32) * 2 for _ in range(3))
    mask = None
    if masked:
        mask = rng.random((2, length)) < 0.5
        mask[:, 0] = True  # the first query of causal attention sees nothing else
    expected = derivation(q, k, v, mask, causal)
    blocked = jax.jit(lambda q, k, v: _blocked(q, k, v, mask, causal))(q, k, v)
    np.testing.assert_allclose(blocked, expected, atol=1e-5, rtol=1e-5)
    if masked or causal:  # with neither, a TPU takes a Pallas kernel, which needs a TPU
        with compiling_for("tpu"):
            xla = dot_product_attention(q, k, v, mask=mask, causal=causal)
        np.testing.assert_allclose(xla, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_a_bias_is_added_to_scores_that_are_not_scaled(platform: str):
    """T5's, beside the sum in float64."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 12, 3, 8), np.float32) for _ in range(3))
    bias, mask = rng.standard_normal((3, 12, 12), np.float32), rng.random((2, 12)) < 0.5
    mask[:, 0] = True
    scores = np.einsum("bqhd,bkhd->bhqk", q, k, dtype=np.float64) + bias
    weights = np.where(mask[:, None, None], np.exp(scores - scores.max()), 0.0)
    expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    with compiling_for(platform):
        found = jax.jit(lambda q, k, v: dot_product_attention(q, k, v, mask=mask, bias=bias))(q, k, v)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_keys_may_be_fewer_than_queries():
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 1024, 2, 8), np.float32)
    k, v = (rng.standard_normal((1, 77, 2, 8), np.float32) for _ in range(2))
    np.testing.assert_allclose(_blocked(q, k, v, None, False), derivation(q, k, v, None, False), atol=1e-5, rtol=0)


def test_platform_chooses_the_kernel():
    q = np.ones((1, 1024, 1, 8), np.float32)

    def traced() -> str:
        return str(jax.make_jaxpr(lambda q: dot_product_attention(q, q, q))(q))

    with compiling_for("tpu"):
        assert "pallas" in traced()
    with contextlib.suppress(RuntimeError), compiling_for("tpu"):
        raise RuntimeError
    assert "pallas" not in traced()
