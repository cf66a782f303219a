"""Rows that a run cannot use: they stop it, or are left out, counted and named; training and check agree on them."""

import io
import json
import pickle
import tarfile

import pytest
from PIL import Image

from configs import finetune, ldm
from sdjax.core.errors import UserError
from sdjax.data.sources import openmoji_parts
from sdjax.data.sources.array_records import encode
from sdjax.data.sources.open import source
from sdjax.data.sources.record_files import write_records
from sdjax.data.sources.rules import ANY, RowRules
from sdjax.data.sources.validate import check, report
from sdjax.tasks.base import open_images, row_rules
from sdjax.tasks.checking import check_data
from sdjax.training.limits import check_limits

SKIP = RowRules(on_bad="skip")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def encoded(number, size=(4, 4)):
    file = io.BytesIO()
    Image.new("RGB", size, (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def folder_of(path, count, bad=()):
    path.mkdir()
    for number in range(count):
        (path / f"{number}.png").write_bytes(b"no" if number in bad else encoded(number))
    rows = [{"file_name": f"{number}.png", "text": f"number {number}"} for number in range(count)]
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return f"folder:{path}"


def numbers(rows):
    return [int(rows[i]["image"][0, 0, 0]) for i in range(len(rows))]


def test_a_bad_image_stops_or_the_next_stands_in_its_place(tmp_path, caplog):
    name = folder_of(tmp_path / "a", 5, bad=(1, 2, 4))
    with pytest.raises(UserError, match=r"cannot read image .*1\.png \(metadata\.jsonl line 2\): not an image"):
        numbers(source(name))
    rows = source(name, rules=SKIP)
    for _ in range(2):
        assert numbers(rows) == [0, 3, 3, 3, 0]
    assert rows.size(4) == (4, 4)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert all(f"{number}.png" in line for number, line in zip((1, 2, 4), said, strict=True))
    assert said[2].endswith("(bad row 3 of this run)")


def test_rows_without_captions_are_left_out_counted_and_named(tmp_path, caplog):
    name = folder_of(tmp_path / "a", 4)
    listed = tmp_path / "a" / "metadata.jsonl"
    listed.write_text(listed.read_text().replace('"text": "number 1"', '"text": null'))
    with pytest.raises(UserError, match=r"metadata\.jsonl line 2 has no caption: text is null$"):
        source(name)
    assert numbers(source(name, rules=SKIP)) == [0, 2, 3]
    assert "line 2 has no caption: text is null" in caplog.records[0].getMessage()
    assert caplog.records[1].getMessage().endswith("1 of 4 rows are bad and left out; --check_data names all")
    assert numbers(source(name, rules=ANY)) == [0, 1, 2, 3]


def test_empty_captions_are_told(tmp_path, caplog):
    (tmp_path / "a").mkdir()
    for number in range(3):
        (tmp_path / "a" / f"{number}.png").write_bytes(encoded(number))
        (tmp_path / "a" / f"{number}.txt").write_text("x" if number == 0 else " \n")
    assert numbers(source(f"folder:{tmp_path}/a")) == [0, 1, 2]
    assert caplog.messages == [f"folder:{tmp_path}/a: images with an empty caption: 1 so far, e.g. 1.png"]
    assert [bad.reason for bad in check(f"folder:{tmp_path}/a")] == ["the caption is empty"] * 2


def test_nothing_but_bad_rows_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"3 rows in turn are bad; --check_data names them"):
        source(folder_of(tmp_path / "a", 3, bad=range(3)), rules=SKIP)[0]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metadata.jsonl").write_text("{}\n{}")
    with pytest.raises(UserError, match=r"line 1 has no file_name; its keys are none \(and 1 more; --check_data names"):
        source(f"folder:{tmp_path}/b", rules=SKIP)
    with pytest.raises(UserError, match=r"unknown rule 'ignore' in config\.data\.on_bad; choose one of: skip, stop"):
        source(f"folder:{tmp_path}/a", rules=RowRules(on_bad="ignore"))


def test_a_missing_shard_among_many(tmp_path, caplog):
    for shard in (0, 2):
        write_records(tmp_path / f"{shard}.array_record", [encode({"image": encoded(shard), "caption": "x"})] * 2)
    name = f"array_record:{tmp_path}/{{0..2}}.array_record"
    with pytest.raises(UserError, match=r"1\.array_record does not exist$"):
        source(name)
    assert numbers(source(name, rules=SKIP)) == [0, 0, 2, 2]
    assert [(bad.place.rpartition("/")[2], bad.reason) for bad in check(name)] == [("1.array_record", "does not exist")]


def test_the_least_side_and_what_is_enlarged(tmp_path, caplog):
    (tmp_path / "a").mkdir()
    for number, size in enumerate([(32, 32), (1, 1), (4000, 2), (400, 40), (40, 33)]):
        (tmp_path / "a" / f"{number}.png").write_bytes(encoded(number, size))
    name = f"pictures:{tmp_path}/a"
    with pytest.raises(UserError, match=r"/1\.png: the image has 1x1 pixels, and 8 are the least for a side$"):
        numbers(source(name, rules=RowRules((), minimum_side=8)))
    assert numbers(source(name, rules=RowRules((), 8, on_bad="skip"))) == [0, 3, 3, 3, 4]
    caplog.clear()
    assert numbers(source(name, rules=RowRules((), size=32))) == [0, 1, 2, 3, 4]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[0] == f"{name}: images smaller than 32 pixels, which are enlarged: 1 so far, e.g. 1.png"
    assert "images more than 8 times as long as wide, most of which is cut off: 1 so far, e.g. 2.png" in said[1]
    output = io.StringIO()
    assert report(name, rules=RowRules((), size=32), output=output) == 0
    assert output.getvalue().splitlines() == [
        f"{name} (train): images more than 8 times as long as wide, most of which is cut off: 2",
        f"{name} (train): images smaller than 32 pixels, which are enlarged: 2",
        f"{name} (train): 5 rows, 0 bad",
    ]


@pytest.mark.parametrize("name", ["pictures:{}/a", "folder:{}/a", "webdataset:{}/a.tar", "array_record:{}/a.record"])
def test_the_check_reads_what_training_reads(tmp_path, name):
    """Row 1 of 3 is no image."""
    folder_of(tmp_path / "a", 3, bad=(1,))
    images = [b"no" if number == 1 else encoded(number) for number in range(3)]
    write_records(tmp_path / "a.record", [encode({"image": image, "caption": "x"}) for image in images])
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, image in enumerate(images):
            for kind, data in (("png", image), ("txt", b"x")):
                info = tarfile.TarInfo(f"{number}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    name = name.format(tmp_path)
    (bad,) = check(name)
    assert bad.place == source(name)._rows.place(1)
    assert "not an image" in bad.reason
    assert pickle.loads(pickle.dumps(source(name)))[2]["id"] == source(name)[2]["id"]  # as workers get it
    assert report(name, output=io.StringIO()) == 1
    with pytest.raises(UserError, match="not an image"):
        source(name)[1]


def test_the_check_reads_scenes(monkeypatch):
    monkeypatch.setitem(openmoji_parts.SCENES, "held_out", 4)
    assert report("openmoji_scenes", "held_out", output=(output := io.StringIO())) == 0
    assert output.getvalue() == "openmoji_scenes (held_out): 4 rows, 0 bad\n"


def test_the_check_of_fine_tuning_needs_what_the_checkpoint_does(tmp_path, capsys):
    config = finetune.get_config("checkpoints/openmoji")
    config.data.source = folder_of(tmp_path / "a", 2)
    (tmp_path / "a" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "x"}\n{"file_name": "1.png"}')
    assert check_data(config) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/a/metadata.jsonl line 2: has no caption (text, caption, prompt); its keys are file_name",
        f"folder:{tmp_path}/a (train): images smaller than 128 pixels, which are enlarged: 1",
        f"folder:{tmp_path}/a (train): 2 rows, 1 bad",
    ]


def config_of(conditioning, name="diffusion", **data):
    config = ldm.get_config("cin256_tiny" if conditioning == "class_conditional" else "celebahq_tiny").unlock()
    config.task.name, config.task.conditioning = name, conditioning
    config.data.update(data)
    return config


def test_a_config_says_what_its_rows_need(tmp_path):
    folder_of(tmp_path / "a", 1)
    rules = row_rules(config_of("unconditional", minimum_side=3, on_bad="skip", links=("/data",)))
    assert rules == RowRules((), 3, 32, "skip", ("/data",))
    assert row_rules(config_of("text_bert")).needs == ("caption",)
    assert row_rules(config_of("unconditional", "classifier")).needs == ("label",)
    assert row_rules(config_of("unconditional", "contrastive")).needs == ("caption",)
    with pytest.raises(UserError, match=r"line 1 has no label; its keys are file_name, text$"):
        open_images(config_of("class_conditional", source=f"folder:{tmp_path}/a"))
    with pytest.raises(UserError, match=r"0\.png has no label: it is in no folder of its class$"):
        open_images(config_of("class_conditional", source=f"pictures:{tmp_path}/a"))
    with pytest.raises(UserError, match=r"has no captions, and this run needs them"):
        open_images(config_of("text_bert", source=f"pictures:{tmp_path}/a"))
    with pytest.raises(UserError, match=r"config\.data\.minimum_side=-1 must be at least 0"):
        check_limits(config_of("unconditional", minimum_side=-1))
