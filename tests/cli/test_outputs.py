"""What an earlier run left in a folder: whole images are kept, damaged ones moved aside, others' files refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdjax.cli.outputs import find_outputs, image_path, open_folder, write_grid
from sdjax.cli.records import write_image
from sdjax.core.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = {number: RNG.integers(0, 256, (8, 8, 3), np.uint8) for number in (0, 1, 2)}
RECORDS = {number: {"prompt": f"heart {number}", "seed": 3, "crop": (1, 2), "index": number} for number in IMAGES}
SHEET = np.concatenate(list(IMAGES.values()), axis=1)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run that was not killed."""
    for number, image in IMAGES.items():
        write_image(image_path(tmp_path, number), image, RECORDS[number])
    write_grid(tmp_path, SHEET, RECORDS)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_whole_images_are_read(folder):
    before = contents(folder)
    found = find_outputs(folder, RECORDS)
    assert found.grid
    assert not found.damaged
    for number, image in IMAGES.items():
        np.testing.assert_array_equal(found.images[number], image)
    open_folder(folder, RECORDS, found)
    assert contents(folder) == before


def test_what_is_missing_is_known(folder):
    before = contents(folder)
    for name in ("00000.png", "00001.json", "00002.png", "00002.json", "grid.png"):
        (folder / name).unlink()
    found = find_outputs(folder, RECORDS)
    assert (list(found.images), found.damaged, found.grid) == ([1], [], False)
    open_folder(folder, RECORDS, found)
    assert (folder / "00001.json").read_bytes() == before["00001.json"]


@pytest.mark.parametrize("name", ["00001.png", "00001.json", "grid.png"])
def test_cut_files_are_moved_aside(name, folder, caplog):
    """Wherever they were cut."""
    data = (folder / name).read_bytes()
    end = 1 if name.endswith("png") else 2  # a JSON without its last line break is whole
    for count, size in enumerate([*range(0, len(data) - end, 37), len(data) - 21, len(data) - end]):
        (folder / name).write_bytes(data[:size])
        found = find_outputs(folder, RECORDS)
        assert found.damaged == [folder / name]
        assert sorted(found.images) == ([0, 2] if name == "00001.png" else [0, 1, 2])
        assert found.grid == (name != "grid.png")
        with caplog.at_level(logging.WARNING, "sdjax"):
            open_folder(folder, RECORDS, found)
        aside = f"{name}.damaged{count or ''}"
        assert f"{name} is damaged; it is {aside} now, and is made anew" in caplog.text
        assert (folder / aside).read_bytes() == data[:size]
        assert (folder / name).exists() == (name == "00001.json")


def test_one_wrong_bit_is_damage(folder):
    path = image_path(folder, 0)
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 20] ^= 1
    path.write_bytes(data)
    assert find_outputs(folder, RECORDS).damaged == [path]


@pytest.mark.parametrize(
    ("name", "written", "message"),
    [
        ("00001.png", b"mine", "00001.png exists and is left as it is; choose another --outdir"),
        ("00001.json", b"[1, 2]", "00001.json exists and is left as it is"),
        ("grid.png", b"mine", "grid.png exists and is left as it is"),
        ("00001.json", b'{"prompt": "heart 1"}', "00001.json exists, with seed None where this command has 3"),
    ],
)
def test_files_of_others_are_refused(name, written, message, folder):
    (folder / name).write_bytes(written)
    before = contents(folder)
    with pytest.raises(UserError, match=message):
        find_outputs(folder, RECORDS)
    assert contents(folder) == before


def test_images_of_another_command_are_refused(folder):
    before = contents(folder)
    message = "00002.png exists, with seed 3 where this command has 4; choose another --outdir"
    with pytest.raises(UserError, match=message):
        find_outputs(folder, {**RECORDS, 2: {**RECORDS[2], "seed": 4}})
    message = "grid.png exists and is left as it is"
    with pytest.raises(UserError, match=message):
        find_outputs(folder, {number: RECORDS[number] for number in (0, 1)})
    Image.fromarray(IMAGES[0]).save(image_path(folder, 1))
    with pytest.raises(UserError, match=r"00001\.png exists and is left as it is"):
        find_outputs(folder, RECORDS)
    assert {**contents(folder), "00001.png": b""} == {**before, "00001.png": b""}


def test_a_new_folder_has_nothing(tmp_path):
    found = find_outputs(tmp_path / "new", RECORDS)
    assert (dict(found.images), list(found.damaged), found.grid) == ({}, [], False)
    assert not (tmp_path / "new").exists()
    open_folder(tmp_path / "new", RECORDS, found)
    assert not contents(tmp_path / "new")
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.raises(UserError, match="file is a file, not a folder; choose another --outdir"):
        find_outputs(tmp_path / "file", RECORDS)
