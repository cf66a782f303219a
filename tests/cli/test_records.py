"""An image's record as files keep it: in the PNG, as A1111's text and exactly, and as JSON beside it."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

from sdjax.cli.records import SAMPLER_LABELS, SCHEDULE_LABELS, write_image
from sdjax.cli.settings.read import find_settings
from sdjax.diffusion.samplers import SAMPLERS, SPACINGS


def test_sampler_labels_are_distinct():
    assert set(SAMPLER_LABELS) == set(SAMPLERS)
    assert set(SCHEDULE_LABELS) == set(SPACINGS)
    for sampler, label in SAMPLER_LABELS.items():
        for schedule, text in [*SCHEDULE_LABELS.items(), (None, None)]:
            ending = "" if text is None else f", Schedule type: {text}"
            line = f"x\nSteps: 1, Sampler: {label}, Seed: 2, Image index: 0{ending}"
            values = find_settings({"parameters": line}, "x.png").values
            own = None if sampler in ("lcm", "tcd") else schedule
            assert (values["sampler"], values.get("schedule")) == (sampler, own)


def test_an_image_and_its_record_are_written(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    record = {"prompt": "a (red:1.2) heart, 旗", "steps": 3, "index": 1, "given": ["x.png", None, {"deep": True}]}
    write_image(tmp_path / "x.png", pixels, record)
    image = Image.open(tmp_path / "x.png")
    np.testing.assert_array_equal(np.asarray(image), pixels)
    assert json.loads(image.text["sdjax"]) == record
    assert image.text["parameters"] == "a (red:1.2) heart, 旗\nSteps: 3, Image index: 1"
    assert json.loads((tmp_path / "x.json").read_text()) == record
