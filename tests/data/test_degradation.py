"""Low resolution: bicubic is Pillow's own; BSR-light blurs, moves nothing, and is never twice the same."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sdjax.core.errors import UserError
from sdjax.data.transforms.degradation import LowResolution, bsr_light


def smooth(seed: int) -> np.ndarray:
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8))
    return np.asarray(coarse.resize((64, 64), Image.Resampling.BICUBIC))


def test_bicubic_is_an_antialiased_resampling():
    """A checkerboard of single pixels becomes even grey."""
    board = np.repeat((np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)
    small = LowResolution(4).random_map({"image": board}, np.random.default_rng(0))["low_res"]
    assert small.shape == (8, 8, 3)
    assert np.abs(small[1:-1, 1:-1].astype(int) - 127).max() <= 2


@pytest.mark.parametrize("factor", [2, 4])
def test_bsr_light_keeps_the_picture_where_it_is(factor):
    """The result is near the means of the image's blocks; nearer than if it is shifted by a pixel, and a shift to one
    side is as bad as one to the other: nothing has moved."""
    rng = np.random.default_rng(0)
    near, shifted = [], []
    for seed in range(24):
        image = smooth(seed)
        small = bsr_light(image, factor, rng).astype(float)
        assert small.shape == (64 // factor, 64 // factor, 3)
        blocks = image.reshape(64 // factor, factor, 64 // factor, factor, 3).mean((1, 3))
        inner = (slice(2, -2), slice(2, -2))
        near.append(np.abs(small - blocks)[inner].mean())
        shifted.append([np.abs(np.roll(small, by, axis) - blocks)[inner].mean() for axis in (0, 1) for by in (-1, 1)])
    up, down, left, right = np.mean(shifted, axis=0)
    assert np.mean(near) < 0.7 * min(up, down, left, right)
    assert abs(up / down - 1.0) < 0.15
    assert abs(left / right - 1.0) < 0.15


def test_bsr_light_is_random_and_of_a_seed():
    image = smooth(0)
    first, same, other = (bsr_light(image, 4, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert (first == same).all()
    assert (first != other).any()


def test_wrong_ones_are_one_line():
    with pytest.raises(UserError, match=r"unknown degradation 'blur' in config.data.degradation"):
        LowResolution(4, "blur")
    with pytest.raises(UserError, match=r"an image of 30x30 pixels cannot be made 4 times smaller"):
        LowResolution(4).random_map({"image": np.zeros((30, 30, 3), np.uint8)}, np.random.default_rng(0))
