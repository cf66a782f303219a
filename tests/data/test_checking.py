"""A check names every bad row, and no good one."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from sdjax.core.errors import UserError
from sdjax.data.sources import openmoji
from sdjax.data.sources.array_records import encode
from sdjax.data.sources.record_files import write_records
from sdjax.data.sources.rules import RowRules
from sdjax.data.sources.tensors import pack
from sdjax.data.sources.validate import check, report


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(size=(8, 8)):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_folder_names_every_bad_line(tmp_path):
    for name, data in [
        ("a", picture()),
        ("b", picture((3, 9))),
        ("cut", picture()[:99]),
        ("text", b"no"),
        ("c", picture()),
    ]:
        (tmp_path / f"{name}.png").write_bytes(data)
    (tmp_path / "out.png").symlink_to("/etc/hostname")
    lines = [
        {"file_name": "a.png", "text": "good"},
        {"file_name": "cut.png", "text": "x"},
        "{",
        "",
        {"file_name": "missing.png", "text": "x"},
        {"file_name": "c.png"},
        {"file_name": "c.png", "text": " "},
        {"file_name": "b.png", "text": "x"},
        {"file_name": "text.png", "text": "x"},
        {"file_name": "out.png", "text": "x"},
        {"file_name": "a.png", "caption": "again"},
        "\udcff",
        {"file_name": "b.png", "text": ""},
    ]
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (tmp_path / "metadata.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    found = {
        int(bad.place.rsplit(" ", 1)[1]): bad.reason
        for bad in check(f"folder:{tmp_path}", rules=RowRules(minimum_side=4))
    }
    expected = {
        2: "cannot read image",
        3: "is not JSON",
        5: "which does not exist",
        6: "has no caption (text, caption, prompt); its keys are file_name",
        7: "the caption is empty",
        8: "the image has 9x3 pixels, and 4 are the least",
        9: "not an image",
        10: "outside the folder",
        11: "an earlier row has its id, 'a.png'",
        12: "is not JSON",
        13: "are the least for a side; the caption is empty; an earlier row has its id, 'b.png'",
    }
    assert list(found) == list(expected)
    for line, reason in expected.items():
        assert reason in found[line], line
    assert not any("metadata.jsonl line" in reason for line, reason in found.items() if line not in (2, 9))


def test_validate_names_bad_tar_members(tmp_path):
    def tar(name, members):
        with tarfile.open(tmp_path / name, "w") as file:
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))

    tar(
        "0.tar",
        [
            ("a.png", picture()),
            ("a.txt", b"x"),
            ("b.png", picture()),
            ("c.txt", b"x"),
            ("d.png", b"no"),
            ("d.txt", b"x"),
        ],
    )
    tar("1.tar", [("a.png", picture()), ("a.txt", b"")])
    (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:1024])
    tar("3.tar", [("a.png", picture()), ("a.json", b'{"caption": ""}'), ("b.webp", picture()), ("b.json", b"{}")])
    found = [(bad.place.rpartition("/")[2], bad.reason) for bad in check(f"webdataset:{tmp_path}/{{0..3}}.tar")]
    expected = [
        ("0.tar member b", "has no caption"),
        ("0.tar member c", "has no image"),
        ("0.tar member d", "not an image"),
        ("1.tar", "truncated or no tar file"),
        ("1.tar member a", "has no caption"),
        ("2.tar", "No such file"),
        ("3.tar member a", "the caption is empty"),
        ("3.tar member b", "has no caption (text, caption, prompt); its keys are none"),
    ]
    assert len(found) == len(expected)
    for (place, said), (wanted, reason) in zip(sorted(found), expected, strict=True):
        assert (place, reason in said) == (wanted, True), said


def test_records_are_named_by_file_and_number(tmp_path):
    good = {"image": picture(), "caption": "x"}
    write_records(
        tmp_path / "0",
        [encode({**good, "id": "a"}), b"junk", encode({**good, "caption": " "}), encode({**good, "id": "a"})],
    )
    (tmp_path / "1").write_bytes(b"x" * 70_000)
    write_records(tmp_path / "2", [encode({"image": b"no", "caption": "x"}), pack({"image": np.zeros(2, np.uint8)})])
    found = [(bad.place.rpartition("/")[2], bad.reason) for bad in check(f"array_record:{tmp_path}/{{0..2}}")]
    assert [place for place, _ in found] == ["0 record 1", "0 record 2", "0 record 3", "1", "2 record 0", "2 record 1"]
    for (_, said), reason in zip(
        found,
        ["cannot read", "empty", "id, 'a'", "no ArrayRecord file", "not an image", "has no caption"],
        strict=True,
    ):
        assert reason in said


def test_report_prints_each_and_counts(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    lines = [json.dumps({"file_name": "a.png", "text": "x"}), "oops"] * 300
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    output = io.StringIO()
    assert report(f"folder:{tmp_path}", output=output) == 599
    printed = output.getvalue().splitlines()
    assert len(printed) == 600
    assert printed[-1] == f"folder:{tmp_path} (train): 600 rows, 599 bad"
    assert printed[1] == f"{tmp_path}/metadata.jsonl line 3: an earlier row has its id, 'a.png'"
    assert printed[2].startswith(f"{tmp_path}/metadata.jsonl line 4: is not JSON: ")


def test_validate_good_and_missing_sets(tmp_path, monkeypatch):
    named = list(openmoji.captions().items())
    held_out = [item for item in named if openmoji.is_held_out(item[1])]
    some = dict([*named[:30], *held_out[:2]])
    monkeypatch.setattr(openmoji, "captions", lambda: some)
    assert list(check("openmoji", data_dir=tmp_path / "tfds", rules=RowRules(minimum_side=128))) == []
    assert len(list(check("openmoji", data_dir=tmp_path / "tfds", rules=RowRules(minimum_side=129)))) == 30
    for name, said in [(f"folder:{tmp_path}/none", "does not exist"), ("openmojis", "unknown data source")]:
        with pytest.raises(UserError, match=said):
            list(check(name))
