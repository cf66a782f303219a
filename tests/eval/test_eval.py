"""Metrics on inputs whose result is known by hand or by another library."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdjax.checkpoints.clip_pair import read_clip
from sdjax.eval.checkpoint import Judge, judged
from sdjax.eval.clip_score import image_embeddings
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


def test_a_clip_judges_by_all_captions(clip_folder):
    """Captions whose embeddings are those of the images: a score of 100, and every image finds its own. Of captions in
    another order none does. The kind of Inception Score is exp of the mean KL of zero-shot classes, by hand."""
    pair = read_clip(clip_folder)._replace(logit_scale=3.0)
    images = np.random.default_rng(0).integers(0, 256, (8, 28, 28, 3), np.uint8)
    embedded = image_embeddings(pair, [{"image": image} for image in images], 4)
    order = np.random.default_rng(1).permutation(8)
    judge, own = Judge(pair, embedded[order], 4), np.argsort(order)
    found = judged(judge, images, own)
    assert (found["clip_score"], found["clip_top1"], found["clip_top5"]) == (100.0, 1.0, 1.0)
    assert found["clip_matched_above_shuffled"] == 1.0
    other = judged(judge, images, np.roll(own, 1))
    assert other["clip_matched_above_shuffled"] < 1.0
    assert other["clip_top1"] == 0.0
    assert other["clip_score"] < 100.0
    classes = torch.softmax(torch.from_numpy(np.exp(3.0) * embedded @ embedded[order].T).double(), 1)
    divergence = (classes * (classes / classes.mean(0)).log()).sum(1).mean()
    assert found["clip_inception_score"] == pytest.approx(float(divergence.exp()), abs=0.006)
    assert found["clip_inception_score"] > 1.5
