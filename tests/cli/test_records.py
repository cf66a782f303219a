"""An image's settings come back from its PNG: our own exactly, A1111's in our names, garbage as one clear line."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdjax.cli.records import (
    SAMPLER_LABELS,
    SCHEDULE_LABELS,
    parameters,
    parse_parameters,
    read_parameters,
    write_image,
)
from sdjax.core.errors import UserError
from sdjax.diffusion.samplers import SAMPLERS, SPACINGS

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (8, 8, 3), np.uint8)
RECORD = {
    "prompt": 'a (red:1.2) heart,\nSteps: 3, Sampler: nothing, Seed: 1\n  "flag" 旗 \\(x\\)',
    "negative_prompt": "ugly,\nbad: Negative prompt: no",
    "index": 3,
    "steps": 30,
    "sampler": "dpmpp_2m",
    "schedule": "karras",
    "guidance_scale": 0.1 + 0.2,
    "guidance_rescale": 0.7,
    "eta": None,
    "seed": 2**64 - 1,
    "width": 512,
    "height": 768,
    "strength": 1 / 3,
    "model": 'fine, "tuned": 2',
    "checkpoint": "/a/folder",
    "given": ["x.png", None, {"deep": True}],
}

# Written as AUTOMATIC1111/stable-diffusion-webui does (modules/processing.py, create_infotext), old and new.
OLD = """a cat, (detailed:1.2)
second line, with: colon
Negative prompt: ugly, [bad]
worse
Steps: 20, Sampler: DPM++ 2M SDE Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, Model hash: 45dee52b, \
Model: v1-5, Clip skip: 2, ENSD: 31337"""
NEW = """a dog
Steps: 25, Sampler: Euler a, Schedule type: Automatic, CFG scale: 6.5, Seed: 7, Size: 640x512, RNG: CPU, \
Lora hashes: "add_detail: 7c6bad76eb54, more: 1", Denoising strength: 0.4, Version: v1.10.1"""


def save(path: Path, **chunks: str) -> Path:
    info = PngInfo()
    for name, text in chunks.items():
        info.add_text(name, text)
    Image.fromarray(PICTURE).save(path, pnginfo=info)
    return path


def test_sampler_labels_are_distinct():
    assert set(SAMPLER_LABELS) == set(SAMPLERS)
    assert set(SCHEDULE_LABELS) == set(SPACINGS)
    for sampler, label in SAMPLER_LABELS.items():
        for schedule, text in [*SCHEDULE_LABELS.items(), (None, None)]:
            ending = "" if text is None else f", Schedule type: {text}"
            record = parse_parameters(f"x\nSteps: 1, Sampler: {label}, Seed: 2{ending}", "")
            assert (record["sampler"], record.get("schedule")) == (sampler, schedule)


def test_our_own_record_comes_back_exactly(tmp_path):
    write_image(tmp_path / "x.png", PICTURE, RECORD)
    assert read_parameters(tmp_path / "x.png") == RECORD
    assert json.loads((tmp_path / "x.json").read_text()) == RECORD
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "x.png")), PICTURE)


def test_the_text_alone_says_the_same_to_other_tools(tmp_path):
    text = parameters({**RECORD, "clip_skip": 1, "rng": "torch"})
    found = read_parameters(save(tmp_path / "x.png", parameters=text))
    wanted = {name: value for name, value in RECORD.items() if name not in ("eta", "checkpoint", "given")}
    wanted |= {"clip_skip": 1, "rng": "torch", "guidance_scale": 0.3}
    wanted["prompt"] = "\n".join(line.strip() for line in RECORD["prompt"].split("\n"))
    assert found == wanted


def test_pictures_of_a1111(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "sdjax"):
        assert read_parameters(save(tmp_path / "old.png", parameters=OLD)) == {
            "prompt": "a cat, (detailed:1.2)\nsecond line, with: colon",
            "negative_prompt": "ugly, [bad]\nworse",
            **{"steps": 20, "sampler": "dpmpp_2m_sde", "schedule": "karras", "guidance_scale": 7.0},
            **{"seed": 965400086, "width": 512, "height": 768, "model": "v1-5", "clip_skip": 1},
        }
    assert "not followed: Model hash: 45dee52b, ENSD: 31337" in caplog.text
    assert read_parameters(save(tmp_path / "new.png", parameters=NEW)) == {
        "prompt": "a dog",
        "negative_prompt": "",
        **{"steps": 25, "sampler": "euler_a", "guidance_scale": 6.5, "seed": 7, "width": 640, "height": 512},
        **{"strength": 0.4, "rng": "torch"},
    }
    assert "Lora hashes: add_detail: 7c6bad76eb54, more: 1" in caplog.text


def test_what_a1111_chooses_by_itself():
    settings = "x\nSteps: 20, Sampler: DPM++ 3M SDE, Schedule type: {}, Seed: 1"
    assert parse_parameters(settings.format("Automatic"), "")["schedule"] == "exponential"
    assert parse_parameters(settings.format("Uniform"), "")["schedule"] == "linspace"
    hires = "x\nSteps: 20, Sampler: Euler, Seed: 1, Denoising strength: 0.5, Hires upscale: 2"
    assert "strength" not in parse_parameters(hires, "")


def test_a_prompt_without_settings():
    assert parse_parameters("red: heart, blue: flag\nx", "") == {
        "prompt": "red: heart, blue: flag\nx",
        "negative_prompt": "",
    }


SETTINGS = "x\nSteps: {}, Sampler: {}, CFG scale: {}, Seed: 1"
BAD = {
    "sampler": ({"parameters": SETTINGS.format(1, "Restart", 1)}, r"unknown sampler 'Restart' in .*x\.png.*euler_a"),
    "our sampler": ({"sdjax": '{"prompt": "x", "sampler": "restart"}'}, r"unknown sampler 'restart' in .*x\.png"),
    "schedule": (
        {"parameters": SETTINGS.format(1, "Euler, Schedule type: Turbo", 1)},
        r"unknown schedule 'Turbo' in .*x\.png.*karras",
    ),
    "steps": ({"parameters": SETTINGS.format("many", "Euler", 1)}, r"Steps 'many' in .*x\.png is not an integer"),
    "many digits": ({"parameters": SETTINGS.format("9" * 5000, "Euler", 1)}, "is not an integer"),
    "scale": ({"parameters": SETTINGS.format(1, "Euler", "nan")}, "CFG scale 'nan' in .* is not a number"),
    "nothing": ({"Comment": "hello"}, "neither a sdjax nor a parameters text"),
    "no json": ({"sdjax": "{"}, "not JSON"),
    "nested": ({"sdjax": "[" * 100_000}, "not JSON"),
    "nan": ({"sdjax": '{"prompt": "x", "eta": NaN}'}, "not JSON"),
    "infinite": ({"sdjax": '{"prompt": "x", "eta": 1e999}'}, "eta inf in .* is not a number"),
    "no record": ({"sdjax": "[1]"}, "no record of an image"),
    "type": ({"sdjax": '{"prompt": "x", "steps": "3"}'}, "steps '3' in .* is not of type int"),
    "truth": ({"sdjax": '{"prompt": "x", "seed": true}'}, "seed 'True' in .* is not of type int"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_repeated(case, tmp_path):
    chunks, message = BAD[case]
    with pytest.raises(UserError, match=message) as error:
        read_parameters(save(tmp_path / "x.png", **chunks))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500 + len(str(tmp_path))


def test_what_is_no_png(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "x.jpg")
    for name, message in (("x.jpg", "no PNG, or a damaged one"), ("none.png", "No such file"), ("", "Is a directory")):
        with pytest.raises(UserError, match=message):
            read_parameters(tmp_path / name)


def test_a_megabyte_of_a_compressed_bomb_is_refused(tmp_path):
    info = PngInfo()
    info.add_text("parameters", "a" * (2**20 + 1), zip=True)
    Image.fromarray(PICTURE).save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(UserError, match="no PNG, or a damaged one"):
        read_parameters(tmp_path / "x.png")


@pytest.mark.parametrize("text", ["a" * 10**6, "a, " * 300_000, 'a: "\\' * 150_000, "a:" * 500_000, " " * 10**6])
def test_long_texts_take_linear_time(text):
    start = time.perf_counter()
    parse_parameters(f"x\n{text}", "")
    assert time.perf_counter() - start < 5.0


def test_garbage_is_an_answer_or_one_line(tmp_path):
    """Bytes changed, cut and put in, in whole files and in well-formed chunks: 300 cases."""
    write_image(tmp_path / "x.png", PICTURE, RECORD)
    whole, answers = (tmp_path / "x.png").read_bytes(), 0
    texts = [parameters(RECORD), json.dumps(RECORD), OLD, NEW]
    for case in range(300):
        path = tmp_path / f"{case}.png"
        if case % 3 == 0:
            path.write_bytes(damaged(whole))
        else:
            text = damaged(texts[case % 4].encode()).decode("utf-8", "replace").replace("\0", "")
            save(path, **{("parameters", "sdjax")[case % 2]: text})
        try:
            record = read_parameters(path)
        except UserError as error:
            message = str(error)
        else:
            answers, message = answers + 1, ""
            assert isinstance(record["prompt"], str)
        assert "\n" not in message
    assert 50 < answers < 250


def damaged(data: bytes) -> bytes:
    values = bytearray(data)
    for _ in range(int(RNG.integers(1, 6))):
        at = int(RNG.integers(len(values)))
        kind = RNG.integers(3)
        if kind == 0:
            values[at] = int(RNG.integers(256))
        elif kind == 1:
            values[at:at] = RNG.bytes(int(RNG.integers(1, 9)))
        else:
            del values[at : at + int(RNG.integers(1, 40))]
    return bytes(values)
