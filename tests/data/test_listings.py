"""Captions as people have them: beside images, in columns, several of an image, as sd-scripts names folders."""

import csv
import errno
import json
import os
import pickle
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from sdjax.core.errors import UserError
from sdjax.data.loader import loader
from sdjax.data.sources.array_records import write_array_record
from sdjax.data.sources.open import source
from sdjax.data.sources.rules import ANY, RowRules
from sdjax.data.transforms.conditions import DRAW_CAPTION
from sdjax.data.transforms.images import Flip, Select


def pictures(folder, *names, size=(3, 2)):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (number, 0, 0)).save(folder / name)


def read(name, **rules):
    """(id, caption) of each row."""
    rows = source(name, **rules)
    return [(rows[i]["id"], rows[i]["caption"]) for i in range(len(rows))]


def test_captions_in_files_beside_images(tmp_path):
    pictures(tmp_path, "b.png", "a.jpg", "deep/c.webp")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf1girl, thing 0\r\n")
    (tmp_path / "a.caption").write_text("a cup\n")
    (tmp_path / "deep" / "c.txt").write_text("é")
    found = read(f"folder:{tmp_path}")
    assert found == [("a.jpg", "a cup"), ("b.png", "1girl, thing 0"), ("deep/c.webp", "é")]


def test_an_image_without_its_caption_is_named(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"/b\.png has no caption: b\.txt or b\.caption is missing$"):
        source(f"folder:{tmp_path}")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"b\.txt is not UTF-8"):
        source(f"folder:{tmp_path}")
    assert len(source(f"folder:{tmp_path}", rules=ANY)) == 2


def test_folders_of_sd_scripts_repeat_and_caption(tmp_path):
    pictures(tmp_path, "2_red dog/a.png", "2_red dog/b.png", "1_cat/c.png")
    (tmp_path / "2_red dog" / "b.txt").write_text("b's own")
    assert read(f"folder:{tmp_path}") == [
        ("1_cat/c.png", "cat"),
        ("2_red dog/a.png", "red dog"),
        ("2_red dog/a.png#1", "red dog"),
        ("2_red dog/b.png", "b's own"),
        ("2_red dog/b.png#1", "b's own"),
    ]
    rows = source(f"folder:{tmp_path}")
    assert [rows.id(i) for i in range(5)] == [id for id, _ in read(f"folder:{tmp_path}")]
    assert rows.classes == ("cat", "red dog")
    assert [int(rows[i]["label"]) for i in range(5)] == [0, 1, 1, 1, 1]
    assert len(source(f"pictures:{tmp_path}")) == 3
    assert source(f"pictures:{tmp_path}").classes == ("1_cat", "2_red dog")


def lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))


def comma_separated(path, rows):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


FORMS = {
    "metadata.jsonl": lines,
    "metadata.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1, ensure_ascii=False)),
    "metadata.csv": comma_separated,
    "metadata.parquet": parquet,
}
# A line break, a comma and quotes within a value, and what takes two bytes.
ROWS = [
    {"file_name": "b.png", "text": 'é, "q",\n[1]', "label": 10},
    {"file_name": "a.png", "text": "one", "label": 2},
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("key", ["text", "caption", "prompt"])
def test_lists_of_every_form(tmp_path, form, key):
    pictures(tmp_path, "a.png", "b.png", "not listed.png")
    FORMS[form](tmp_path / form, [{key if name == "text" else name: row[name] for name in row} for row in ROWS])
    assert read(f"folder:{tmp_path}") == [("b.png", 'é, "q",\n[1]'), ("a.png", "one")]
    rows = pickle.loads(pickle.dumps(source(f"folder:{tmp_path}")))
    assert len(rows.classes) == 11
    assert [int(rows[i]["label"]) for i in range(2)] == [10, 2]


@pytest.mark.parametrize("form", FORMS)
def test_lists_name_the_keys_that_are_there(tmp_path, form):
    pictures(tmp_path, "a.png")
    FORMS[form](tmp_path / form, [{"file_name": "a.png", "tags": "x", "url": "y"}])
    with pytest.raises(UserError, match=rf"{form} .* no caption \(text, caption, prompt\); its keys are file_name, "):
        source(f"folder:{tmp_path}")
    FORMS[form](tmp_path / form, [{"image": "a.png", "text": "x"}])
    with pytest.raises(UserError, match=rf"{form} .*has no (column )?file_name; its (keys|columns) are image, text$"):
        source(f"folder:{tmp_path}")
    FORMS[form](tmp_path / form, [{"file_name": "a.png", "text": "x"}, {"file_name": "a.png", "text": None}])
    with pytest.raises(UserError, match=r" (line|row) [23] has no caption: text is null$"):
        source(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("form", "data", "said"),
    [
        ("metadata.json", b'[{"file_name": "a.png", "text": "x"}', "is no JSON array of objects"),
        ("metadata.json", b'{"file_name": "a.png"}', r"is no JSON array of objects: byte 0 should be \["),
        ("metadata.json", b"[" * 100_000, "is no JSON array of objects"),
        ("metadata.json", b'[{"file_name": "a.png", "text": "\xff"}]', "row 1 is not JSON"),
        ("metadata.jsonl", b"[1, 2]", "row 1 has no file_name; its keys are none"),
        ("metadata.csv", b"", "is empty; its first line should name columns, file_name among them"),
        ("metadata.csv", b"file_name;text\na.png;x\n", "no column file_name; its columns are file_name;text"),
        ("metadata.csv", b"file_name,text\na.png\n", "line 2 has 1 values, and the first line names 2 columns"),
        ("metadata.csv", b'file_name,text\na.png,"x\n', "line 2 is not CSV: unexpected end of data"),
        ("metadata.csv", b"file_name,text\na.png,\xff\n", "line 2 is not CSV in UTF-8"),
        ("metadata.csv", b"file_name,text\n", "lists no images"),
        ("metadata.parquet", b"PAR1 no", "cannot read .*metadata.parquet: "),
        ("metadata.parquet", b"", "cannot read .*metadata.parquet: "),
    ],
)
def test_what_is_wrong_with_a_list_is_one_line(tmp_path, form, data, said):
    pictures(tmp_path, "a.png")
    (tmp_path / form).write_bytes(data)
    with pytest.raises(UserError, match=rf"^[^\n]*{said}[^\n]*$"):
        source(f"folder:{tmp_path}")


def test_several_captions_of_an_image(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    lines(
        tmp_path / "metadata.jsonl", [{"file_name": "a.png", "text": ["x", "y"]}, {"file_name": "b.png", "text": "z"}]
    )
    rows = source(f"folder:{tmp_path}")
    assert (rows[0]["caption"], rows[0]["captions"]) == ("x", ("x", "y"))
    assert "captions" not in rows[1]


def test_several_captions_go_through_array_records(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    rows = [{"file_name": "a.png", "text": ["x", "é"]}, {"file_name": "b.png", "text": "z"}]
    lines(tmp_path / "metadata.jsonl", rows)
    given = source(f"folder:{tmp_path}")
    write_array_record(tmp_path / "a.record", (given[i] for i in range(2)))
    found = source(f"array_record:{tmp_path}/a.record")
    for i in range(2):
        np.testing.assert_equal(found[i], given[i])


@pytest.mark.parametrize("form", FORMS)
def test_damaged_lists_are_read_or_refused_in_one_line(tmp_path, form):
    pictures(tmp_path, "a.png", "b.png")
    FORMS[form](tmp_path / form, ROWS)
    whole, rng, errors = (tmp_path / form).read_bytes(), np.random.default_rng(0), []
    for _ in range(40):
        data = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.3 else whole)
        data[rng.integers(0, len(data))] = rng.integers(0, 256)
        (tmp_path / form).write_bytes(data)
        try:
            read(f"folder:{tmp_path}")
        except UserError as error:
            errors.append(str(error))
    assert errors
    assert not [error for error in errors if "\n" in error]


def test_captions_that_no_one_needs_are_not_read(tmp_path):
    pictures(tmp_path, "a.png", "b.png", "c.png")
    lines(
        tmp_path / "metadata.jsonl", [{"file_name": "a.png", "text": 3}, {"file_name": "b.png"}, {"file_name": "c.png"}]
    )
    assert read(f"folder:{tmp_path}", rules=ANY) == [("a.png", ""), ("b.png", ""), ("c.png", "")]


def test_splits_without_lists(tmp_path):
    pictures(tmp_path, "train/a.png", "test/b.png", "test/c.png")
    for name in ("train/a", "test/b", "test/c"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert read(f"folder:{tmp_path}") == [("a.png", "train/a")]
    assert read(f"folder:{tmp_path}", split="test") == [("b.png", "test/b"), ("c.png", "test/c")]
    with pytest.raises(UserError, match="no split 'val'"):
        source(f"folder:{tmp_path}", "val")
    pictures(tmp_path, "bus/d.png")
    (tmp_path / "bus" / "d.txt").write_text("a bus")
    assert source(f"folder:{tmp_path}").classes == ("bus", "test", "train")


@pytest.mark.parametrize("kind", ["folder", "pictures"])
def test_what_systems_hide_is_left_out(tmp_path, kind):
    pictures(tmp_path, "a.png", ".ipynb_checkpoints/a.png", "__MACOSX/b.png", "@eaDir/a.png/SYNO_THUMB.jpg")
    (tmp_path / "._a.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "Thumbs.db").write_bytes(b"")
    rows = source(f"{kind}:{tmp_path}")
    assert [rows.id(i) for i in range(len(rows))] == ["a.png"]
    assert rows.classes == ()


@pytest.mark.parametrize("kind", ["folder", "pictures"])
def test_names_that_are_not_utf8_are_one_line(tmp_path, kind):
    """No JSON file beside precomputed latents could hold such an id."""
    pictures(tmp_path, "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    with pytest.raises(UserError, match=r"file_name is '\\udcff\.png', and should be the name of a file, in UTF-8"):
        source(f"{kind}:{tmp_path}", rules=ANY)
    os.rename(os.fsencode(tmp_path) + b"/\xff.png", tmp_path / "a\nb.png")
    with pytest.raises(UserError, match=r"^[^\n]*file_name is 'a\\nb\.png', and should be[^\n]*$"):
        source(f"{kind}:{tmp_path}", rules=ANY)


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch):
    pictures(tmp_path, "cat/a.png", "dog/b.png")

    def scandir(path, list_of=os.scandir):
        if str(path).endswith("dog"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return list_of(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=rf"cannot read the folder {tmp_path}/dog: Permission denied$"):
        source(f"pictures:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{0}", r"unknown data source .*; did you mean folder:{0}, or pictures:{0} for images without captions\?$"),
        ("{0}/x.tar", r"; did you mean webdataset:{0}/x\.tar\?$"),
        ("{0}/*.array_record", r"; did you mean array_record:{0}/\*\.array_record\?$"),
        ("folder:", r"unknown data source 'folder:' in config\.data\.source; choose one of: array_record:PATTERN"),
        ("openmoji:x", "unknown data source 'openmoji:x'"),
        ("", "unknown data source ''"),
        ("folder:{0}/none", r"the data folder {0}/none does not exist$"),
        ("folder:{0}/a.png", r"the data folder {0}/a\.png is a file, and no folder$"),
        ("folder:{0}/empty", r"{0}/empty holds no images \(.*\) and no list of them \(metadata\.jsonl, metadata\.csv"),
        ("pictures:{0}/empty", r"{0}/empty holds no images \(\.png, .*\)$"),
        ("webdataset:{0}", r"names the folder {0}; did you mean the files in it, {0}/\*\?$"),
        ("webdataset:{0}/none.tar", r"{0}/none\.tar cannot be read: No such file or directory$"),
        ("array_record:{0}/none", r"{0}/none does not exist$"),
    ],
)
def test_mistakes_in_names_are_one_line(tmp_path, name, said):
    pictures(tmp_path, "a.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=said.replace("{0}", str(tmp_path))) as error:
        source(name.format(tmp_path))
    assert "\n" not in str(error.value)


def test_a_text_model_refuses_images_without_captions(tmp_path):
    pictures(tmp_path, "a.png")
    with pytest.raises(UserError, match=r"pictures:.* has no captions, and this run needs them; folder:"):
        source(f"pictures:{tmp_path}", rules=RowRules(needs=("caption",)))
    assert source(f"pictures:{tmp_path}")[0]["caption"] == ""


def test_a_caption_is_drawn_each_time_by_seed_and_row(tmp_path):
    """Each of three is drawn over the epochs, the same ones in a run that resumes, and flips stay as they were."""
    rows = [{"file_name": f"{i}.png", "text": "one" if i else ["x", "y", "z"]} for i in range(8)]
    for row in rows:
        Image.fromarray(np.arange(27, dtype=np.uint8).reshape(3, 3, 3)).save(tmp_path / row["file_name"])
    lines(tmp_path / "metadata.jsonl", rows)

    def batches(*transforms):
        return loader(source(f"folder:{tmp_path}"), 8, 5, [Flip(), *transforms, Select(("caption", "image"))])

    first, plain = batches(DRAW_CAPTION), batches()
    drawn = []
    for _ in range(5):
        batch = next(first)
        np.testing.assert_array_equal(batch["image"], next(plain)["image"])
        drawn.append(sorted(batch["caption"]))
    assert {caption for captions in drawn for caption in captions[:7]} == {"one"}
    assert len({captions[7] for captions in drawn}) > 1
    again = batches(DRAW_CAPTION)
    again.set_state(json.dumps({**json.loads(first.get_state()), "step": 3}).encode())
    assert sorted(next(again)["caption"]) == drawn[3]
    rng = np.random.default_rng(0)
    counts = Counter(DRAW_CAPTION.random_map({"captions": ("x", "y")}, rng)["caption"] for _ in range(200))
    assert 80 < counts["x"] < 120
