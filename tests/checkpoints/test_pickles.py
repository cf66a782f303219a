from __future__ import annotations

import os
import pickle
import random
import struct
import sys
import time
import tracemalloc
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sdjax.checkpoints.storage.weights import read_pickle
from sdjax.core.errors import UserError

SLACK = 1_000_000  # bytes for what parsing takes, beside the file's own size


class Reduced:
    """Pickled as a call."""

    def __init__(self, called: Callable[..., Any], *arguments: Any) -> None:
        self.call = called, arguments

    def __reduce__(self):
        return self.call


def rewritten(
    path: Path, change: Callable[[str, bytes], bytes] = lambda name, data: data, method: int = zipfile.ZIP_STORED
) -> None:
    """An archive's entries, each as `change` makes it."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(name, data))


def replaced(old: bytes, new: bytes, entry: str = "data.pkl") -> Callable[[str, bytes], bytes]:
    def change(name: str, data: bytes) -> bytes:
        if not name.endswith(entry):
            return data
        assert old in data
        return data.replace(old, new)

    return change


def refused(path: Path) -> str:
    """The one line of the refusal, which took no more memory than the file has, and no time."""
    tracemalloc.start()
    try:
        start = time.monotonic()
        with pytest.raises(UserError) as error:
            read_pickle(path)
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size + SLACK
        assert time.monotonic() - start < 5
    finally:
        tracemalloc.stop()
    said = str(error.value)
    assert path.name in said
    assert "\n" not in said
    return said


def test_every_type_and_every_layout_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without torch."""
    names = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    names += ("float8_e4m3fn", "float8_e5m2")
    tensors = {name: torch.arange(-6, 6).reshape(3, 4).abs().to(getattr(torch, name)) for name in names}
    tensors |= {"turned": torch.randn(5, 3).T, "part": torch.randn(4, 6)[1:3, ::2], "scalar": torch.tensor(2.5)}
    tensors |= {"empty": torch.ones(0, 4), "parameter": torch.nn.Parameter(torch.randn(2, 3))}
    for archive in (True, False):
        path = tmp_path / f"{archive}.ckpt"
        content = {"state_dict": tensors, "global_step": 875000, "epoch": 3}
        torch.save(content, path, _use_new_zipfile_serialization=archive)
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "torch", None)  # type: ignore[arg-type]
            found, facts = read_pickle(path)
            arrays = {name: np.asarray(tensor) for name, tensor in found.items()}
        assert facts == {"global_step": "875000", "epoch": "3"}
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert arrays[name].shape == found[name].shape == tuple(tensor.shape)
            assert arrays[name].dtype == found[name].dtype == jnp.dtype(str(tensor.dtype).removeprefix("torch."))
            expected = tensor.detach().double().numpy()
            np.testing.assert_array_equal(arrays[name].astype(np.float64), expected, err_msg=name)


def test_old_published_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A callback's class as a key, and NumPy's numbers (CompVis/stable-diffusion-v-1-4-original)."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        for part in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, part, types.ModuleType(part))
        patch.setitem(sys.modules, name, module)
        callbacks = {module.ModelCheckpoint: {"best": np.float64(0.5), "monitor": "loss", "seen": {1, 2}}}
        torch.save({"state_dict": {"a": torch.ones(2)}, "callbacks": callbacks}, tmp_path / "x.ckpt")
    assert name not in sys.modules
    assert read_pickle(tmp_path / "x.ckpt")[0].keys() == {"a"}


@pytest.mark.parametrize("archive", [True, False])
def test_nothing_that_a_file_names_is_run(tmp_path: Path, archive: bool):
    path, made = tmp_path / "x.ckpt", tmp_path / "made"
    tensors = {"w": torch.ones(2), "a": Reduced(os.mkdir, str(made))}
    torch.save(tensors, path, _use_new_zipfile_serialization=archive)
    said = refused(path)
    assert not made.exists()
    assert said.endswith("x.ckpt is corrupt or holds more than weights; it is not loaded: it would run posix.mkdir")


def scalar(dtype: str) -> Reduced:
    return Reduced(np.float32(0).__reduce__()[0], np.dtype(dtype), b"")


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: torch.ones(1).expand(1 << 40), "claims more than the 1 elements"),
        (lambda: torch.ones(9).as_strided((9, 9), (0, 1)), "claims more than the 9 elements"),
        (lambda: scalar("V2000000000"), "V2000000000"),
        (lambda: scalar("f8"), "a number of NumPy's"),
        (lambda: Reduced(bytearray, 4_000_000_000), r"would run (builtins|__builtin__)\.bytearray"),
        (lambda: Reduced(pickle.loads, b"."), r"would run pickle\.loads"),
        (lambda: {2**61 - 1 << 3: 1}, "more than 64 bits"),
        (lambda: {(1, 2): 1}, "keys that are neither text nor integers"),
        (lambda: torch.ones(2, 2).to_sparse(), "_get_layout"),
        (lambda: torch.ones(2, dtype=torch.complex64), "ComplexFloatStorage, which is not read"),
        (lambda: torch.ones(2, dtype=torch.uint16), "uint16, which is not read"),
    ],
)
def test_claims_of_pickles(tmp_path: Path, made: Callable[[], Any], words: str):
    torch.save({"b": torch.ones(4), "a": made()}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=words):
        read_pickle(tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt")


def test_tensors_that_share_a_storage_claim_a_few_times_the_file(tmp_path: Path):
    whole = torch.randn(100, 100)
    torch.save({str(i): whole.T if i % 2 else whole for i in range(8)}, tmp_path / "x.ckpt")
    np.testing.assert_array_equal(np.asarray(read_pickle(tmp_path / "x.ckpt")[0]["7"]), whole.T.numpy())
    torch.save({str(i): whole for i in range(100)}, tmp_path / "x.ckpt")
    assert "claim more than 8 times its size" in refused(tmp_path / "x.ckpt")


def test_archives_that_lie(tmp_path: Path):
    """Compressed ones (1 MB that unpacks to 1 GB), entries twice, sizes beyond the entry's, names that climb."""
    path = tmp_path / "x.ckpt"

    def saved() -> None:
        torch.save({"a": torch.arange(4.0)}, path)

    for entry, method in (
        ("data.pkl", zipfile.ZIP_DEFLATED),
        ("data/0", zipfile.ZIP_DEFLATED),
        ("data/0", zipfile.ZIP_LZMA),
    ):
        saved()
        rewritten(path, lambda name, data, entry=entry: bytes(20_000_000) if name.endswith(entry) else data, method)
        assert path.stat().st_size < 100_000
        assert "is compressed or encrypted" in refused(path)
    for old, new, words in (
        (b"K\x04", b"M\xff\x7f", "a storage claims 32767 elements in 16 bytes"),  # of the storage and of the tensor
        (b"K\x04\x85", b"K\x05\x85", "claims more than the 4 elements"),
        (b"K\x00K\x04", b"K\x01K\x04", "claims more than the 4 elements"),  # an offset
        (b"K\x04\x85", b"J\xff\xff\xff\xff\x85", "sizes are none"),
        (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009", "it is not loaded: '9'"),
        (b"ctorch\n", b"cbuiltins\n", "builtins.FloatStorage, which is not read"),
    ):
        saved()
        rewritten(path, replaced(old, new))
        assert words in refused(path)
    saved()
    rewritten(path, replaced(b"little", b"big", "byteorder"))
    assert "another order of bytes" in refused(path)
    saved()
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("x/data.pkl", b"")
    assert "twice" in refused(path)
    saved()
    with zipfile.ZipFile(path) as archive:
        entries = {name.replace("x/", "../../up/"): archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {"../../climbed": b"", "/climbed": b"", **entries}.items():
            archive.writestr(name, data)
    np.testing.assert_array_equal(np.asarray(read_pickle(path)[0]["a"]), np.arange(4.0))
    assert list(tmp_path.iterdir()) == [path]


def test_the_format_before_archives_is_checked(tmp_path: Path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.arange(4.0)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    data = struct.pack("<q4f", 4, 0, 1, 2, 3)
    assert whole.endswith(data)
    head = whole.removesuffix(data)
    for content in (
        whole[:-1],
        head + struct.pack("<q4f", 5, 0, 1, 2, 3),
        head.replace(b"K\x04N", b"J\xff\xff\xff\x7fN") + data,
        head.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89") + data,
    ):
        assert content != whole
        path.write_bytes(content)
        refused(path)


@pytest.mark.parametrize("filling", [b"(", b"}", b"]", b"\x8c\x00", b"K\x01\x85", b"N0", b"2"])
def test_pickles_of_one_operation(tmp_path: Path, filling: bytes):
    path = tmp_path / "x.ckpt"
    torch.save({"a": torch.ones(1)}, path)
    rewritten(path, lambda name, data: filling * 20_000 + b"." if name.endswith("data.pkl") else data)
    size = path.stat().st_size
    tracemalloc.start()
    with pytest.raises(UserError, match="it is not loaded"):
        read_pickle(path)
    assert tracemalloc.get_traced_memory()[1] < 80 * size + SLACK
    tracemalloc.stop()


def test_fuzzed_pickles(tmp_path: Path):
    rng, path, read = random.Random(0), tmp_path / "x.ckpt", 0
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5, 2).T, "c": torch.ones(2, dtype=torch.bfloat16)}
    torch.save({"state_dict": tensors, "epoch": 3, "best": np.float64(1)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    tracemalloc.start()
    for _ in range(150):
        data = bytearray(entries["x/data.pkl"])
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.choice([rng.randrange(256), *b"(}]R\x81bQst.0NK\x85c\x93"])
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in {**entries, "x/data.pkl": bytes(data)}.items():
                archive.writestr(name, content)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            for tensor in read_pickle(path)[0].values():
                assert np.asarray(tensor).nbytes <= path.stat().st_size
            read += 1
        except UserError:
            pass
        assert tracemalloc.get_traced_memory()[1] - before < SLACK
    tracemalloc.stop()
    assert 0 < read < 100


def test_files_without_weights_are_refused(tmp_path: Path):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(1000)}, path)
    whole = path.read_bytes()
    for content in (b"", b"text", pickle.dumps({"a": 1}), whole[: len(whole) // 2], whole[:100], whole[:-30]):
        path.write_bytes(content)
        refused(path)
    for value, words in (
        ([torch.ones(1)], "holds a list"),
        ({"step": 3}, "no tensors"),
        ({"state_dict": 3}, "is a int"),
    ):
        torch.save(value, path)
        assert words in refused(path)
    path.unlink()
    with pytest.raises(UserError, match="cannot read"):
        read_pickle(path)
