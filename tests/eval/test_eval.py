"""Metrics on inputs whose result is known by hand or by another library."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdjax.eval.retrieval import features, retrieval
from sdjax.eval.similarity import psnr


def test_psnr_is_minus_ten_log_mse():
    a = np.zeros((2, 4, 4, 3))
    b = np.stack([np.full((4, 4, 3), 0.1), np.full((4, 4, 3), 0.01)])
    np.testing.assert_allclose(psnr(a, b), [20.0, 40.0], rtol=1e-12)


def test_features_are_adaptive_means():
    """As torch's adaptive_avg_pool2d, to 1e-6; bytes and floats agree."""
    image = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    pooled = torch.nn.functional.adaptive_avg_pool2d(torch.tensor(image / 255.0).permute(0, 3, 1, 2), 32)
    expected = pooled.permute(0, 2, 3, 1).reshape(2, -1).numpy()
    np.testing.assert_allclose(features(image), expected, atol=1e-6)
    np.testing.assert_allclose(features(image / 255.0), expected, atol=1e-6)


def test_retrieval_counts_ranks():
    """A gallery on a line: each sample's rank of its own image can be read off."""
    gallery = np.arange(10.0)[:, None]
    sampled = np.array([[3.1], [3.1], [3.1], [0.2]])
    own = [3, 5, 9, 0]  # ranks 0, 3 (behind 3, 4, 2), 8, 0
    found = retrieval(sampled, own, gallery)
    assert found.top1 == pytest.approx(0.5)
    assert found.top5 == pytest.approx(0.75)
