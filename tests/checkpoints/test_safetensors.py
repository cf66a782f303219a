from __future__ import annotations

import json
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sdjax.checkpoints.storage.safetensors import read_safetensors, read_sharded, write_safetensors
from sdjax.core.errors import UserError

WEIGHTS = {
    "b.weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
    "a.bias": np.array([1.5, -2.25], np.float32),
    "scalar": np.array(3.0, np.float32),
}


def packed(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_written_files_are_read_by_safetensors(tmp_path: Path, dtype: str):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, WEIGHTS, jnp.dtype(dtype))
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "pt"
        theirs = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    ours = read_safetensors(path)
    assert theirs.keys() == ours.keys() == WEIGHTS.keys()
    for name, weight in WEIGHTS.items():
        expected = torch.from_numpy(weight).to(getattr(torch, dtype))
        assert torch.equal(theirs[name], expected)
        assert ours[name].shape == weight.shape
        assert np.asarray(ours[name]).dtype == dtype
        np.testing.assert_array_equal(np.asarray(ours[name]).astype(np.float32), expected.float().numpy())
    assert list(tmp_path.iterdir()) == [path]


def test_every_dtype_of_safetensors_is_read(tmp_path: Path):
    names = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    tensors = {name: (torch.arange(-3, 9).reshape(3, 4) > 2).to(getattr(torch, name)) for name in names}
    tensors |= {name: torch.tensor([1.5, -6.0]).to(getattr(torch, name)) for name in ("float8_e4m3fn", "float8_e5m2")}
    save_file(tensors, tmp_path / "x.safetensors")
    for name, tensor in read_safetensors(tmp_path / "x.safetensors").items():
        assert np.asarray(tensor).dtype == jnp.dtype(name)
        np.testing.assert_array_equal(np.asarray(tensor).astype(np.float64), tensors[name].double().numpy())


def test_shards_are_one_set_of_tensors(tmp_path: Path):
    parts = {"one.safetensors": {"a": WEIGHTS["a.bias"]}, "two.safetensors": {"b": WEIGHTS["b.weight"]}}
    for name, tensors in parts.items():
        write_safetensors(tmp_path / name, tensors, np.float32)
    index = tmp_path / "x.safetensors.index.json"

    def with_map(weight_map: object) -> Path:
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return index

    found = read_sharded(with_map({"a": "one.safetensors", "b": "two.safetensors"}))
    np.testing.assert_array_equal(np.asarray(found["b"]), WEIGHTS["b.weight"])
    for weight_map, words in (
        ({"b": "one.safetensors"}, "lacks b"),
        ({"a": "three.safetensors"}, "three.safetensors"),
        ({"a": "../one.safetensors"}, "outside its folder"),
        (["a"], "no weight_map"),
    ):
        with pytest.raises(UserError, match=words):
            read_sharded(with_map(weight_map))


@pytest.mark.parametrize("kept", [0, 5, 8, 40, 0.999])
def test_truncated_files_are_refused_in_one_line(tmp_path: Path, kept: float):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, WEIGHTS, np.float32)
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(UserError, match="truncated") as error:
        read_safetensors(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"<html>not found, and at some length so that eight bytes are there</html>",
        packed(b"{not json", b""),
        packed(b"\xff\xfe\xfd", b""),
        packed(["a"], b""),
        packed({"__metadata__": 3}, b""),
        packed({"a": 3}, b""),
        packed({"a": {"dtype": "F32"}}, b""),
        packed({"a": entry(offsets=[0, 8, 16])}, bytes(16)),
        packed({"a": entry(shape=3)}, bytes(8)),
        packed({"a": entry(shape=[3])}, bytes(8)),
        packed({"a": entry(shape=[-2])}, bytes(8)),
        packed({"a": entry(shape=[2.0])}, bytes(8)),
        packed({"a": entry(offsets=[8, 0])}, bytes(8)),
        packed({"a": entry(dtype="F4")}, bytes(8)),
        packed({"a": entry(), "b": entry()}, bytes(8)),
        packed({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)),
        packed({"a": entry()}, bytes(12)),
    ],
)
def test_corrupt_files_are_refused_in_one_line(tmp_path: Path, content: bytes):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_safetensors(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_and_files_cut_later_are_refused(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    for missing in (path, tmp_path):
        with pytest.raises(UserError, match="cannot read"):
            read_safetensors(missing)
    write_safetensors(path, WEIGHTS, np.float32)
    tensors = read_safetensors(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="was cut"):
        np.asarray(tensors["scalar"])


def test_a_file_of_the_users_is_never_overwritten(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2)}, path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="was not written by sdjax"):
        write_safetensors(path, WEIGHTS, np.float32)
    assert path.read_bytes() == before
    path.unlink()
    write_safetensors(path, WEIGHTS, np.float32)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"a\.bias holds values that are not finite"):
        write_safetensors(path, WEIGHTS | {"a.bias": np.float32([1, np.nan])}, np.float32)
    assert path.read_bytes() == before, "a failed write leaves the old file"
    write_safetensors(path, {"a": np.ones(2)}, np.float16)  # one of ours may be replaced
    assert read_safetensors(path).keys() == {"a"}
    assert list(tmp_path.iterdir()) == [path]
