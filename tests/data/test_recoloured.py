"""OpenMoji in other colours."""

from __future__ import annotations

import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.data.images import read_image
from sdjax.data.sources.open import open_rows
from sdjax.data.sources.openmoji import render


def test_channels_change_places_and_captions_begin_with_the_words():
    plain, other = open_rows("openmoji_recoloured:rgb"), open_rows("openmoji_recoloured:brg:jungle")
    assert len(plain) == len(other) > 150
    for i in (0, 7):
        example, row = plain[i], other[i]
        red, green, blue = np.moveaxis(example["image"], -1, 0)
        np.testing.assert_array_equal(row["image"], np.stack([blue, red, green], -1))
        np.testing.assert_array_equal(example["image"], read_image(render(example["id"]), ""))
        assert row["caption"] == f"jungle {example['caption']}"


def test_splits_share_no_drawing_and_none_has_a_skin_tone():
    names = [
        {(row["id"], row["caption"]) for row in map(open_rows("openmoji_recoloured:rgb", split).__getitem__, range(20))}
        for split in ("train", "held_out")
    ]
    assert not names[0] & names[1]
    assert not any("skin tone" in caption for found in names for _, caption in found)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("openmoji_recoloured:bgg", "train", "'bgg' is no order of r, g and b, such as brg"),
        ("openmoji_recoloured:bgr", "test", "unknown split 'test'"),
    ],
)
def test_other_names_are_refused(name, split, message):
    with pytest.raises(UserError, match=message):
        open_rows(name, split)
