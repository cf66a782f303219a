"""Hints beside images: as Hugging Face lists them, as Fill50k does, in pairs of folders, made of the image itself."""

import json

import numpy as np
import pytest
from PIL import Image

from sdjax.core.errors import UserError
from sdjax.data.hints.makers import hint_maker
from sdjax.data.images import read_image
from sdjax.data.sources.open import source
from sdjax.data.sources.openmoji import render
from sdjax.data.sources.openmoji_parts import TONES, _points, lines
from sdjax.data.sources.rules import CAPTIONED, RowRules
from sdjax.data.transforms.buckets import Size, ToBucket
from sdjax.data.transforms.conditions import MakeHint
from sdjax.data.transforms.crops import RandomSquare
from sdjax.data.transforms.images import Flip, Square

RULES = RowRules(needs=("caption", "conditioning_image"))
# Red says the row, green the column: what is cut of an image is known by its corner.
PLACES = np.stack([*np.mgrid[:40, :60], np.zeros((40, 60), int)], -1).astype(np.uint8)


def save(path, pixels=PLACES):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def fill50k(folder):
    rows = [{"source": f"source/{i}.png", "target": f"target/{i}.png", "prompt": f"circle {i}"} for i in range(2)]
    (folder / "prompt.json").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return "source/{}.png", "target/{}.png"


def hugging_face(folder):
    rows = [{"file_name": f"{i}.png", "conditioning_image": f"h/{i}.png", "text": f"circle {i}"} for i in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return "h/{}.png", "{}.png"


def folders(folder):
    for i in range(2):
        (folder / "images").mkdir(exist_ok=True)
        (folder / "images" / f"{i}.txt").write_text(f"circle {i}")
    return "conditioning_images/{}.png", "images/{}.png"


@pytest.mark.parametrize("layout", [fill50k, hugging_face, folders])
def test_pairs_are_read(layout, tmp_path):
    hints, images = layout(tmp_path)
    for i in range(2):
        save(tmp_path / images.format(i), PLACES + np.uint8(i))
        save(tmp_path / hints.format(i), 255 - PLACES[::2, ::2] - np.uint8(i))
    rows = source(f"folder:{tmp_path}", rules=RULES)
    assert len(rows) == 2
    for i in range(2):
        row = rows[i]
        assert row["caption"] == f"circle {i}"
        assert np.array_equal(row["image"], PLACES + np.uint8(i))
        # Half as large in the file: at the image's size in the example.
        hint = row["conditioning_image"].astype(int)
        assert hint.shape == PLACES.shape
        assert np.abs(hint - (255 - PLACES.astype(int) - i)).max() <= 3
    (tmp_path / hints.format(1)).unlink()
    with pytest.raises(UserError, match=r"1\.png.*(does not exist|has no conditioning_image)"):
        source(f"folder:{tmp_path}", rules=RULES)


def test_hints_are_no_images_and_are_read_only_where_they_are_needed(tmp_path):
    hints, images = folders(tmp_path)
    for i in range(2):
        save(tmp_path / images.format(i))
        save(tmp_path / hints.format(i))
    assert len(source(f"folder:{tmp_path}", rules=RULES)) == 2
    assert source(f"folder:{tmp_path}", rules=RULES).classes == ()
    assert len(source(f"pictures:{tmp_path}")) == 4
    fill50k(tmp_path)
    for i in range(2):
        save(tmp_path / f"source/{i}.png")
        save(tmp_path / f"target/{i}.png")
    assert "conditioning_image" not in source(f"folder:{tmp_path}", rules=CAPTIONED)[0]


def test_a_hint_of_other_proportions_is_said(tmp_path):
    hints, images = fill50k(tmp_path)
    for i in range(2):
        save(tmp_path / images.format(i))
        save(tmp_path / hints.format(i), PLACES[:, :40])
    with pytest.raises(UserError, match=r"source/0\.png has 40x40 pixels, its image 60x40: their proportions differ"):
        source(f"folder:{tmp_path}", rules=RULES)[0]


@pytest.mark.parametrize(
    "change",
    [Square(16), Square(16, "adm"), RandomSquare(16, (0.4, 1.0)), ToBucket((Size(16, 24), Size(24, 16))), Flip(1.0)],
)
def test_hint_and_image_are_cut_and_mirrored_alike(change):
    """A hint that is the negative of its image is so afterwards, too."""
    example = {"image": PLACES, "conditioning_image": 255 - PLACES, "caption": "", "id": "a"}
    made = change.map(example) if hasattr(change, "map") else change.random_map(example, np.random.default_rng(3))
    assert not np.array_equal(made["image"], PLACES)
    assert np.abs(255 - made["conditioning_image"].astype(int) - made["image"]).max() <= 1


def test_hints_are_made_of_what_is_seen():
    made = MakeHint("canny").map({"image": PLACES[10:30], "id": "a"})
    assert np.array_equal(made["conditioning_image"], hint_maker("canny")(PLACES[10:30]))
    with pytest.raises(UserError, match="unknown control_from 'lines'"):
        MakeHint("lines")
    with pytest.raises(UserError, match="needs masks"):
        MakeHint("inpaint")


def test_lines_of_openmoji_are_where_the_drawing_is_dark():
    for stem in ("2764", "1F408", "1F697"):
        drawing, hint = read_image(render(stem)), lines(stem)
        assert hint.shape == drawing.shape
        assert 0.01 < np.mean(hint > 127) < 0.3
        assert drawing[hint[..., 0] > 250].mean() < 60
        assert drawing.mean() > 120  # it is no silhouette


def test_no_skin_tone_of_a_kept_drawing_is_seen():
    seen, kept = source("openmoji_lines"), source("openmoji_lines", "held_out")
    stems = [{_points(rows.id(i), TONES) for i in range(len(rows))} for rows in (seen, kept)]
    assert len(seen) + len(kept) == len(source("openmoji")) == 3743
    assert not stems[0] & stems[1]
    assert np.array_equal(kept[7]["conditioning_image"], lines(kept.id(7)))
    with pytest.raises(UserError, match="unknown split 'test'"):
        source("openmoji_lines", "test")
