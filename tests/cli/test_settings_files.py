"""Settings in files: where each format keeps them, our own record field by field, hostile texts in one line."""

from __future__ import annotations

import contextlib
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_settings import WRITERS, wanted
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdjax.cli.records import parameters, write_image
from sdjax.cli.settings.read import find_settings, read_settings
from sdjax.core.errors import UserError

IMAGE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
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
    "init_image": "x.png",
    "original_size": [512, 768],
    "class_label": 3,
    "embeddings": ["a.pt"],
    "model": 'fine, "tuned": 2',
    "checkpoint": "/a/folder",
    "given": ["x.png", None, {"deep": True}],
}
TEXT = """red heart
Negative prompt: blurry, 旗
Steps: 4, Sampler: Euler a, CFG scale: 7, Seed: 12, Size: 128x128"""
USER_COMMENT, EXIF_IFD, MODEL = 0x9286, 0x8769, 0x0110


def save(path: Path, **chunks: str) -> Path:
    info = PngInfo()
    for name, text in chunks.items():
        info.add_text(name, text)
    Image.fromarray(IMAGE).save(path, pnginfo=info)
    return path


def save_exif(path: Path, comment: Any, tag: int = USER_COMMENT, ifd: bool = True) -> Path:
    exif = Image.Exif()
    (exif.get_ifd(EXIF_IFD) if ifd else exif)[tag] = comment
    Image.fromarray(IMAGE).save(path, exif=exif.tobytes())
    return path


@pytest.mark.parametrize("end", ["jpg", "webp", "png"])
@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + TEXT.encode("utf-16-be"),  # A1111's
        b"UNICODE\0" + TEXT.encode("utf-16-le"),
        b"UNICODE\0" + TEXT.encode("utf-16"),
        b"UNICODE\0" + TEXT.encode(),
        b"ASCII\0\0\0" + TEXT.encode(),
        b"\0" * 8 + TEXT.encode(),
        TEXT.encode(),
        b"\0" + TEXT.encode() + b"\0",
        b"UNICODE\0" + TEXT.replace("\n", "\r\n").encode("utf-16-be") + b"\0\0",
    ],
)
def test_comments_of_jpeg_webp_and_png(end: str, comment: bytes, tmp_path: Path):
    values = read_settings(save_exif(tmp_path / f"x.{end}", comment)).values
    assert (values["prompt"], values["negative_prompt"]) == ("red heart", "blurry, 旗")
    assert (values["steps"], values["sampler"], values["seed"], values["width"]) == (4, "euler_a", 12, 128)


def test_other_places_of_texts(tmp_path: Path):
    rng = random.Random(0)
    wish = wanted(rng, WRITERS["Fooocus"])
    fooocus, graph = (WRITERS[name].write(wish, rng) for name in ("Fooocus", "ComfyUI"))
    # Fooocus writes the comment beside the directory that is meant for it, ComfyUI named texts into other tags.
    path = save_exif(tmp_path / "x.jpg", fooocus["parameters"], ifd=False)
    assert read_settings(path).values["prompt"] == wish["prompt"]
    path = save_exif(tmp_path / "x.webp", f"prompt:{graph['prompt']}", MODEL, ifd=False)
    assert read_settings(path).values["steps"] == wish["steps"]
    # Some programs write UTF-8 where PNG has Latin-1.
    for text, prompt in (("Größe".encode(), "Größe"), ("Größe".encode("latin-1"), "Größe")):
        chunk = PngInfo()
        chunk.add(b"tEXt", b"parameters\0" + TEXT.encode("ascii", "replace").replace(b"red heart", text))
        Image.fromarray(IMAGE).save(tmp_path / "u.png", pnginfo=chunk)
        assert read_settings(tmp_path / "u.png").values["prompt"] == prompt
    # A PNG's texts may follow its pixels.
    data = save(tmp_path / "y.png", parameters=TEXT, Software="GIMP").read_bytes()
    start = data.index(b"iTXt") - 4
    length = int.from_bytes(data[start : start + 4], "big") + 12
    moved = data[:start] + data[start + length : -12] + data[start : start + length] + data[-12:]
    (tmp_path / "z.png").write_bytes(moved)
    assert read_settings(tmp_path / "z.png").values["seed"] == 12


def test_our_own_record_comes_back_exactly(tmp_path: Path):
    write_image(tmp_path / "x.png", IMAGE, RECORD)
    found = read_settings(tmp_path / "x.png")
    assert json.loads(json.dumps(found.values)) == RECORD
    assert not found.notes


def test_the_text_alone_says_the_same(tmp_path: Path):
    record = {**RECORD, "clip_skip": 1, "rng": "torch", "hires": 2.0, "hires_strength": 1 / 3, "hires_steps": 9}
    found = read_settings(save(tmp_path / "x.png", parameters=parameters(record)))
    absent = ("eta", "checkpoint", "given", "init_image", "strength", "original_size", "class_label", "embeddings")
    expected = {name: value for name, value in record.items() if name not in absent}
    expected |= {"guidance_scale": 0.3}
    expected["prompt"] = "\n".join(text.strip() for text in RECORD["prompt"].split("\n"))
    assert found.values == expected
    assert found.penultimate == {"clip_skip": 1}
    assert not found.notes


BAD_FIELDS = {
    "num_images": (10**9, -3, "3", 1.5, [1], {}),
    "first_index": (-1, 7),
    "index": (-1, 2**31, "0", True, 1.0),
    "steps": ("3", 0, -1, 3.0, True, [3], {"a": 1}),
    "seed": (True, -5, 2**64, 1e9, "7", [[[]]]),
    "guidance_scale": ("7", -1, [7.0], True, -(10**38)),
    "strength": (1.5, "x"),
    "width": (0, 10**9, 64.0),
    "sampler": ("restart", 3, ["euler"], "x" * 10**5),
    "schedule": ("nope", {}),
    "rng": ("numpy", 1),
    "syntax": ("compel",),
    "prompt": (3, ["x"], {}),
    "negative_prompt": (3, [None]),
    "init_image": (3, ["x"], True),
    "mask": ({},),
    "crop": ([1], [1, 2, 3], ["1", 2], "1,2", [-1, 0], [1.5, 2], [10**39, 1, 1]),
    "class_label": (True, [1], {}, 1.5),
    "layout": (3, {}, True),
    "embeddings": ("a.pt", 3, {}),
    "checkpoint": (3, ["x"], {"a": "b"}),
    "dtype": (16,),
    "model": ([],),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_every_field_of_a_record_is_checked(name: str):
    for value in BAD_FIELDS[name]:
        found = find_settings({"sdjax": json.dumps({"prompt": "x", name: value})}, "x.png")
        with pytest.raises(UserError, match=name) as error:
            found.drop(())
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 300
        found.drop({name, "first_index"})  # another value takes its place
        assert name not in found.values


BAD = {
    "nothing": ({"Comment": "hello"}, r"does not say how it was made: .*ComfyUI; its texts are Comment"),
    "no json": ({"sdjax": "{"}, "not JSON"),
    "nested": ({"sdjax": "[" * 100_000}, "not JSON that is read: it is nested more than 32 levels deep"),
    "nan": ({"sdjax": '{"prompt": "x", "eta": NaN}'}, "not JSON"),
    "infinite": ({"sdjax": '{"prompt": "x", "eta": 1e999}'}, "eta inf in .*: choose a number"),
    "no record": ({"sdjax": "[1]"}, "no record of an image"),
    "half a character": ({"sdjax": '{"prompt": "\\ud800"}'}, "surrogates not allowed"),
    "graph": ({"prompt": '{"1": 2}'}, "graph has no nodes"),
    "nested graph": ({"prompt": '{"a":' * 50_000}, "not JSON"),
    "no sampler": ({"prompt": '{"1": {"class_type": "A", "inputs": {}}}'}, "no sampler that is known here; known: KS"),
    "invoke": ({"invokeai_metadata": "[]"}, "no JSON object"),
    "invoke 2": ({"sd-metadata": '{"image": []}'}, "describe no image"),
    "dream": ({"Dream": '"x'}, "No closing quotation"),
    "novel": ({"Comment": '{"a": '}, "not JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_texts_are_one_line(case: str):
    texts, message = BAD[case]
    with pytest.raises(UserError, match=message) as error:
        find_settings(texts, "x.png").drop(())
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_unreadable_files_are_one_line(tmp_path: Path):
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    Image.fromarray(IMAGE).save(tmp_path / "x.gif")
    Image.fromarray(IMAGE).save(tmp_path / "x.jpg")
    bomb = PngInfo()
    bomb.add_text("parameters", "a" * (2**20 + 1), zip=True)
    Image.fromarray(IMAGE).save(tmp_path / "bomb.png", pnginfo=bomb)
    damaged = "it is no PNG, JPEG or WebP, or a damaged one"
    messages = {
        "x.png": damaged,
        "x.gif": damaged,
        "bomb.png": damaged,
        "none.png": "No such file",
        "": "Is a directory",
    }
    for name, message in {**messages, "x.jpg": "does not say how it was made"}.items():
        with pytest.raises(UserError, match=message):
            read_settings(tmp_path / name)


HOSTILE = {
    **{text[:4] * 2: {"parameters": f"x\n{text}"} for text in ("a" * 10**6, "a, " * 300_000, 'a: "\\' * 150_000)},
    **{text[:4] * 3: {"parameters": f"x\n{text}"} for text in ("a:" * 500_000, " " * 10**6, "a: {" * 250_000)},
    "lines": {"parameters": "Steps: 1\n" * 100_000},
    "digits": {"parameters": "Steps: " + "1," * 400_000 + " Seed: 1, Sampler: x"},
    "chain": {
        "prompt": json.dumps(
            {str(i): {"class_type": "KSampler", "inputs": {"latent_image": [str(i + 1), 0]}} for i in range(9000)}
        )
    },
    "saves": {
        "prompt": json.dumps(
            {str(i): {"class_type": "SaveImage", "inputs": {"images": [str(i + 1), 0]}} for i in range(9000)}
        )
    },
    "doubling": {
        "prompt": json.dumps(
            {"0": {"class_type": "KSampler", "inputs": {"positive": ["1", 0]}}}
            | {
                str(i): {
                    "class_type": "StringConcatenate",
                    "inputs": {"string_a": [str(i + 1), 0], "string_b": [str(i + 1), 0], "delimiter": "x" * 100},
                }
                for i in range(1, 200)
            }
        )
    },
    "circle": {
        "prompt": json.dumps({"1": {"class_type": "KSampler", "inputs": {"model": ["1", 0], "seed": ["1", 0]}}})
    },
    "braces": {"Comment": json.dumps({"sampler": "k_euler", "prompt": "{" * 10**6, "uc": "1:" * 10**5})},
    "marks": {"invokeai_metadata": json.dumps({"positive_prompt": ")+" * 30_000, "negative_prompt": "a" * 60_000})},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_texts_take_linear_time(case: str):
    start = time.perf_counter()
    with contextlib.suppress(UserError):
        find_settings(HOSTILE[case], "x.png").drop(())
    assert time.perf_counter() - start < 5.0


def test_garbage_is_an_answer_or_one_line():
    """Texts of every program with characters changed, cut and put in: 1,000 cases."""
    rng, answers = random.Random(0), 0
    for name, writer in WRITERS.items():
        for _ in range(90):
            texts = writer.write(wanted(rng, writer), rng)
            key = rng.choice([key for key in texts if key != "workflow" or len(texts) == 1])
            texts[key] = damaged(texts[key], rng)
            message = ""
            try:
                found = find_settings(texts, "x.png")
                found.drop(())
            except UserError as error:
                message = str(error)
            else:
                answers += 1
                assert isinstance(found.values["prompt"], str), name
                message = "".join(found.notes)
            assert "\n" not in message
            assert len(message) < 6000
    assert 200 < answers < 900


ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1.5,
    "x",
    "",
    [],
    {},
    [[1]],
    {"a": [1]},
    10**38,
    "9" * 70,
    ["1", 0],
    ["x", 0],
)


@pytest.mark.parametrize("name", [name for name in WRITERS if name not in ("A1111", "Forge", "SD.Next", "InvokeAI 1")])
def test_values_of_any_type_are_an_answer_or_one_line(name: str):
    """JSON whose values are of other types, or gone."""
    rng = random.Random(name)
    for _ in range(60):
        texts = WRITERS[name].write(wanted(rng, WRITERS[name]), rng)
        texts = {key: json.dumps(odd(json.loads(t), rng)) if t[:1] == "{" else t for key, t in texts.items()}
        message = ""
        try:
            find_settings(texts, "x.png").drop({"init_image"} if rng.random() < 0.5 else {"sampler", "steps", "prompt"})
        except UserError as error:
            message = str(error)
        assert "\n" not in message
        assert len(message) < 500


def odd(value: Any, rng: random.Random) -> Any:
    """A value of JSON, in which one of ten is another one, and some keys are missing."""
    if rng.random() < 0.1:
        return rng.choice(ODD)
    if isinstance(value, dict):
        return {key: odd(inner, rng) for key, inner in value.items() if rng.random() > 0.04}
    return [odd(inner, rng) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("end", ["jpg", "webp", "png"])
def test_damaged_files_are_an_answer_or_one_line(end: str, tmp_path: Path):
    rng, answers = random.Random(end), 0
    path = save_exif(tmp_path / f"x.{end}", b"UNICODE\0" + TEXT.encode("utf-16-be"))
    whole = path.read_bytes()
    start = max(whole.find(b"Exif"), whole.find(b"eXIf"), whole.find(b"EXIF"))
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(start, start + 60)] = rng.randrange(256)
        path.write_bytes(data)
        try:
            read_settings(path)
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            answers += 1
    assert answers < 150


def damaged(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(text) + 1)
        kind = rng.randrange(3)
        inserted = "".join(rng.choices('\0"{}[]:,\\\n é旗', k=rng.randint(1, 8))) if kind != 1 else ""
        text = text[:at] + inserted + text[at + rng.randint(0, 40 if kind else 1) :]
    return text
