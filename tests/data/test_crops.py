"""Squares drawn anew each time that an image is read."""

import subprocess
import sys

import grain
import numpy as np
import pytest

from configs import ldm
from sdjax.core.errors import UserError
from sdjax.data.text.box_tokens import LayoutTokens
from sdjax.data.transforms.conditions import Layout
from sdjax.data.transforms.crops import RandomSquare, squares, still
from sdjax.data.transforms.images import Flip, Select
from sdjax.parallel.mesh import make_mesh
from sdjax.tasks.base import batches, square_crops

HEIGHT, WIDTH = 96, 144
# Red says the row, green the column.
PLACES = np.stack([*np.mgrid[:HEIGHT, :WIDTH], np.zeros((HEIGHT, WIDTH), int)], -1).astype(np.uint8)
BOXES = np.array([[0.0, 0.0, 0.05, 0.05], [0.4, 0.4, 0.2, 0.2], [0.9, 0.1, 0.1, 0.9]], np.float32)
EXAMPLE = {
    "image": PLACES,
    "label_map": (np.arange(WIDTH) // 36 * np.ones((HEIGHT, 1))).astype(np.uint8),
    "boxes": BOXES,
    "objects": np.arange(3),
    "id": "a",
}


def drawn(shares, size=24, count=200):
    rng = np.random.default_rng(0)
    return [RandomSquare(size, shares).random_map(EXAMPLE, rng) for _ in range(count)]


def test_what_is_seen_is_where_the_crop_says():
    for row in drawn((0.5, 1.0)):
        x, y, width, height = row["crop"]
        left, top, side = x * WIDTH, y * HEIGHT, width * WIDTH
        assert side == pytest.approx(height * HEIGHT, abs=1e-3)
        ends = row["image"][[0, -1], [0, -1], :2].astype(float)
        half = side / 24 / 2
        expected = [[top + half, left + half], [top + side - half, left + side - half]]
        np.testing.assert_allclose(ends + 0.5, expected, atol=1.0)
        seen = (left + (np.arange(24) + 0.5) * side / 24) // 36
        assert np.mean(row["label_map"] == seen) > 0.9  # but for places on an edge


@pytest.mark.parametrize(
    ("shares", "size", "least", "most"),
    [((1.0, 1.0), 24, 96, 96), ((0.5, 1.0), 24, 48, 96), ((2 / 3, 2 / 3), 24, 64, 64), ((0.0, 1.0), 64, 64, 96)],
)
def test_sides_and_places_fill_their_ranges(shares, size, least, most):
    """Uniformly: LDM's 0.5 to 1 of the shorter side; taming's random-1d, and random-2d, from the size in pixels on."""
    rows = drawn(shares, size, 600)
    sides = np.array([row["crop"][2] * WIDTH for row in rows]).round()
    assert (sides.min(), sides.max()) == (least, most)
    assert sides.mean() == pytest.approx((least + most) / 2, abs=0.06 * (most - least) + 1e-6)
    for place, whole in ((0, WIDTH), (1, HEIGHT)):
        share = np.array([row["crop"][place] * whole for row in rows]) / np.maximum(whole - sides, 1)
        if (sides < whole).all():
            assert (share.min(), share.max(), share.mean()) == pytest.approx((0.0, 1.0, 0.5), abs=0.05)


def test_a_small_picture_gives_its_whole_square():
    row = RandomSquare(256, (0.0, 1.0)).random_map(EXAMPLE, np.random.default_rng(0))
    assert row["image"].shape == (256, 256, 3)
    assert row["crop"][3] == 1.0


def test_crops_drop_unseen_objects():
    counts = np.zeros(3)
    for row in drawn((0.3, 0.6)):
        x, y, w, h = (float(v) for v in row["crop"])
        for number, (bx, by, bw, bh) in enumerate(BOXES.astype(float)):
            meets = bx < x + w and bx + bw > x and by < y + h and by + bh > y
            assert meets == (number in row["objects"])
            counts[number] += meets
        np.testing.assert_allclose(row["boxes"], BOXES[row["objects"]], atol=1e-6)
    assert (counts > 0).all()
    assert (counts < 200).all()


def test_a_box_that_overhangs_is_cut_at_the_picture():
    row = {
        **EXAMPLE,
        "boxes": np.array([[0.9, 0.1, 0.2, 0.5], [1.1, 0.0, 0.2, 0.2]], np.float32),
        "objects": np.arange(2),
    }
    rows = [RandomSquare(24).random_map(row, np.random.default_rng(seed)) for seed in range(20)]
    kept = [found for found in rows if len(found["objects"])]
    assert kept
    for found in kept:
        assert found["objects"].tolist() == [0]
        np.testing.assert_allclose(found["boxes"], [[0.9, 0.1, 0.1, 0.5]], atol=1e-6)


def test_the_crop_is_told_in_tokens_and_mirrored():
    """The last two tokens are the corners of what is seen (taming's `encode_crop`)."""
    tokens = LayoutTokens(3, 1024, 4)
    row = {**EXAMPLE, "crop": np.array([0.25, 0.0, 0.5, 0.75], np.float32)}
    rng = np.random.default_rng(0)
    at = lambda x, y: round(y * 31) * 32 + round(x * 31)  # noqa: E731
    assert Layout(tokens).random_map(row, rng)["tokens"][-2:].tolist() == [at(0.25, 0), at(0.75, 0.75)]
    assert Layout(tokens).random_map(EXAMPLE, rng)["tokens"][-2:].tolist() == [0, 1023]
    row["crop"] = np.array([0.1, 0.0, 0.5, 0.75], np.float32)
    mirrored = Flip(1.0).random_map(row, rng)
    np.testing.assert_allclose(mirrored["crop"], [0.4, 0.0, 0.5, 0.75], atol=1e-6)
    np.testing.assert_allclose(mirrored["boxes"][0], [0.95, 0.0, 0.05, 0.05], atol=1e-6)


def test_crops_change_by_epoch_but_not_in_previews():
    found, cuts = squares([EXAMPLE], 24, "random", (0.5, 1.0))
    rows = grain.MapDataset.source(found).seed(0).repeat(3).random_map(cuts[0])
    assert len({rows[i]["image"].tobytes() for i in range(3)}) == 3
    assert rows[1]["image"].tobytes() == rows[1]["image"].tobytes()
    middle = still([EXAMPLE], 24, "random")[0]["image"]
    np.testing.assert_array_equal(middle, still([EXAMPLE], 24, "centre")[0]["image"])


@pytest.mark.parametrize("shares", [(0.5, 0.2), (-0.1, 1.0), (0.5, 1.5), (0.0, 0.0)])
def test_wrong_shares_are_one_line(shares):
    with pytest.raises(UserError, match=r"crop_sides=.* must be two shares with 0 <= first <= second <= 1"):
        RandomSquare(24, shares)


def test_a_wrong_rule_is_one_line():
    with pytest.raises(UserError, match=r"unknown crop 'middle' in .*choose one of: adm, centre, random"):
        squares([EXAMPLE], 24, "middle", (1.0, 1.0))


@pytest.fixture
def config(pictures):
    found = ldm.get_config("super_resolution_tiny")
    found.data.update(source=f"folder:{pictures}", size=16)
    return found


def rows_of(config, count=5):
    pictures, cuts = square_crops(config)
    data = batches(config, pictures, [*cuts, Select(("image",))], make_mesh({"data": -1}))
    return [next(data)["image"] for _ in range(count)]


def test_threads_and_workers_change_nothing(config):
    config.data.threads = 1
    alone = rows_of(config)
    for threads, workers in ((8, 0), (2, 2)):
        config.data.update(threads=threads, workers=workers)
        np.testing.assert_array_equal(rows_of(config), alone)


def test_workers_make_what_is_drawn_from_vectors():
    config = ldm.get_config("super_resolution_tiny")
    config.data.update(source="openmoji", size=16, crop="centre")
    alone = rows_of(config, 1)
    config.data.workers = 1
    np.testing.assert_array_equal(rows_of(config, 1), alone)


def test_a_worker_leaves_signals_to_the_one_that_trains():
    """It goes on after each of them; that it ends with the run is what the tests of runs with workers show."""
    code = "import os,signal;from sdjax.data.loader import _follow_parent as f;f(0,1);"
    code += "[os.kill(os.getpid(), n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)];print('alive')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout == "alive\n", found.stderr


@pytest.mark.parametrize(("threads", "workers"), [(0, 0), (1, -1)])
def test_wrong_numbers_of_readers_are_one_line(config, threads, workers):
    config.data.update(threads=threads, workers=workers)
    with pytest.raises(UserError, match=rf"threads={threads} must be at least 1, config.data.workers={workers} at"):
        rows_of(config)
