"""Data folders, right and wrong, and what the other sources give."""

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from sdjax.core.errors import UserError
from sdjax.data.images import read_image
from sdjax.data.sources import openmoji
from sdjax.data.sources.open import ArraySource, CachedSource, source


def folder_of(path, rows, pictures=("a.png",)):
    path.mkdir(parents=True, exist_ok=True)
    for name in pictures:
        Image.new("RGB", (4, 3), (10, 20, 30)).save(path / name)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return f"folder:{path}"


def test_folder_gives_pictures_in_the_order_of_the_list(tmp_path):
    rows = [{"file_name": "b.png", "text": "second"}, "", {"file_name": "a.png", "caption": "first"}]
    examples = source(folder_of(tmp_path, rows, ("a.png", "b.png")))
    assert [(examples[i]["id"], examples[i]["caption"]) for i in range(len(examples))] == [
        ("b.png", "second"),
        ("a.png", "first"),
    ]
    np.testing.assert_array_equal(examples[0]["image"], np.full((3, 4, 3), (10, 20, 30), np.uint8))


def test_folder_splits(tmp_path):
    folder_of(tmp_path / "train", [{"file_name": "a.png", "text": "x"}])
    folder_of(tmp_path / "test", [{"file_name": "a.png", "text": "y"}])
    assert source(f"folder:{tmp_path}")[0]["caption"] == "x"
    assert source(f"folder:{tmp_path}", "test")[0]["caption"] == "y"
    with pytest.raises(UserError, match=r"no split 'val' in .*/val does not exist, or has no list \(metadata\.jsonl, "):
        source(f"folder:{tmp_path}", "val")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"file_name": "a.png"', r"metadata\.jsonl line 2 is not JSON"),
        ("[1]", r"line 2 has no file_name; its keys are none"),
        (
            {"file_name": "a.png", "tags": "x"},
            r"has no caption \(text, caption, prompt\); its keys are file_name, tags$",
        ),
        ({"file": "a.png", "text": "x"}, r"line 2 has no file_name; its keys are file, text$"),
        ({"file_name": "a.png", "text": None}, r"line 2 has no caption: text is null$"),
        ({"file_name": "a.png", "text": []}, r"line 2 has no caption: text is \[\]$"),
        ({"file_name": "a.png", "text": 3}, r"line 2: text is neither a string nor a list of strings"),
        ({"file_name": "a.png", "text": ["x", None]}, r"line 2: text is neither a string nor a list of strings"),
        ({"file_name": 3, "text": "x"}, r"line 2: file_name is 3, and should be the name of a file"),
        ({"file_name": "no.png", "text": "x"}, r"line 2 names .*no\.png, which does not exist"),
        ({"file_name": "../out.png", "text": "x"}, r"line 2 names '\.\./out\.png', which is outside the folder"),
        ({"file_name": "/etc/hostname", "text": "x"}, r"line 2 names '/etc/hostname', which is outside the folder"),
    ],
)
def test_bad_line_is_named(tmp_path, row, said):
    with pytest.raises(UserError, match=said):
        source(folder_of(tmp_path, [{"file_name": "a.png", "text": "x"}, row]))


def test_missing_and_empty_lists_are_named(tmp_path):
    with pytest.raises(UserError, match=r"the data folder .*nowhere does not exist$"):
        source(f"folder:{tmp_path}/nowhere")
    with pytest.raises(UserError, match="lists no images"):
        source(folder_of(tmp_path, []))


def bomb(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda png: png[: len(png) // 2], "cannot read image .*bad.png"),
        (lambda png: b"not an image", "not an image in PNG, JPEG"),
        (lambda png: b"", "not an image in PNG, JPEG"),
        (lambda png: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in PNG, JPEG"),
        (lambda png: bomb(9000, 9000), "9000x9000 pixels; at most"),
        (lambda png: bomb(60000, 60000), "cannot read image .*bad.png"),
    ],
)
def test_unreadable_picture_is_named_with_its_line(tmp_path, content, said):
    examples = source(folder_of(tmp_path, [{"file_name": "bad.png", "text": "x"}], ("bad.png",)))
    noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "bad.png")
    (tmp_path / "bad.png").write_bytes(content((tmp_path / "bad.png").read_bytes()))
    with pytest.raises(UserError, match=said) as caught:
        examples[0]
    assert f"{tmp_path}/bad.png (metadata.jsonl line 1)" in str(caught.value)


def test_transparency_becomes_white_and_modes_become_rgb(tmp_path):
    half = Image.new("RGBA", (1, 1), (255, 0, 0, 51))  # a fifth red over white
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([9, 8, 7])
    deep = Image.fromarray(np.full((1, 1), 0x8040, np.uint16))
    for name, image, expected in [
        ("half", half, (255, 204, 204)),
        ("clear", Image.new("LA", (1, 1), (0, 0)), (255, 255, 255)),
        ("palette", palette, (9, 8, 7)),
        ("deep", deep, (128, 128, 128)),
        ("bits", Image.new("1", (1, 1), 1), (255, 255, 255)),
    ]:
        image.save(tmp_path / f"{name}.png")
        assert tuple(read_image(tmp_path / f"{name}.png")[0, 0]) == expected, name


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned: width and height change places
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (4, 2, 3)


@pytest.fixture(scope="module")
def small_openmoji(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    named = openmoji.captions()
    some = {stem: named[stem] for stem in [*sorted(named)[-400:], "2764"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openmoji, "captions", lambda: some)
        openmoji.prepared(folder)
    return folder, some


def test_openmoji_captions_and_images(small_openmoji):
    folder, named = small_openmoji
    examples = source("openmoji", "train+held_out", folder)
    assert len(examples) == len(named)
    found = {example["id"]: example for example in (examples[i] for i in range(len(examples)))}
    assert {stem: example["caption"] for stem, example in found.items()} == named
    heart = found["2764"]["image"]
    assert heart.shape == (128, 128, 3)
    middle = heart[44:84, 44:84].astype(int)
    assert ((middle[..., 0] > 180) & (middle[..., 1:].max(-1) < 80)).mean() > 0.95


def test_any_tfds_name_and_its_mistakes(small_openmoji):
    folder, _ = small_openmoji
    by_name, own = source("tfds:openmoji", "held_out", folder), source("openmoji", "held_out", folder)
    assert by_name[2]["id"] == own[2]["id"]
    with pytest.raises(UserError, match="knows no 'no_such_data'"):
        source("tfds:no_such_data", data_dir=folder)
    with pytest.raises(UserError, match=r"split 'val' of openmoji \(splits: train, held_out\)"):
        source("openmoji", "val", folder)


def test_unknown_source_names_the_choices():
    with pytest.raises(
        UserError,
        match=r"unknown data source 'openmojis' in config\.data\.source; choose one of: array_record:PATTERN, folder:P",
    ):
        source("openmojis")


def test_cache_reads_once_up_to_its_limit(tmp_path):
    rows = [{"file_name": "a.png", "text": "x"}, {"file_name": "b.png", "text": "y"}]
    cached = CachedSource(source(folder_of(tmp_path, rows, ("a.png", "b.png"))), limit=40)  # one image has 36 bytes
    first = [cached[i] for i in range(2)]
    for name in ("a.png", "b.png"):
        (tmp_path / name).unlink()
    assert cached[0] is first[0]
    with pytest.raises(UserError, match=r"b\.png"):
        cached[1]


def test_arrays_are_rows_of_one_length():
    rows = ArraySource({"x": np.arange(6).reshape(3, 2), "y": np.arange(3)})
    assert len(rows) == 3
    assert rows[2]["x"].tolist() == [4, 5]
    assert rows[2]["y"] == 2
    with pytest.raises(ValueError, match="one length"):
        ArraySource({"x": np.zeros(3), "y": np.zeros(4)})
