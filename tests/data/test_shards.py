"""Tar shards and ArrayRecord shards: the same examples as went in, by any index, and a clear line for what is wrong."""

import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from sdjax.core.errors import UserError
from sdjax.data.images import image_size
from sdjax.data.sources import tar_index
from sdjax.data.sources.array_records import encode, write_array_record
from sdjax.data.sources.open import source
from sdjax.data.sources.record_files import write_records
from sdjax.data.sources.rules import ANY, RowRules
from sdjax.data.sources.tensors import pack, unpack


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(number, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(np.full((2 + number % 3, 3, 3), number, np.uint8)).save(file, kind)
    return file.getvalue()


def write_tar(path, members, **how):
    with tarfile.open(path, "w", **how) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def shards(folder, count=3, rows=4):
    for shard in range(count):
        members = []
        for row in range(rows):
            number = shard * rows + row
            caption = f"caption {number} é\n".encode()
            metadata = f'{{"caption": "caption {number} é", "url": "x"}}'.encode()
            members += [(f"{number:09d}.png", picture(number)), (f"{number:09d}.json", metadata)]
            members += [(f"{number:09d}.txt", caption)] if row % 2 else []
        write_tar(folder / f"{shard:05d}.tar", members)
    return f"webdataset:{folder}/{{00000..{count - 1:05d}}}.tar"


def test_tar_members_are_found_by_any_index(tmp_path):
    examples = source(shards(tmp_path))
    assert len(examples) == 12
    for index in np.random.default_rng(0).permutation(12).tolist():
        example = examples[index]
        assert example["caption"] == f"caption {index} é"
        assert example["id"] == examples.id(index) == f"{index // 4:05d}/{index:09d}"
        assert (example["image"] == index).all()
        assert example["image"].shape[:2] == examples.size(index) == (2 + index % 3, 3)
    with pytest.raises(IndexError):
        examples[12]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tar_formats(tmp_path, form):
    stem = f"{'d' * 90}/{'n' * 95}"  # longer than the 100 bytes of a plain header
    members = [
        (f"{stem}.png", picture(1)),
        ("ä.jpg", picture(2, "JPEG")),
        (f"{stem}.txt", b"long"),
        ("ä.txt", b"short"),
    ]
    write_tar(tmp_path / "a.tar", [*members, ("ä.cls", b"3"), ("notes", b"")], format=form)
    examples = source(f"webdataset:{tmp_path}/a.tar")
    assert [(examples[i]["id"], examples[i]["caption"]) for i in range(len(examples))] == [
        (f"a/{stem}", "long"),
        ("a/ä", "short"),
    ]


def test_tar_index_is_cached_until_changed(tmp_path, monkeypatch):
    name = shards(tmp_path, count=1)
    built = []
    build = tar_index.build
    monkeypatch.setattr(tar_index, "build", lambda path: built.append(path) or build(path))
    first = source(name)[3]
    assert source(name)[3]["id"] == first["id"]
    assert len(built) == 1
    (kept,) = (tmp_path / "cache" / "sdjax" / "tar_index").iterdir()
    assert not list(tmp_path.glob("*.npz"))
    write_tar(tmp_path / "00000.tar", [("b.png", picture(9)), ("b.txt", b"new")])
    assert source(name)[0]["caption"] == "new"
    assert len(built) == 2
    for damage in (kept.read_bytes()[:100], b"", b"PK\x03\x04 nothing"):
        kept.write_bytes(damage)
        assert source(name)[0]["caption"] == "new"
    assert len(built) == 5


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(source(shards(tmp_path, count=1))) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"keys": np.array([255] * 40, np.uint8)},
        {"keys": np.array(["a"] * 4)},
        {"key_ends": np.array([9, 9, -9, 36])},
        {"key_ends": np.array([9, 90, 27, 36])},
        {"key_ends": np.array([1.0, 2.0, 3.0, 36.0])},
        {"spans": np.full((4, 4), 2**62)},
        {"spans": np.full((4, 4), -1)},
        {"spans": np.zeros((4, 3), np.int64)},
        {"spans": np.zeros((3, 4), np.int64)},
        {"is_json": np.zeros(3, np.uint8)},
        {"is_json": np.zeros((4, 1), np.uint8)},
        {"problems": np.zeros(3)},
        {"problems": np.array([["a"]])},
        {"stamp": np.zeros(3)},
        {"spans": np.array(None)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_index_that_is_none_is_built_anew(tmp_path, change):
    """Somebody else's, with the right stamp."""
    name = shards(tmp_path, count=1)
    expected = [source(name)[i]["id"] for i in range(4)]
    (kept,) = (tmp_path / "cache" / "sdjax" / "tar_index").iterdir()
    with np.load(kept) as arrays:
        planted = dict(arrays) | change
    np.savez(kept, **planted)
    assert [source(name)[i]["id"] for i in range(4)] == expected


def test_an_index_where_others_can_write_is_not_read(tmp_path, caplog):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    assert len(source(shards(tmp_path))) == 12
    assert caplog.text.count("indices of tar files are not kept") == 1
    assert not list((tmp_path / "cache").rglob("*.npz"))


def link(path):
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
        info = tarfile.TarInfo("a.txt")
        tar.addfile(info)


def huge(path):
    """A header that claims 8 GB, at the end of a small file."""
    info = tarfile.TarInfo("b.png")
    info.size = 8 << 30
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    whole = path.read_bytes()[:512]
    path.write_bytes(whole + info.tobuf() + bytes(1024))


def huge_extension(path):
    """An extended header that claims to be of 2^60 bytes."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 60
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))


def cut(at):
    def write(path):
        write_tar(
            path, [(f"{i}.{kind}", picture(i) if kind == "png" else b"x") for i in range(4) for kind in ("png", "txt")]
        )
        path.write_bytes(path.read_bytes()[:at])

    return write


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: write_tar(path, [("a.png", picture(1))]), r"a\.tar member a has no caption"),
        (lambda path: write_tar(path, [("a.txt", b"x")]), r"a\.tar member a has no image"),
        (lambda path: write_tar(path, [("a.txt", b"x")] * 2 + [("a.png", picture(1))]), r"a\.txt is in the file twice"),
        (lambda path: write_tar(path, []), r"holds no examples"),
        (link, r"member a\.png is a link"),
        (huge, r"member b\.png should have 8589934592 bytes, but the tar file ends before"),
        (huge_extension, r"a\.tar is truncated or no tar file"),
        (cut(1500), r"a\.tar .*(truncated|ends before)"),
        (cut(2048), r"a\.tar is truncated or no tar file: there is no member and no end of the archive at byte 2048"),
        (cut(2100), r"a\.tar is truncated or no tar file"),
        (cut(0), r"a\.tar is truncated or no tar file"),
        (lambda path: path.write_bytes(b"no tar" * 1000), r"a\.tar is truncated or no tar file"),
        (lambda path: tarfile.open(path, "w:gz").close(), r"a\.tar is compressed"),
    ],
)
def test_what_is_wrong_with_a_tar_is_named(tmp_path, write, said):
    write(tmp_path / "a.tar")
    with pytest.raises(UserError, match=said):
        source(f"webdataset:{tmp_path}/a.tar")


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("a.png", picture(1)[:40]), ("a.txt", b"x")], r"cannot read image .*a\.tar member a"),
        ([("a.png", picture(1)), ("a.txt", b"\xff\xfe")], r"a\.tar member a\.txt is not UTF-8"),
        (
            [("a.png", picture(1)), ("a.json", b'{"caption": 3}')],
            r"member a\.json: caption is neither a string",
        ),
        ([("a.png", picture(1)), ("a.json", b"[" * 100_000)], r"member a\.json is not JSON"),
    ],
)
def test_a_bad_member_is_named_when_it_is_read(tmp_path, members, said):
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=said):
        source(f"webdataset:{tmp_path}/a.tar")[0]


def test_a_tar_cut_after_it_was_indexed_is_no_short_read(tmp_path):
    examples = source(shards(tmp_path, count=1))
    os.truncate(tmp_path / "00000.tar", 2000)
    with pytest.raises(UserError, match="was cut after it was indexed"):
        examples[3]


def test_same_shard_name_in_two_folders(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shards(tmp_path / folder, count=1)
    examples = source(f"webdataset:{tmp_path}/a/*.tar,{tmp_path}/b/*.tar")
    assert len({examples.id(i) for i in range(len(examples))}) == 8


def test_splits_of_shards_stand_in_the_pattern(tmp_path):
    for split, count in (("train", 2), ("test", 1)):
        (tmp_path / split).mkdir()
        shards(tmp_path / split, count)
    assert len(source(f"webdataset:{tmp_path}/{{split}}/*.tar", "test")) == 4
    with pytest.raises(UserError, match="no split 'test'"):
        source(f"webdataset:{tmp_path}/train/*.tar", "test")


def test_names_with_dots(tmp_path):
    """Half of the images have a dot in their names; photo.seg.png is a further kind of photo, in WebDataset's words."""
    members = []
    for number in range(4):
        stem = f"a/photo{'.v' * (number % 2)}{number}"
        members += [(f"{stem}.png", picture(number)), (f"{stem}.txt", b"%d" % number)]
    write_tar(tmp_path / "a.tar", [*members, ("a/photo0.seg.png", picture(9))])
    examples = source(f"webdataset:{tmp_path}/a.tar")
    assert [examples[i]["caption"] for i in range(len(examples))] == ["0", "1", "2", "3"]
    assert examples.id(1) == "a/a/photo.v1"


def test_further_kinds_are_told(tmp_path, caplog):
    members = [("a.png", picture(1)), ("a.txt", b"x"), ("a.seg.png", picture(2)), ("a.depth.png", picture(3))]
    write_tar(tmp_path / "a.tar", members)
    assert len(source(f"webdataset:{tmp_path}/a.tar")) == 1
    assert caplog.messages == [f"{tmp_path}/a.tar: 2 further kinds of other examples are left out, e.g. a.seg"]
    write_tar(tmp_path / "b.tar", [("b.seg.png", picture(2)), ("b.txt", b"x")])
    with pytest.raises(UserError, match=r"member b has no image \(.*\) \(and 1 more;"):
        source(f"webdataset:{tmp_path}/b.tar")


def test_joined_tars_are_read_to_their_end(tmp_path):
    """cat a.tar b.tar; each has its own end, padded with zeros to 10 kB."""
    parts = []
    for part, numbers in enumerate([(0, 1), (2,), (3, 4)]):
        images, texts = ((f"{n}.png", picture(n)) for n in numbers), ((f"{n}.txt", b"%d" % n) for n in numbers)
        write_tar(tmp_path / f"{part}.tar", [*images, *texts])
        parts.append((tmp_path / f"{part}.tar").read_bytes())
    (tmp_path / "all.tar").write_bytes(b"".join(parts))
    examples = source(f"webdataset:{tmp_path}/all.tar")
    assert [(examples[i]["caption"], int(examples[i]["image"][0, 0, 0])) for i in range(5)] == [
        (str(number), number) for number in range(5)
    ]
    (tmp_path / "all.tar").write_bytes(parts[0] + b"junk" * 200)
    with pytest.raises(UserError, match=r"all\.tar is truncated or no tar file: .* at byte 10240$"):
        source(f"webdataset:{tmp_path}/all.tar")


def test_captions_and_classes_of_tars(tmp_path):
    """An autoencoder needs no caption, a class is a number in .cls, and a text model needs every caption."""
    members = [("0.jpg", picture(0, "JPEG")), ("1.png", picture(1)), ("1.cls", b"3\n"), ("2.png", picture(2))]
    write_tar(tmp_path / "a.tar", [*members, ("2.txt", b"\xff"), ("2.cls", b"0")])
    name = f"webdataset:{tmp_path}/a.tar"
    rows = source(name, rules=ANY)
    assert [(rows[i]["id"], rows[i]["caption"], int(rows[i].get("label", -1))) for i in range(len(rows))] == [
        ("a/0", "", -1),
        ("a/1", "", 3),
        ("a/2", "", 0),
    ]
    assert rows.classes == ("0", "1", "2", "3")
    with pytest.raises(UserError, match=r"a\.tar member 0 has no caption \(txt, json\) \(and 1 more; "):
        source(name)
    with pytest.raises(UserError, match=r"a\.tar member 0 has no class \(cls\)$"):
        source(name, rules=RowRules(("label",)))
    assert len(source(name, rules=RowRules(("label",), on_bad="skip"))) == 2
    for text in (b"3000000000", b"-1", b"dog", b"", b"1" * 5000):
        write_tar(tmp_path / "b.tar", [("0.png", picture(0)), ("0.cls", text)])
        with pytest.raises(UserError, match=r"b\.tar member 0 has a cls that is no number from 0 to 99999$"):
            source(f"webdataset:{tmp_path}/b.tar", rules=ANY)


def test_what_systems_hide_in_tars_is_left_out(tmp_path):
    hidden = ["./._0.png", "__MACOSX/0.png", "d/.ipynb_checkpoints/0.png", "d/.0.txt"]
    members = [("./0.png", picture(1)), ("./0.txt", b"x"), *[(name, b"\0\5\x16\7") for name in hidden]]
    write_tar(tmp_path / "a.tar", members)
    assert len(source(f"webdataset:{tmp_path}/a.tar")) == 1


def test_array_records_give_back_what_was_written(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"image": rng.integers(0, 256, (4, 5, 3), np.uint8), "caption": f"ü {i}", "id": f"n{i}"} for i in range(7)]
    assert write_array_record(tmp_path / "a-0.array_record", rows[:4]) == 4
    jpeg = picture(5, "JPEG")
    write_array_record(tmp_path / "a-1.array_record", [*rows[4:], {"image": jpeg, "caption": ""}])
    examples = source(f"array_record:{tmp_path}/a-*.array_record")
    assert len(examples) == 8
    for index in (6, 0, 4, 3, 1, 5, 2):
        np.testing.assert_equal(examples[index], rows[index])
        assert examples.id(index) == f"n{index}"
    np.testing.assert_array_equal(examples[7]["image"], np.asarray(Image.open(io.BytesIO(jpeg))))
    assert examples[7]["id"] == "a-1.array_record/3"
    assert examples.size(0) == (4, 5)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (b"x" * 50, r"cannot read .*a\.array_record record 1: Error while deserializing"),
        (pack({"image": np.zeros(3, np.uint8)}), r"record 1 has no caption, but image"),
        (pack({"image": np.zeros(3, np.uint8), "caption": np.full(1, 255, np.uint8)}), "not an image|not UTF-8"),
        (pack({"image": np.frombuffer(picture(1), np.uint8), "caption": np.full(1, 255, np.uint8)}), "is not UTF-8"),
    ],
)
def test_a_bad_record_is_named(tmp_path, record, said):
    good = encode({"image": picture(1), "caption": "x"})
    write_records(tmp_path / "a.array_record", [good, record])
    examples = source(f"array_record:{tmp_path}/a.array_record")
    assert examples[0]["caption"] == "x"
    with pytest.raises(UserError, match=said):
        examples[1]


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\x07" * 9000])
def test_a_damaged_record_file_is_named(tmp_path, damage):
    path = tmp_path / "a.array_record"
    write_array_record(path, [{"image": picture(1), "caption": "x"}] * 3)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"a\.array_record is truncated or no ArrayRecord file"):
        source(f"array_record:{path}")


def test_a_flipped_bit_in_records_gives_no_other_row(tmp_path):
    """Of 60 damages within what is stored, each row is the one that was written, or an error in one line."""
    rng, path = np.random.default_rng(0), tmp_path / "a.array_record"
    rows = [{"image": rng.integers(0, 256, (6, 5, 3), np.uint8), "caption": f"c{i}", "id": f"n{i}"} for i in range(4)]
    write_array_record(path, rows)
    whole, errors = path.read_bytes(), []
    end = len(whole.rstrip(b"\0"))
    for _ in range(60):
        data = bytearray(whole)
        data[rng.integers(0, min(end, 4096))] ^= 1 << rng.integers(0, 8)
        path.write_bytes(data)
        for i in range(4):
            try:
                np.testing.assert_equal(source(f"array_record:{path}")[i], rows[i])
            except UserError as error:
                errors.append(str(error))
    assert 0 < len(errors) < 240
    assert not [error for error in errors if "\n" in error]


def test_packing_keeps_every_dtype():
    import jax.numpy as jnp

    arrays = {
        "bfloat16": np.arange(6).astype(jnp.bfloat16).reshape(2, 3).T,
        "float16": np.arange(24, dtype=np.float16).reshape(2, 3, 4)[:, ::-1, ::2],
        "scalar": np.array(3.5, np.float32),
        "none": np.zeros((0, 4), np.int32),
    }
    back = unpack(pack(arrays), "test")
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)
    for wrong in (np.array(["a"]), np.array([None]), np.arange(3, dtype=">i4")):
        with pytest.raises(ValueError, match="has type"):
            pack({"x": wrong})


def test_sizes_are_those_of_upright_pictures(tmp_path):
    image = Image.new("RGB", (4, 2))
    for orientation in range(1, 9):
        exif = image.getexif()
        exif[0x0112] = orientation
        for kind in ("jpg", "png", "webp"):
            image.save(tmp_path / f"a.{kind}", exif=exif)
            assert image_size(tmp_path / f"a.{kind}") == ((4, 2) if orientation >= 5 else (2, 4)), (kind, orientation)
