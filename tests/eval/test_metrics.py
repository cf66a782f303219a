"""Metrics beside torch-fidelity's, scikit-image's and transformers', on the same features, images and weights."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
import transformers
from fidelity import fidelity
from skimage.metrics import structural_similarity
from torch_reference import randomised, translated

from sdjax.checkpoints.networks import clip_image, inception
from sdjax.core.errors import UserError
from sdjax.core.tree import size
from sdjax.eval.frechet import Gaussian, frechet_distance, gaussian
from sdjax.eval.inception_score import inception_score
from sdjax.eval.kernel_distance import kernel_distance
from sdjax.eval.manifold import precision_recall
from sdjax.eval.similarity import ssim
from sdjax.models.clip_image import VARIANTS, CLIPImage
from sdjax.models.inception import Inception, resize

RNG = np.random.default_rng(0)
MIX = RNG.standard_normal((24, 24))
FAKE = (RNG.standard_normal((300, 24)) @ MIX + 1.0).astype("f")
REAL = (RNG.standard_normal((260, 24)) @ MIX * 1.1 + 1.2).astype("f")


def test_frechet_distance_is_torch_fidelitys():
    """1e-6; also with fewer images than features, where their eigenvalues have noise below zero (1e-3)."""
    theirs = fidelity("metric_fid")
    for rows, tolerance in ((300, 1e-6), (20, 1e-3)):
        a, b = FAKE[:rows].astype(np.float64), REAL[:rows].astype(np.float64)
        moments = [theirs.fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
        expected = theirs.fid_statistics_to_metric(*moments, verbose=False)["frechet_inception_distance"]
        assert frechet_distance(gaussian(a, ""), gaussian(b, "")) == pytest.approx(expected, rel=tolerance)
    assert frechet_distance(gaussian(FAKE, ""), gaussian(FAKE, "")) == pytest.approx(0.0, abs=1e-6)


def test_frechet_distance_of_known_gaussians():
    """Of N(0, 1) and N(3, 4) along each axis: 9 + (2 - 1)^2, times the axes."""
    a, b = Gaussian(np.zeros(5), np.eye(5)), Gaussian(np.full(5, 3.0), 4.0 * np.eye(5))
    assert frechet_distance(a, b) == pytest.approx(50.0, rel=1e-12)


def test_kernel_distance_is_torch_fidelitys():
    """The same subsets; 1e-3 of the mean and of the deviation."""
    theirs = fidelity("metric_kid").kid_features_to_metric
    x, y = (torch.from_numpy(v.astype(np.float64)) for v in (FAKE, REAL))
    expected = theirs(x, y, kid_subsets=20, kid_subset_size=100, rng_seed=2020, verbose=False)
    found = kernel_distance(FAKE, REAL, subsets=20, size=100)
    assert found.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3)
    assert found.std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-3)


def test_inception_score_is_torch_fidelitys():
    logits = RNG.standard_normal((103, 50)).astype("f") * 3.0
    expected = fidelity("metric_isc").isc_features_to_metric(torch.from_numpy(logits), splits=10)
    found = inception_score(logits)
    assert found.mean == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert found.std == pytest.approx(expected["inception_score_std"], rel=1e-6)


def test_precision_and_recall_are_torch_fidelitys():
    """Both count images; theirs are divided in float32."""
    theirs = fidelity("metric_prc").prc_features_to_metric
    narrow = FAKE[:150] * np.float32(0.97)
    expected = theirs(torch.from_numpy(narrow), torch.from_numpy(REAL), verbose=False, save_cpu_ram=False)
    found = precision_recall(narrow, REAL)
    assert found == pytest.approx((expected["precision"], expected["recall"]), abs=1e-7)
    assert 0.1 < found.recall < found.precision < 1.0


def test_ssim_is_scikit_images():
    a = RNG.uniform(0, 1, (3, 40, 33, 3)).astype("f")
    b = np.clip(a + 0.2 * RNG.standard_normal(a.shape), 0, 1).astype("f")
    how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    how |= {"data_range": 1.0, "channel_axis": -1}
    expected = [structural_similarity(x.astype(float), y.astype(float), **how) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(ssim(a, b), expected, rtol=1e-4)
    np.testing.assert_allclose(ssim(a, a), 1.0, rtol=1e-6)


@jax.jit
def inception_v3(params, images):
    return Inception().apply({"params": params}, images)


def test_inceptions_features_are_torch_fidelitys(networks):
    """1e-3 of the largest, for images smaller and larger than the network's."""
    theirs, params = networks
    for shape in ((2, 32, 32, 3), (2, 320, 310, 3)):
        images = RNG.integers(0, 256, shape).astype(np.uint8)
        with torch.no_grad():
            pooled, logits = theirs(torch.from_numpy(images).permute(0, 3, 1, 2))
        found = inception_v3(params, images)
        for value, expected in ((found.pooled, pooled), (found.logits, logits)):
            assert expected.std() > 0.01
            np.testing.assert_allclose(value, expected, atol=1e-3 * float(expected.abs().max()))
        assert found.spatial.shape == (2, 17 * 17 * 7)


def test_spatial_features_of_inception(networks):
    theirs, params = networks
    images = RNG.integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    seen = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        theirs(torch.from_numpy(images).permute(0, 3, 1, 2))
    expected = seen[0][:, :7].permute(0, 2, 3, 1).reshape(2, -1)
    found = inception_v3(params, images).spatial
    np.testing.assert_allclose(found, expected, atol=1e-3 * float(expected.abs().max()))


def test_pictures_are_resized_as_in_tensorflow_1():
    theirs = fidelity("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    images = RNG.integers(0, 256, (1, 37, 500, 3)).astype("f")
    expected = theirs(torch.from_numpy(images).permute(0, 3, 1, 2), size=(299, 299), align_corners=False)
    np.testing.assert_allclose(resize(images, 299), expected.permute(0, 2, 3, 1), atol=1e-3)


def test_clips_image_tower_is_transformers():
    """Embeddings to 1e-4, from a whole CLIP and from a tower of its own."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**sizes, "image_size": 28, "patch_size": 7}
    whole = transformers.CLIPConfig(text_config={**sizes, "vocab_size": 99}, vision_config=vision, projection_dim=16)
    towers = {
        "whole": randomised(transformers.CLIPModel(whole)),
        "tower": randomised(
            transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision, projection_dim=16))
        ),
    }
    pictures = RNG.standard_normal((3, 28, 28, 3)).astype("f")
    for theirs in towers.values():
        config = clip_image.from_config(theirs.config.to_dict(), "config.json")
        assert (config.size, config.patch, config.projection_dim) == (28, 7, 16)
        params = translated(theirs, clip_image.TABLE, clip_image.shapes(config))
        with torch.no_grad():
            given = torch.from_numpy(pictures).permute(0, 3, 1, 2)
            tower = theirs.vision_model(pixel_values=given, output_hidden_states=True)
            pooled = theirs.visual_projection(tower.pooler_output)
        found = CLIPImage(config).apply({"params": params}, pictures)
        np.testing.assert_allclose(found.pooled, pooled, atol=1e-4)
        np.testing.assert_allclose(found.penultimate, tower.hidden_states[-2], atol=1e-4)


def test_published_sizes():
    towers = {name: size(clip_image.shapes(config)) for name, config in VARIANTS.items()}
    assert towers == {"clip_l": 303_966_208, "openclip_h": 632_076_800, "openclip_bigg": 1_844_907_264}
    # torch-fidelity's, with the running means and variances and without the counts of batches.
    assert size(inception.shapes()) == 23_885_392


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: gaussian(FAKE[:1], "sampled"), "sampled: a covariance needs 2 images or more, and there is 1"),
        (lambda: gaussian(np.ones((4, 3)), "real"), "real: all 4 images are alike, so their covariance is zero"),
        (
            lambda: gaussian(np.array([[0, np.nan], [1, 2.0]]), "real"),
            "real: the features of 1 images are not",
        ),
        (lambda: precision_recall(FAKE[:3], REAL), "look at 3 neighbours, and there are 3 sampled and 260 real"),
        (lambda: kernel_distance(FAKE[:9], REAL), "KID takes subsets of 1000 images, and there are 9 and 260"),
        (lambda: inception_score(FAKE[:9]), "takes 10 splits, and there are 9 images"),
        (lambda: ssim(np.zeros((1, 8, 20, 3)), np.zeros((1, 8, 20, 3))), "sides of 11 pixels or more"),
    ],
)
def test_too_little_to_judge_is_one_line(wrong, message):
    with pytest.raises(UserError) as error:
        wrong()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
