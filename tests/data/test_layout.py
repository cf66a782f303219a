"""Layouts as tokens, beside numbers worked out by hand from taming-transformers' rules."""

from __future__ import annotations

import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.data.text.box_tokens import LayoutTokens
from sdjax.data.transforms.conditions import Layout

TOKENS = LayoutTokens(classes=601)


def test_an_object_is_its_class_and_two_corners():
    """90 points a side: (0.5, 0.25) is round(0.25 * 89) * 90 + round(0.5 * 89) = 22 * 90 + 44 (Python rounds 44.5 to
    44), (1, 0.75) is 67 * 90 + 89; then 29 times the last token three times, then the image's own corners."""
    found = TOKENS.encode([7], np.array([[0.5, 0.25, 0.5, 0.5]]))
    assert found.shape == (92,)
    assert found.dtype == np.int32
    assert found[:3].tolist() == [7, 22 * 90 + 44, 67 * 90 + 89]
    assert (found[3:90] == 8191).all()
    assert found[90:].tolist() == [0, 89 * 90 + 89]


def test_objects_are_shuffled_with_their_boxes():
    rng = np.random.default_rng(0)
    boxes = np.array([[0.1 * i, 0.0, 0.1, 0.1] for i in range(6)], np.float32)
    element = {"objects": np.arange(6), "boxes": boxes}
    seen = set()
    for _ in range(8):
        tokens = Layout(TOKENS).random_map(element, rng)["tokens"][:18].reshape(6, 3)
        for kind, corner, _ in tokens:
            assert corner == round(0.1 * kind * 89)
        seen.add(tuple(tokens[:, 0]))
    assert len(seen) > 4


@pytest.mark.parametrize(
    ("kinds", "box", "message"),
    [
        ([601], [0, 0, 1, 1], "class 601 of a layout is not one of 0 to 600"),
        ([-1], [0, 0, 1, 1], "class -1 of a layout"),
        ([0], [0.5, 0.5, 0.6, 0.1], "the box x=0.5, y=0.5, width=0.6, height=0.1 is not inside the image"),
        ([0], [-0.1, 0.5, 0.6, 0.1], "is not inside the image"),
        ([0], [0.1, 0.5, 0.0, 0.1], "is not inside the image"),
        ([0], [float("nan"), 0.5, 0.1, 0.1], "is not inside the image"),
    ],
)
def test_what_is_outside_is_one_line(kinds, box, message):
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        TOKENS.encode(kinds, np.array([box]))
    assert message in str(error.value)


def test_too_many_objects_or_classes_are_one_line():
    with pytest.raises(UserError, match=r"a layout of 31 objects; the model takes at most 30"):
        TOKENS.encode([0] * 31, np.tile([0.0, 0.0, 1.0, 1.0], (31, 1)))
    with pytest.raises(UserError, match="601 classes need more than 500 tokens"):
        LayoutTokens(601, vocabulary=500)
