"""Masks of holes: their share, their shapes, and that a seed gives the same ones."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from sdjax.core.errors import UserError
from sdjax.data.transforms.masks import RandomMask, boxes, strokes

ELEMENT = {"image": np.zeros((48, 64, 3), np.uint8)}


def test_the_share_of_a_hole_is_within_its_limits():
    rng = np.random.default_rng(0)
    masks = [RandomMask(0.1, 0.3).random_map(ELEMENT, rng)["mask"] for _ in range(40)]
    assert {mask.shape for mask in masks} == {(48, 64, 1)}
    assert set(np.unique(masks)) == {0, 1}
    shares = [mask.mean() for mask in masks]
    assert 0.1 <= min(shares) < 0.15
    assert 0.25 < max(shares) <= 0.3


def test_inpainting_mask_shapes():
    """At most three boxes, each filling its own bounding box where it meets no other; a stroke is a union of discs."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        labels, count = ndimage.label(boxes((48, 64), rng))
        assert 1 <= count <= 3
        alone = [labels[where] for where in ndimage.find_objects(labels)]
        assert count < 3 or all((part > 0).all() for part in alone)
        stroke, disc = strokes((96, 128), rng), np.hypot(*(np.indices((5, 5)) - 2)) <= 2
        opened = ndimage.binary_opening(np.pad(stroke, 8, mode="edge"), disc)[8:-8, 8:-8]
        assert opened.sum() > 0.9 * stroke.sum()


def test_a_seed_gives_the_same_mask():
    first, second, other = (RandomMask().random_map(ELEMENT, np.random.default_rng(s))["mask"] for s in (3, 3, 4))
    assert (first == second).all()
    assert (first != other).any()


@pytest.mark.parametrize("limits", [(0.0, 0.5), (0.5, 0.4), (0.2, 1.0)])
def test_wrong_limits_are_one_line(limits):
    with pytest.raises(UserError, match="choose two shares between 0 and 1, ascending"):
        RandomMask(*limits)
    with pytest.raises(UserError, match="no mask of 100 covered such a share"):
        RandomMask(0.98, 0.99).random_map(ELEMENT, np.random.default_rng(0))
