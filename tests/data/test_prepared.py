"""Prepared data: what was written comes back, whatever killed the writer, and nothing that was damaged is believed."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from faults import full_disk
from hostile import OTHER_TYPES, changed
from ml_collections import ConfigDict

from sdjax.core.errors import UserError
from sdjax.data.bucketed import bucketed
from sdjax.data.loader import Shard
from sdjax.data.prepared.dataset import PreparedSource
from sdjax.data.prepared.writer import PreparedRow, PreparedWriter
from sdjax.data.sources.record_files import write_records
from sdjax.data.sources.tensors import pack
from sdjax.data.transforms.buckets import Size
from sdjax.tasks.checking import check_data

TABLE = (Size(8, 16), Size(16, 16), Size(16, 8))
IDENTITY = {"source": "folder:x", "autoencoder": {"sha256": "ab12"}}
TOTAL = 23


def row(index):
    rng = np.random.default_rng(index)
    bucket = (0, 2)[index % 2]
    height, width = TABLE[bucket]
    latents = rng.standard_normal((height // 8, width // 8, 8)).astype(jnp.bfloat16)
    return PreparedRow(bucket, f"image {index}", {"moments": latents, "index": np.array(index, np.int32)})


def writer(folder, shard=Shard(), **other):  # noqa: B008
    return PreparedWriter(
        folder, **{"identity": IDENTITY, "buckets": TABLE, "total": TOTAL, "rows_per_shard": 5, "shard": shard} | other
    )


def write_all(folder, shard=Shard(), most=100):  # noqa: B008
    made, here = [], writer(folder, shard)
    for part, _ in zip(here.pending(), range(most), strict=False):
        here.write(part, map(row, range(part.start, part.stop)))
        made.append(part.shard)
    return here, made


def write_set(folder):
    here, _ = write_all(folder)
    here.finish({"empty": np.arange(6, dtype=np.float16).reshape(2, 3)})
    return folder


def assert_whole(folder):
    source = PreparedSource(folder)
    assert len(source) == TOTAL
    for index in np.random.default_rng(0).permutation(TOTAL).tolist():
        expected = row(index)
        np.testing.assert_equal(source[index], expected.arrays)
        assert source[index]["moments"].dtype == jnp.bfloat16
        assert source.id(index) == expected.id
        assert source.buckets[index] == expected.bucket
    return source


def test_what_was_written_comes_back(tmp_path):
    source = assert_whole(write_set(tmp_path / "set"))
    assert source.table == TABLE
    assert source.identity == IDENTITY
    np.testing.assert_equal(source.constants, {"empty": np.arange(6, dtype=np.float16).reshape(2, 3)})
    assert source.fields[0]["moments"] == ("bfloat16", (1, 2, 8))
    np.testing.assert_equal(pickle.loads(pickle.dumps(source))[7], row(7).arrays)
    batch = next(bucketed(source, source.buckets, 11, 0))
    assert batch["moments"].shape in {(11, 1, 2, 8), (11, 2, 1, 8)}


def test_processes_share_shards_and_resume(tmp_path):
    made = [write_all(tmp_path, Shard(index, 3), most=1)[1] for index in range(3)]
    assert made == [[0], [1], [2]]
    with pytest.raises(UserError, match=r"2 of 5 shards of .* are missing, e\.g\. 3"):
        writer(tmp_path).finish({})
    with pytest.raises(UserError, match=r"its preparation has not finished \(index\.json is missing\)"):
        PreparedSource(tmp_path)
    writers = [write_all(tmp_path, Shard(index, 2)) for index in range(2)]
    assert [made for _, made in writers] == [[4], [3]]
    writers[1][0].finish({})
    assert not (tmp_path / "index.json").exists()
    writers[0][0].finish({})
    assert_whole(tmp_path)
    assert list(writer(tmp_path).pending()) == []


@pytest.mark.parametrize("room", [0, 1000])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(room, tmp_path):
    message = "cannot write .*: File too large; make room and run the same command again"
    with full_disk(room), pytest.raises(UserError, match=message):
        write_all(tmp_path)
    here, _ = write_all(tmp_path)
    here.finish({})
    assert_whole(tmp_path)
    assert not list(tmp_path.glob("*.partial"))


class KilledError(Exception):
    pass


def test_kill_before_rename_loses_nothing(tmp_path, monkeypatch):
    """One shard renames two files, the plan and the end three more; the writer dies before each of them in turn."""
    replace, deaths = Path.replace, 0
    for life in range(100):
        left = [1 if life % 2 else 2]

        def rename(self, target, left=left):
            left[0] -= 1
            if not left[0]:
                raise KilledError
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", rename if life < 60 else replace)
        before = {path.name: path.read_bytes() for path in tmp_path.glob("*.array_record")}
        try:
            left[0] += life // 2 % 4
            here, _ = write_all(tmp_path)
            here.finish({})
            break
        except KilledError:
            deaths += 1
        assert not (tmp_path / "index.json").exists()
        for name, data in before.items():
            assert (tmp_path / name).read_bytes() == data
    assert deaths >= 6
    assert_whole(tmp_path)
    assert not [path.name for path in tmp_path.iterdir() if path.suffix == ".partial"]


SCRIPT = """
import sys, time
sys.path[:0] = {paths!r}
from test_prepared import row, writer
here = writer({folder!r})
print("ready", flush=True)
for part in here.pending():
    def rows():
        for index in range(part.start, part.stop):
            time.sleep(0.02)
            yield row(index)
    here.write(part, rows())
"""


def test_killed_processes_leave_whole_shards(tmp_path):
    script = SCRIPT.format(paths=[str(path) for path in Path(__file__).parents[:2]], folder=str(tmp_path))
    for life in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
        )
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.07 + 0.09 * life)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert 0 < len(list(tmp_path.glob("*.array_record"))) <= 5
    write_set(tmp_path)
    assert_whole(tmp_path)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            {"identity": {**IDENTITY, "autoencoder": {"sha256": "cd34"}}},
            "identity.autoencoder.sha256 ab12, and .* cd34",
        ),
        ({"total": 24}, "total 23, and this run has 24: choose another folder"),
        ({"rows_per_shard": 6}, "rows_per_shard 5, and this run has 6"),
        ({"buckets": TABLE[:2]}, "was begun with table"),
    ],
)
def test_another_set_in_the_folder_is_refused(tmp_path, other, said):
    writer(tmp_path)
    with pytest.raises(UserError, match=said):
        writer(tmp_path, **other)


def test_unequal_rows_are_refused_before_writing(tmp_path):
    here = writer(tmp_path)
    part = next(iter(here.pending()))
    rows = [row(index) for index in range(5)]
    for wrong in (
        rows[:4],
        [*rows, rows[0]],
        [*rows[:4], rows[4]._replace(bucket=3)],
        [*rows[:4], rows[4]._replace(bucket=2)],
        [*rows[:4], rows[4]._replace(arrays={"moments": rows[4].arrays["moments"]})],
        [*rows[:4], rows[4]._replace(arrays={**rows[4].arrays, "index": np.array(4)})],
    ):
        with pytest.raises(ValueError, match=r"rows, not|the table has|an earlier row"):
            here.write(part, wrong)
        assert next(iter(here.pending())) == part


@pytest.fixture(scope="module")
def whole_set(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("prepared") / "set")


def in_json(name, change):
    def damage(folder):
        data = json.loads((folder / name).read_text())
        change(data)
        (folder / name).write_text(json.dumps(data))

    return damage


def flip_byte(folder):
    path = folder / "shard-00001-of-00005.array_record"
    data = bytearray(path.read_bytes())
    middle = data.index(b"moments")
    data[middle + 60] ^= 1
    path.write_bytes(data)


def other_rows(folder):
    """A file of the same size and number of rows, each with arrays that are not those of its bucket."""
    path = folder / "shard-00001-of-00005.array_record"
    size = path.stat().st_size
    write_records(path, [pack({"moments": np.zeros((4, 1, 4), jnp.bfloat16), "index": np.array(3, np.int32)})] * 5)
    assert path.stat().st_size == size


SHARD = "shard-00001-of-00005"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: os.truncate(f / f"{SHARD}.array_record", 70_000), rf"{SHARD}\.array_record has 70000 bytes, and"),
        (lambda f: (f / f"{SHARD}.array_record").unlink(), rf"{SHARD}\.array_record has no bytes"),
        (lambda f: (f / f"{SHARD}.json").unlink(), rf"{SHARD}\.json is missing"),
        (lambda f: os.truncate(f / f"{SHARD}.json", 40), rf"{SHARD}\.json is not JSON"),
        (in_json(f"{SHARD}.json", lambda d: d["ids"].pop()), rf"{SHARD}\.json does not describe the 5 rows"),
        (in_json(f"{SHARD}.json", lambda d: d.update(buckets=[9] * 5)), rf"{SHARD}\.json does not describe"),
        (in_json(f"{SHARD}.json", lambda d: d.update(buckets="no")), rf"{SHARD}\.json is damaged"),
        (flip_byte, rf"cannot read .*{SHARD}\.array_record record"),
        (other_rows, rf"{SHARD}\.array_record record \d holds .*, and .*index\.json says"),
        (lambda f: (f / "constants.safetensors").unlink(), r"constants\.safetensors is missing"),
        (lambda f: os.truncate(f / "constants.safetensors", 50), r"cannot read .*constants\.safetensors"),
        (in_json("index.json", lambda d: d.update(constants={})), r"constants\.safetensors holds empty float16"),
        (in_json("index.json", lambda d: d.update(version=2)), r"index\.json has version 2; this program reads 1"),
        (in_json("index.json", lambda d: d.update(total=10**15)), r"index\.json is damaged: .*1000000000000000 rows"),
        (in_json("index.json", lambda d: d.update(total=10**6)), r"shard-00000-of-200000\.json is missing"),
        (in_json("index.json", lambda d: d.update(rows_per_shard=0)), r"index\.json is damaged"),
        (in_json("index.json", lambda d: d.pop("table")), r"index\.json is damaged"),
        (in_json("index.json", lambda d: d["fields"].pop("2")), r"index\.json does not describe all buckets"),
        (
            in_json("index.json", lambda d: d["fields"]["0"].update(moments=["bfloat16", [2**60, 4]])),
            "and .*index.json",
        ),
        (lambda f: shutil.rmtree(f), "there is no such folder"),
    ],
)
def test_damage_is_named_with_its_file(tmp_path, whole_set, damage, said):
    folder = shutil.copytree(whole_set, tmp_path / "set")
    damage(folder)
    with pytest.raises(UserError, match=said):  # noqa: PT012  (found when the set is opened, or when it is read)
        source = PreparedSource(folder)
        for index in range(len(source)):
            source[index]


def test_a_damaged_shard_is_written_again(tmp_path, whole_set):
    folder = shutil.copytree(whole_set, tmp_path / "set")
    os.truncate(folder / f"{SHARD}.array_record", 70_000)
    (folder / "shard-00003-of-00005.json").write_text("{}")
    here, made = write_all(folder)
    assert made == [1, 3]
    here.finish({})
    assert_whole(folder)


def test_the_check_reads_precomputed_rows(tmp_path, capsys):
    """Row 7 holds a NaN: training names it, too, before the loss is one."""

    def rows(part):
        for index in range(part.start, part.stop):
            made = row(index)
            made.arrays["moments"][0, 0, 0] = np.nan if index == 7 else 0
            yield made

    here = writer(tmp_path)
    for part in here.pending():
        here.write(part, rows(part))
    here.finish({})
    place = f"{tmp_path}/shard-00001-of-00005.array_record record 2"
    with pytest.raises(UserError, match=f"{place}: the moments are not all finite; prepare the data again"):
        PreparedSource(tmp_path)[7]
    assert check_data(ConfigDict({"data": {"prepared": str(tmp_path)}})) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{place}: the moments are not all finite; prepare the data again",
        f"{tmp_path}: 23 rows, 1 bad",
    ]


@pytest.mark.parametrize("name", ["index.json", "shard-00000-of-00005.json"])
def test_descriptions_of_other_types(tmp_path, name):
    """A folder that somebody else wrote."""
    path = write_set(tmp_path) / name
    whole = json.loads(path.read_text())
    refused = 0
    for value in OTHER_TYPES:
        for _, other in changed(whole, value):
            path.write_text(json.dumps(other))
            try:
                PreparedSource(tmp_path)[0]
            except UserError:
                refused += 1
    assert refused > 100
