"""OpenMoji's groups, regions and scenes."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import pytest

from configs import openmoji_ldm
from sdjax.core.errors import UserError
from sdjax.data.sources import openmoji
from sdjax.data.sources.open import source
from sdjax.data.sources.openmoji_parts import COLORS, GROUPS, PALETTE, SHAPES, group, label_map
from sdjax.data.text.word_pieces import load_word_pieces

ROOT = Path(__file__).parents[2]
STEMS = {caption: stem for stem, caption in openmoji.captions().items()}


def test_images_have_unicode_groups():
    """The totals of all 3,953 images, and some of them by name; those of multi-person emoji go by their first."""
    counts = collections.Counter(GROUPS[group(stem)] for stem in STEMS.values())
    assert counts["Flags"] == 269
    assert counts["Food & Drink"] == 135
    assert counts["People & Body"] == 2416
    assert sum(counts.values()) == 3953
    named = {"red apple": "Food & Drink", "Norway": "Flags", "dog face": "Animals & Nature"}
    named |= {"red heart": "Smileys & Emotion", "woman firefighter medium skin tone": "People & Body"}
    for caption, name in named.items():
        assert GROUPS[group(STEMS[caption])] == name
    pictures = source("openmoji", "held_out")
    assert set(pictures.classes) == set(GROUPS)
    assert int(pictures[0]["label"]) == GROUPS.index("People & Body")


def test_regions_are_the_colours_of_the_drawing():
    """A grinning face: white around, black lines, a yellow face, a red mouth; and the map, painted in its colours, is
    the image, but for the edges."""
    labels = label_map(STEMS["grinning face"])
    assert {PALETTE[i] for i in np.unique(labels)} == {"ffffff", "000000", "fcea2b", "ea5a47"}
    pictures = source("openmoji_regions", "held_out")
    example = pictures[5]
    palette = np.array([[int(color[i : i + 2], 16) for i in (0, 2, 4)] for color in PALETTE])
    difference = np.abs(palette[example["label_map"]] - example["image"]).max(-1)
    assert (difference <= 1).mean() > 0.8


def test_scenes_have_their_colours_in_their_boxes():
    """A place of each shape well inside of it has one of the palette's colours of that name; nothing else is drawn."""
    scenes = source("openmoji_scenes")
    named = (
        "d22f27 ea5a47",
        "e27022 f4aa41",
        "fcea2b",
        "b1cc33 5c9e31",
        "92d3f5 61b2e4 1e50a0",
        "8967aa",
        "6a462f a57939",
    )
    colors = dict(zip(COLORS, named, strict=True))
    seen, counts = set(), []
    for index in range(60):
        scene = scenes[index]
        free = np.ones((128, 128), bool)
        for kind, (x, y, w, h) in zip(scene["objects"], scene["boxes"], strict=True):
            rows, columns = slice(round(y * 128), round((y + h) * 128)), slice(round(x * 128), round((x + w) * 128))
            inside = scene["image"][rows, columns]
            middle = inside[inside.shape[0] * 2 // 5, inside.shape[1] // 2]
            color = SHAPES[kind].split()[0]
            wanted = np.array([[int(c[i : i + 2], 16) for i in (0, 2, 4)] for c in colors[color].split()])
            seen.add(color)
            assert np.abs(middle.astype(int) - wanted).max(-1).min() < 4, (SHAPES[kind], middle)
            free[rows, columns] = False
        assert (scene["image"][free] == 255).all()
        counts.append(len(scene["objects"]))
    assert seen == set(COLORS)
    np.testing.assert_allclose(np.bincount(counts, minlength=4), (0, 42, 12, 6), atol=8)


def test_scenes_are_fixed_and_splits_differ():
    train, held = source("openmoji_scenes"), source("openmoji_scenes", "held_out")
    assert (len(train), len(held)) == (8192, 512)
    assert (train[0]["image"] == train[0]["image"]).all()
    assert (train[0]["image"] != held[0]["image"]).any()
    with pytest.raises(UserError, match="unknown split 'test'"):
        source("openmoji_scenes", "test")


def test_configs_know_how_many_there_are():
    assert (len(GROUPS), len(SHAPES), len(PALETTE)) == (openmoji_ldm.GROUPS, openmoji_ldm.SHAPES, openmoji_ldm.COLORS)


def test_every_caption_is_made_of_known_words():
    """The tokenizer of openmoji_ldm.py:captions was learned from the training captions; those held out fit, too,
    and no two captions are the same tokens."""
    config = openmoji_ldm.get_config("captions")
    words = load_word_pieces(ROOT / config.model.tokenizer, config.model.bert.max_length)
    assert words.vocab_size <= config.model.bert.vocab_size
    ids = words.encode(list(STEMS))
    assert not (ids == words.backend.token_to_id("[UNK]")).any()
    assert len(np.unique(ids, axis=0)) == len(STEMS)
