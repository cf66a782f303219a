"""Buckets: the published table, the nearest by ratio, and images whose crop is where `sizes` says."""

import numpy as np
import pytest
from PIL import Image

from sdjax.core.errors import UserError
from sdjax.data.transforms.buckets import (
    SDXL,
    Size,
    ToBucket,
    assign,
    cover,
    nearest,
    occupied,
    resize_crop,
    table,
    without_small,
)
from sdjax.data.transforms.images import Flip


def test_sdxl_table_is_the_papers():
    assert len(set(SDXL)) == 40
    assert all(h % 64 == w % 64 == 0 and 0.85 < h * w / 1024**2 <= 1 for h, w in SDXL)
    ratios = [h / w for h, w in SDXL]
    assert ratios == sorted(ratios)
    # The column of aspect ratios of appendix I, rounded there to two digits.
    paper = """.25 .26 .27 .28 .32 .33 .35 .4 .42 .48 .5 .52 .57 .6 .68 .72 .78 .82 .88 .94 1 1.07 1.13 1.21 1.29
        1.38 1.46 1.67 1.75 2 2.09 2.4 2.5 2.89 3 3.11 3.62 3.75 3.88 4"""
    np.testing.assert_allclose(ratios, np.array(paper.split(), float), atol=0.0051)


@pytest.mark.parametrize(("side", "step"), [(512, 64), (768, 64), (1024, 64), (256, 32), (64, 64)])
def test_tables_of_any_area(side, step):
    sizes = table(side, step)
    assert Size(side, side) in sizes
    assert {Size(w, h) for h, w in sizes} == set(sizes)
    assert len(set(sizes)) == len(sizes)
    for h, w in sizes:
        assert h % step == w % step == 0
        assert side**2 - step * max(h, w) < h * w <= side**2 or h * w <= side**2 < (min(h, w)) * (max(h, w) + step)
        assert max(h / w, w / h) <= 4
    with pytest.raises(UserError, match="choose a multiple of the step, 64"):
        table(500)


def test_sd1_table_is_the_one_known_from_novelai():
    assert set(table(512)) >= {(512, 512), (448, 576), (384, 640), (320, 768), (256, 1024), (640, 384)}


def test_nearest_is_by_the_logarithm_and_symmetric():
    sizes = table(512)
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(1, 3000, (2, 500))
    found = nearest(sizes, heights, widths)
    mirrored = nearest([Size(w, h) for h, w in sizes], widths, heights)
    np.testing.assert_array_equal(found, mirrored)
    for h, w, index in zip(heights, widths, found, strict=True):
        factors = [max(h * bw / (w * bh), w * bh / (h * bw)) for bh, bw in sizes]
        assert factors[index] <= min(factors) * (1 + 1e-9)
        assert nearest(sizes, int(h), int(w)) == index
    for index, (h, w) in enumerate(SDXL):
        assert nearest(SDXL, 3 * h, 3 * w) == index


def test_cover_touches_one_side_and_covers_the_other():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        h, w, *target = rng.integers(1, 900, 4).tolist()
        covered = cover(h, w, Size(*target))
        assert covered.height >= target[0]
        assert covered.width >= target[1]
        assert covered.height == target[0] or covered.width == target[1]
        assert abs(covered.height - h * max(target[0] / h, target[1] / w)) <= 0.5 + 1e-9
        assert abs(covered.width - w * max(target[0] / h, target[1] / w)) <= 0.5 + 1e-9


@pytest.mark.parametrize("shape", [(90, 150), (301, 120), (50, 61), (64, 64), (97, 64)])
def test_crop_equals_resize_then_crop(shape):
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (*shape, 3), np.uint8)
    target = Size(64, 64)
    covered = cover(*shape, target)
    whole = np.asarray(Image.fromarray(image).resize((covered.width, covered.height), Image.Resampling.LANCZOS))
    for top in {0, (covered.height - 64) // 3, covered.height - 64}:
        for left in {0, (covered.width - 64) // 3, covered.width - 64}:
            cropped = resize_crop(image, target, top, left).astype(int)
            assert np.abs(cropped - whole[top : top + 64, left : left + 64]).max() <= 1


def located(height, width):
    """An image whose red says the row, and whose green says the column, of a pixel."""
    image = np.zeros((height, width, 3), np.float64)
    image[..., 0] = np.linspace(0, 255, height)[:, None]
    image[..., 1] = np.linspace(0, 255, width)
    return image.round().astype(np.uint8)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shape", [(200, 330), (330, 200), (1000, 260), (37, 61)])
def test_sizes_say_where_the_crop_is(shape, flip):
    buckets = (Size(64, 64),)
    image = located(*shape)
    source = image[:, ::-1] if flip else image
    seen = set()
    for seed in range(20):
        element = ToBucket(buckets).random_map({"image": image}, np.random.default_rng(seed))
        if flip:
            element = Flip(1.0).random_map(element, np.random.default_rng(0))
        h, w, top, left, th, tw = element["sizes"].astype(int)
        assert element["sizes"].dtype == np.float32
        assert (h, w, th, tw) == (*shape, 64, 64)
        np.testing.assert_allclose(
            element["image"].astype(int), resize_crop(np.ascontiguousarray(source), Size(64, 64), top, left), atol=1
        )
        seen.add((top, left))
    assert len(seen) > 5
    covered = cover(*shape, Size(64, 64))
    assert max(top + left for top, left in seen) <= max(covered) - 64


def test_centre_crops_and_extreme_aspect():
    transform = ToBucket(table(64, 16), crop="centre")
    for shape in [(40, 100), (1, 60_000), (60_000, 1)]:
        element = transform.random_map({"image": located(*shape), "caption": "x"}, np.random.default_rng(0))
        bucket = transform.buckets[element["bucket"]]
        assert element["image"].shape == (*bucket, 3)
        assert element["caption"] == "x"
        covered = cover(*shape, bucket)
        np.testing.assert_array_equal(
            element["sizes"][2:4], [(covered.height - bucket.height) // 2, (covered.width - bucket.width) // 2]
        )
    with pytest.raises(UserError, match="unknown crop 'center'; choose one of: centre, random"):
        ToBucket(SDXL, crop="center")


class Sizes:
    def __init__(self, sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        return {"image": np.zeros((*self.sizes[index], 3), np.uint8)}

    def id(self, index):
        return str(index)

    def size(self, index):
        return self.sizes[index]


def test_assigned_buckets_match_the_transform():
    sizes = [tuple(size) for size in np.random.default_rng(0).integers(20, 200, (60, 2)).tolist()]
    source, buckets = Sizes(sizes), table(64, 16)
    for used in (buckets, occupied(source, buckets, 8)):
        assigned = assign(source, used)
        for index, bucket in enumerate(assigned):
            assert ToBucket(used).random_map(source[index], np.random.default_rng(0))["bucket"] == bucket
    counts = np.bincount(assigned, minlength=len(used))
    assert counts.min() >= 8
    assert counts.sum() == 60
    assert 1 < len(used) < len(buckets)
    with pytest.raises(UserError, match="60 images cannot fill a bucket of 61"):
        occupied(source, buckets, 61)


def test_rows_of_small_buckets_can_be_left_out():
    assigned = np.array([0, 0, 2, 1, 2, 0, -1])
    np.testing.assert_array_equal(without_small(assigned, 2), [0, 0, 2, -1, 2, 0, -1])
    np.testing.assert_array_equal(without_small(assigned, 4), [-1] * 7)
