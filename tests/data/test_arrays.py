"""Files of arrays whose headers lie: refused in one line, and nothing is made of their size."""

from __future__ import annotations

import io
import os
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.data.arrays import MAX_BYTES, read_npy, read_npz


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    length = len(header).to_bytes(2 if version[0] == 1 else 4, "little")
    return b"\x93NUMPY" + version + length + header.encode() + data


def described(descr: str = "'<f4'", shape: str = "(2,)", order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}\n"


def archive(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("mu.npy", content)
    return file.getvalue()


SLACK = 5_000_000  # bytes, for what Python's parser takes of a header of 10,000
WHOLE = npy(described(), bytes(8))
BROKEN = {
    "nothing": b"",
    "text": b"[1, 2]",
    "cut within the header": WHOLE[:20],
    "cut within the data": WHOLE[:-1],
    "a version that is none": npy(described(), bytes(8), b"\x09\x00"),
    "a header beyond the file": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
    "more than the file holds": npy(described(shape="(10**12,)")),
    "a trillion numbers": npy(described(shape="(1000000000000,)")),
    "a shape that overflows": npy(described(shape="(9223372036854775807, 9223372036854775807)")),
    "negative": npy(described(shape="(-2,)"), bytes(8)),
    "no shape": npy(described(shape="'a'"), bytes(8)),
    "objects": npy(described(descr="'|O'"), bytes(99)),
    "a type that is none": npy(described(descr="'<f4,('"), bytes(8)),
    "a type of 2 GB": npy(described(descr="'|V2000000000'"), bytes(8)),
    "nested": npy("(" * 1000, bytes(8)),
    "nested lists": npy("[" * 900 + "]" * 900, bytes(8)),
    "not a literal": npy("__import__('os').mkdir('made')\n", bytes(8)),
    "a string without an end": npy("{'descr': '<f4\n", bytes(8)),
    "an indentation": npy("  {\n 'a':\n", bytes(8)),
    "a pickle": b"\x80\x04K\x01.",
}


@pytest.mark.parametrize("name", BROKEN)
def test_headers_that_lie(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.npy").write_bytes(BROKEN[name])
    (tmp_path / "x.npz").write_bytes(archive(BROKEN[name]))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"depth: cannot read .*x\.npy: it is not an array of numbers") as error:
        read_npy(tmp_path / "x.npy", "depth")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"cannot read .*x\.npz: it is not an array of numbers"):
        read_npz(tmp_path / "x.npz", ["mu", "sigma"])
    assert tracemalloc.get_traced_memory()[1] < SLACK
    tracemalloc.stop()
    assert not (tmp_path / "made").exists()


def test_arrays_are_read(tmp_path: Path):
    array = np.arange(6.0).reshape(2, 3)
    np.save(tmp_path / "x.npy", array)
    np.testing.assert_array_equal(read_npy(tmp_path / "x.npy", ""), array)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", mu=array, other=np.zeros(3))
        found = read_npz(tmp_path / "x.npz", ["mu", "sigma"])
        assert found.keys() == {"mu"}
        np.testing.assert_array_equal(found["mu"], array)
    with pytest.raises(UserError, match="it is not an array"):
        read_npy(tmp_path / "x.npz", "depth")


def test_little_that_unpacks_to_much(tmp_path: Path):
    path, count = tmp_path / "x.npz", MAX_BYTES // 4 + 1
    path.write_bytes(archive(npy(described(shape=f"({count},)"), bytes(4 * count))))
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    with pytest.raises(UserError, match="it is not an array of numbers"):
        read_npz(path, ["mu"])
    assert tracemalloc.get_traced_memory()[1] < SLACK
    tracemalloc.stop()


def test_files_that_are_not_there(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("pipe", "no ordinary file"), ("none", "No such file"), (".", "no ordinary file")):
        with pytest.raises(UserError, match=f"a place: cannot read .*: {words}|it is {words}"):
            read_npy(tmp_path / name, "a place")
        with pytest.raises(UserError, match=words):
            read_npz(tmp_path / name, ["mu"])
