"""Hints against OpenCV's (tests/reference/opencv_hints.py) and against A1111's rules."""

from pathlib import Path

import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.data.hints import resize
from sdjax.data.hints.makers import hint_maker, make_hint
from sdjax.data.image_inputs import cubic_weights

OPENCV = np.load(Path(__file__).parent / "opencv_hints.npz")
IMAGE = OPENCV["photograph"]


def off(ours: np.ndarray, name: str) -> int:
    """The largest difference from OpenCV's."""
    theirs = OPENCV[name]
    theirs = theirs if theirs.ndim == ours.ndim else theirs[..., None]
    return int(np.abs(ours.astype(int) - theirs).max())


@pytest.mark.parametrize(
    ("name", "least", "tolerance"),
    [("canny", 0.02, 0), ("canny:300:600", 0.02, 0), ("lineart", 0.05, 1), ("scribble", 0.05, 0), ("blur", 0.9, 1)],
)
def test_hints_are_those_of_opencv(name, least, tolerance):
    hint = hint_maker(name)(IMAGE)
    assert hint.shape == IMAGE.shape
    assert np.mean(hint > 0) > least  # or black would do
    assert off(hint, name) <= tolerance


def test_a_palette_has_one_colour_a_square():
    assert off(hint_maker("palette:16")(IMAGE), "palette:16") <= 1


@pytest.mark.parametrize("name", ["nearest", "area", "cubic"])
def test_interpolation_is_that_of_opencv(name):
    weights = {"nearest": resize.nearest_weights, "area": resize.area_weights, "cubic": cubic_weights}[name]
    assert off(resize.interpolated(IMAGE, OPENCV[name].shape[:2], weights), name) <= (name != "nearest")


def test_lines_are_thinned_as_by_opencv():
    edges = OPENCV["canny"] > 0
    assert resize.otsu(IMAGE[..., 0]) == OPENCV["otsu"]
    for name, ends in {"thinned": True, "without_ends": False}.items():
        assert np.array_equal(resize.thinned(edges, ends), OPENCV[name] > 0)
    assert np.sum(OPENCV["without_ends"]) < np.sum(OPENCV["thinned"]) < np.sum(OPENCV["canny"])


def test_labels_are_never_mixed_and_lines_stay_thin():
    labels = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8)[np.arange(64).reshape(8, 8) % 3]
    for size in ((5, 5), (13, 19)):
        kept = resize.resized(labels, size).reshape(-1, 3)
        assert {tuple(color) for color in kept} <= {tuple(color) for color in labels.reshape(-1, 3)}
    line = np.zeros((20, 20, 3), np.uint8)
    line[9] = 255
    wide = resize.resized(line, (60, 60))
    assert (wide[:, 4:-4, 0] == 255).sum(0).tolist() == [1] * 52


def test_resize_modes_are_those_of_a1111():
    """Just Resize stretches, Crop and Resize takes the middle, Resize and Fill has a border of the median colour."""
    hint = np.full((8, 16, 3), 60, np.uint8)
    hint[:, 4:12] = np.arange(4, 12, dtype=np.uint8)[None, :, None] * 20
    assert np.array_equal(resize.fit(hint, (8, 8), "crop"), hint[:, 4:12])
    filled = resize.fit(hint, (32, 16), "fill")
    assert np.array_equal(filled[12:20], hint)
    assert set(filled[:12].ravel()) == set(filled[20:].ravel()) == {60}
    assert np.array_equal(resize.fit(hint, (8, 8), "stretch"), resize.resized(hint, (8, 8)))


@pytest.mark.parametrize("mode", [None, *resize.RESIZES])
def test_edges_are_found_at_the_size_of_the_image(mode):
    """Found before the image was made small, they would be grey or gone ("pixel perfect")."""
    y, x = np.indices((256, 512))
    circle = np.where((y - 128) ** 2 + (x - 256) ** 2 < 90**2, 0, 255).astype(np.uint8)
    circle = circle if mode else circle[:, 128:-128]
    hint = make_hint(circle, "canny", (64, 64), mode)
    assert hint.shape == (64, 64, 3)
    assert set(np.unique(hint)) == {0.0, 1.0}
    inked = hint[..., 0] > 0
    assert abs(inked.any(1).sum() - (23 if mode == "fill" else 45)) <= 2  # the circle's height
    assert 60 < inked.sum() < 250  # of a line one pixel wide


@pytest.mark.parametrize("mode", resize.RESIZES)
@pytest.mark.parametrize("maker", ["none", "canny"])
def test_strips_are_brought_to_size(maker, mode):
    """However little is left of a side, and however much the other would be enlarged."""
    for shape in ((1, 1100, 3), (3000, 1, 3)):
        assert make_hint(np.full(shape, 90, np.uint8), maker, (512, 512), mode).shape == (512, 512, 3)


@pytest.mark.parametrize(("shape", "size"), [((48, 63), (48, 56)), ((519, 775), (664, 992)), ((900, 1600), (288, 512))])
def test_hints_are_cut_to_sides_of_whole_latents(shape, size):
    """The sizes of images that are made from hints, of a second pass, and of the same proportions."""
    assert make_hint(np.full((*shape, 3), 90, np.uint8), "none", size).shape == (*size, 3)


def test_hints_of_other_proportions_are_refused():
    """Silently cut they would show another part than the one that was drawn."""
    tall, size = np.zeros((60, 40, 3), np.uint8), (40, 40)
    line = r"control_image has 40x60 pixels, the image 40x40: their proportions differ; choose control_resize: stretch,"
    for maker in ("none", "canny"):
        with pytest.raises(UserError, match=rf"^{line} crop, fill$"):
            make_hint(tall, maker, size)
        for mode in resize.RESIZES:
            assert make_hint(tall, maker, size, mode).shape == (40, 40, 3)


def test_thresholds_of_canny_come_in_either_order():
    """As in OpenCV (cv2.Canny: `if (low_thresh > high_thresh) std::swap`)."""
    assert np.array_equal(hint_maker("canny:200:100")(IMAGE), hint_maker("canny")(IMAGE))


def test_hints_without_neighbours():
    bytes_ = IMAGE[:40, :40]
    image = bytes_ / np.float32(255.0)
    assert np.allclose(make_hint(bytes_, "none", (40, 40)), image)
    assert np.allclose(make_hint(bytes_, "invert", (40, 40), "crop"), 1.0 - image, atol=1e-6)
    grey = make_hint(bytes_, "grey", (40, 40))
    assert np.abs(grey - (image @ [0.299, 0.587, 0.114])[..., None]).max() < 0.5 / 255 + 1e-6
    mask = np.zeros((40, 40, 1), np.float32)
    mask[:, 20:] = 1.0
    hint = make_hint(bytes_, "inpaint", (40, 40), mask=mask)
    assert np.allclose(hint[:, :20], image[:, :20])
    assert np.all(hint[:, 20:] == -1.0)


@pytest.mark.parametrize(
    ("name", "mode", "message"),
    [
        ("cany", None, "unknown control_from 'cany'"),
        ("canny:100", None, "control_from 'canny:100': write canny:100:200"),
        ("blur:nine", None, "control_from 'blur:nine': write blur:9"),
        ("blur:-1", None, "numbers above 0"),
        ("grey:1", None, "write grey"),
        ("inpaint", None, "needs a mask"),
        ("none", "squeeze", "unknown control_resize 'squeeze'"),
    ],
)
def test_faults_are_said(name, mode, message):
    with pytest.raises(UserError) as error:
        make_hint(IMAGE, name, (16, 16), mode)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
