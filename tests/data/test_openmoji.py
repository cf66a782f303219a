"""The OpenMoji builder: how many, which, and that they look right; without TensorFlow."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from sdjax.data.sources import openmoji


@pytest.fixture(scope="module")
def captions():
    return openmoji.captions()


def test_every_named_drawing_once(captions):
    assert len(captions) == 3953
    assert len(set(captions.values())) == 3953
    assert captions["2764"] == "red heart"
    assert captions["1F469-1F3FD-200D-1F52C"] == "woman scientist medium skin tone"


def test_held_out_are_a_tenth_of_the_skin_tones(captions):
    held_out = {caption for caption in captions.values() if openmoji.is_held_out(caption)}
    assert len(held_out) == 210
    assert "man walking medium skin tone" in held_out
    words = {word for caption in captions.values() if caption not in held_out for word in caption.split()}
    assert {word for caption in held_out for word in caption.split()} <= words


@pytest.mark.parametrize(
    ("stem", "place", "colour"),
    # Red shadow, blue shadow and yellow of OpenMoji's palette (openmoji.org/styleguide).
    [
        ("2764", (64, 64), 0xD22F27),
        ("1F499", (64, 64), 0x1E50A0),
        ("1F7E8", (64, 64), 0xFCEA2B),
        ("2764", (2, 2), 0xFFFFFF),
    ],
)
def test_render_has_the_drawings_own_colour_on_white(stem, place, colour):
    picture = np.asarray(Image.open(io.BytesIO(openmoji.render(stem))))
    assert picture.shape == (128, 128, 3)
    assert tuple(picture[place]) == (colour >> 16, colour >> 8 & 255, colour & 255)


PREPARE = """
import sys, warnings
warnings.simplefilter("error")
from sdjax.data.sources import openmoji
openmoji.captions = lambda c=openmoji.captions(): {k: c[k] for k in sorted(c)[-400:]}
builder = openmoji.prepared(sys.argv[1])
held_out = builder.as_data_source("held_out")
print({name: split.num_examples for name, split in builder.info.splits.items()})
print(sorted(record["caption"].decode() for record in held_out)[0])
print([name for name in ("tensorflow", "torch", "jax") if name in sys.modules])
"""


def test_builder_writes_both_splits_without_tensorflow(tmp_path, captions):
    run = [sys.executable, "-c", PREPARE, str(tmp_path)]
    lines = subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()[-3:]
    some = [captions[stem] for stem in sorted(captions)[-400:]]
    held_out = sorted(caption for caption in some if openmoji.is_held_out(caption))
    assert lines == [str({"train": 400 - len(held_out), "held_out": len(held_out)}), held_out[0], "[]"]
    assert held_out


def test_data_dir_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert openmoji.default_data_dir() == tmp_path
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert openmoji.default_data_dir() == tmp_path / "sdjax" / "datasets"
