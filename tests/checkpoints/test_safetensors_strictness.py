"""Headers that safetensors' own reader refuses, or reads in another way than Python's JSON would."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from safetensors import SafetensorError, deserialize

from sdjax.checkpoints.storage.safetensors import read_safetensors
from sdjax.core.errors import UserError

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TWO = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}


def packed(header: object, data: int = 0, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def one(**changes: object) -> bytes:
    return packed({"a": ONE | changes}, 8)


REFUSED_BY_BOTH = {
    "no bytes": b"",
    "fewer than a length has": b"\x02\0\0\0",
    "a header longer than the file": packed(b"{}", length=60),
    "a header beyond any size": packed(b"{}", 100, length=200_000_000),
    "a header of 2**63 bytes": packed(b"{}", 100, length=2**63),
    "no header": packed(b"", 8),
    "not UTF-8": packed(b"\xff"),
    "UTF-16": packed(json.dumps({"a": ONE}).encode("utf-16"), 8),
    "a byte order mark": packed(b"\xef\xbb\xbf" + json.dumps({"a": ONE}).encode(), 8),
    "not JSON": packed(b"{"),
    "something behind the header": packed(json.dumps({"a": ONE}).encode() + b"{}", 8),
    "a list": packed([]),
    "a tensor that is no object": packed({"a": 3}),
    "no type": packed({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8),
    "no shape": packed({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8),
    "no offsets": packed({"a": {"dtype": "F32", "shape": [2]}}, 8),
    "a key of an entry twice": packed(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8),
    "offsets twice": packed(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[9,9],"data_offsets":[0,8]}}', 8),
    "metadata twice": packed(b'{"__metadata__":{},"__metadata__":{},"a":%s}' % json.dumps(ONE).encode(), 8),
    "metadata that are no object": packed({"__metadata__": ["a"], "a": ONE}, 8),
    "metadata of numbers": packed({"__metadata__": {"step": 3}, "a": ONE}, 8),
    "nested metadata": packed({"__metadata__": {"a": {"b": "c"}}, "a": ONE}, 8),
    "half a surrogate pair": packed(rb'{"\ud83d":%s}' % json.dumps(ONE).encode(), 8),
    "half a surrogate pair in the metadata": packed(rb'{"__metadata__":{"a":"\udc00"}}'),
    "a control character in a name": packed(b'{"\n":%s}' % json.dumps(ONE).encode(), 8),
    "NaN": packed(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', 8),
    "a type that is none": one(dtype="F33"),
    "a type that is no text": one(dtype=32),
    "a negative axis": one(shape=[-2]),
    "a broken axis": one(shape=[2.0]),
    "an axis with an exponent": packed(json.dumps({"a": ONE}).encode().replace(b"[2]", b"[2e0]"), 8),
    "an axis of minus zero": packed(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'),
    "an axis as text": one(shape=["2"]),
    "an axis beyond 64 bits": one(shape=[2**64, 0]),
    "a shape that overflows to the right size": one(shape=[2, 2**63 + 1]),
    "bytes that overflow to the right size": one(dtype="I64", shape=[2**61 + 1]),
    "a shape of another size": one(shape=[3]),
    "three offsets": one(data_offsets=[0, 8, 8]),
    "one offset": one(data_offsets=[8]),
    "offsets in the wrong order": one(data_offsets=[8, 0]),
    "offsets beyond the file": one(shape=[4], data_offsets=[0, 16]),
    "offsets beyond 64 bits": one(data_offsets=[2**64, 2**64 + 8]),
    "negative offsets": one(data_offsets=[-8, 0]),
    "a gap before the data": packed({"a": TWO}, 16),
    "a gap between tensors": packed({"a": ONE, "b": TWO | {"data_offsets": [12, 20]}}, 20),
    "two tensors in one place": packed({"a": ONE, "b": ONE}, 8),
    "tensors that overlap": packed({"a": ONE, "b": TWO | {"data_offsets": [4, 12]}}, 12),
    "many tensors in one place": packed({f"{i}": ONE for i in range(1000)}, 8),
    "an empty tensor within another": packed({"a": ONE, "b": ONE | {"shape": [0], "data_offsets": [4, 4]}}, 8),
    "bytes behind the data": packed({"a": ONE}, 9),
    "bytes and no tensor": packed({}, 1),
    "a header of many levels": packed(b'{"a":' + b"[" * 1000 + b"]" * 1000 + b"}"),
}
READ_BY_BOTH = {
    "no tensors": packed({}),
    "white space behind the header": packed(json.dumps({"a": ONE}).encode() + b"  \n\t\r ", 8),
    "metadata": packed({"__metadata__": {"é": "\U0001f600", "": ""}, "a": ONE}, 8),
    "an empty tensor": packed({"a": ONE, "b": ONE | {"shape": [3, 0], "data_offsets": [8, 8]}}, 8),
    "a scalar": one(dtype="F64", shape=[]),
    "another order of the entries": packed({"b": TWO, "a": ONE}, 16),
    "a key that is not known": one(extra=[1, {"a": None}]),
    "an escaped name": packed(rb'{"\u0061\ud83d\ude00":%s}' % json.dumps(ONE).encode(), 8),
}


@pytest.mark.parametrize("name", REFUSED_BY_BOTH)
def test_refused_as_by_the_reference(tmp_path: Path, name: str):
    path = tmp_path / "x.safetensors"
    path.write_bytes(REFUSED_BY_BOTH[name])
    with pytest.raises((SafetensorError, OverflowError)):
        deserialize(REFUSED_BY_BOTH[name])
    with pytest.raises(UserError) as error:
        read_safetensors(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", READ_BY_BOTH)
def test_read_as_by_the_reference(tmp_path: Path, name: str):
    path = tmp_path / "x.safetensors"
    path.write_bytes(READ_BY_BOTH[name])
    theirs = {name: tuple(entry["shape"]) for name, entry in deserialize(READ_BY_BOTH[name])}
    assert {name: tensor.shape for name, tensor in read_safetensors(path).items()} == theirs


ENTRY = json.dumps(ONE).encode()


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b'{"a":%s,"a":%s}' % (ENTRY, ENTRY), "the key 'a' is there twice"),
        (b' {"a":%s}' % ENTRY, "it is no JSON object"),
        (b'{"a":["F32",[2],[0,8]]}', "lacks a dtype, a shape or two offsets"),
    ],
)
def test_refused_though_the_reference_reads_it(tmp_path: Path, header: bytes, words: str):
    """Names twice, of which it takes the last, and what the format's description does not know."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(packed(header, 8))
    assert [name for name, _ in deserialize(packed(header, 8))] == ["a"]
    with pytest.raises(UserError, match=words):
        read_safetensors(path)
