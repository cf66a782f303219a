"""Given pictures and masks against Pillow's and torch's own resizing, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sdjax.core.errors import UserError
from sdjax.pipeline.inputs import load_masks, load_pictures

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (48, 60, 3), np.uint8)


def test_all_forms_of_a_picture_are_the_same(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "x.png")
    expected = PICTURE / 127.5 - 1.0
    for given in (PICTURE, Image.fromarray(PICTURE), tmp_path / "x.png", str(tmp_path / "x.png"), PICTURE / 255.0):
        np.testing.assert_allclose(load_pictures(given, 2, (48, 60)), expected[None], atol=1e-6)
    np.testing.assert_allclose(load_pictures([PICTURE, 255 - PICTURE], 2, (48, 60))[1], -expected, atol=1e-6)


def test_the_largest_centred_part_is_resampled():
    expected = Image.fromarray(np.ascontiguousarray(PICTURE[:, 6:54])).resize((16, 16), Image.Resampling.LANCZOS)
    np.testing.assert_allclose(load_pictures(PICTURE, 1, (16, 16))[0], np.asarray(expected) / 127.5 - 1.0, atol=1e-6)
    wide = Image.fromarray(np.ascontiguousarray(PICTURE[9:39])).resize((40, 20), Image.Resampling.LANCZOS)
    np.testing.assert_allclose(load_pictures(PICTURE, 1, (20, 40))[0], np.asarray(wide) / 127.5 - 1.0, atol=1e-6)


@pytest.mark.parametrize("latents", [(6, 6), (12, 12), (48, 48)])
def test_masks_take_the_nearest_pixel_as_torch_does(latents):
    grey = RNG.integers(0, 256, (48, 48), np.uint8)
    binary = torch.from_numpy((grey >= 128).astype(np.float32))[None, None]
    expected = torch.nn.functional.interpolate(binary, size=latents)[0, 0].numpy()
    for given in (grey, Image.fromarray(grey), (grey / 255.0).astype(np.float32), grey >= 128):
        np.testing.assert_array_equal(load_masks(given, 1, (48, 48), latents)[0, ..., 0], expected)


def test_a_mask_is_cut_like_its_picture():
    """A white square in the picture's middle is in the middle of the latents, whatever the proportions."""
    mask = np.zeros((48, 60), np.uint8)
    mask[12:36, 18:42] = 255
    for kept in load_masks(mask, 1, (32, 32), (8, 8))[..., 0]:
        np.testing.assert_array_equal(np.argwhere(kept).min(0), [2, 2])
        np.testing.assert_array_equal(np.argwhere(kept).max(0), [5, 5])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((0, 4, 3), np.uint8), r"\[0, 4, 3\]"),
        (np.full((4, 4, 3), 3.0), r"floats in \[0, 1\]"),
        (np.full((4, 4, 3), np.nan), r"floats in \[0, 1\]"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        ([PICTURE] * 3, "3 pictures in init_image for 2 prompts"),
    ],
)
def test_what_is_no_picture(given, message):
    with pytest.raises(UserError, match=message):
        load_pictures(given, 2, (8, 8))
