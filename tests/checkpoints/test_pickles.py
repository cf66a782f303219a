from __future__ import annotations

import importlib.util
import os
import pickle
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sdjax.checkpoints.storage.weights import read_pickle
from sdjax.core.errors import UserError


def test_every_type_and_every_layout_of_memory(tmp_path: Path):
    names = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "float8_e4m3fn")
    tensors = {name: torch.arange(-6, 6).reshape(3, 4).abs().to(getattr(torch, name)) for name in names}
    tensors |= {"turned": torch.randn(5, 3).T, "part": torch.randn(4, 6)[1:3, ::2], "scalar": torch.tensor(2.5)}
    torch.save({"state_dict": tensors, "global_step": 875000, "epoch": 3}, tmp_path / "x.ckpt")
    found, facts = read_pickle(tmp_path / "x.ckpt")
    assert facts == {"global_step": "875000", "epoch": "3"}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        array = np.asarray(found[name])
        assert array.shape == found[name].shape == tuple(tensor.shape)
        assert array.dtype == found[name].dtype == jnp.dtype(str(tensor.dtype).removeprefix("torch."))
        np.testing.assert_array_equal(array.astype(np.float64), tensor.double().numpy(), err_msg=name)


def test_the_format_before_archives(tmp_path: Path):
    torch.save({"a": torch.ones(3)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    np.testing.assert_array_equal(np.asarray(read_pickle(tmp_path / "x.pt")[0]["a"]), np.ones(3, np.float32))


def test_old_published_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A callback's class as a key, and NumPy's numbers (CompVis/stable-diffusion-v-1-4-original)."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        for part in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, part, types.ModuleType(part))
        patch.setitem(sys.modules, name, module)
        callbacks = {module.ModelCheckpoint: {"best": np.float64(0.5), "monitor": "loss"}}
        torch.save({"state_dict": {"a": torch.ones(2)}, "callbacks": callbacks}, tmp_path / "x.ckpt")
    assert name not in sys.modules
    assert read_pickle(tmp_path / "x.ckpt")[0].keys() == {"a"}


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("archive", [True, False])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, archive: bool):
    path, made = tmp_path / "x.ckpt", tmp_path / "made"
    torch.save({"a": Harmful(made)}, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(UserError, match=r"x\.ckpt is corrupt or holds more than weights; it is not loaded") as error:
        read_pickle(path)
    assert not made.exists()
    assert "\n" not in str(error.value)


def test_files_without_weights_are_refused(tmp_path: Path):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(1000)}, path)
    whole = path.read_bytes()
    contents = [b"", b"text", pickle.dumps({"a": 1}), whole[: len(whole) // 2], whole[:100], whole[:-30]]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.bin") as error:
            read_pickle(path)
        assert "\n" not in str(error.value)
    for value, words in (
        ([torch.ones(1)], "holds a list"),
        ({"step": 3}, "no tensors"),
        ({"state_dict": 3}, "is a int"),
        ({"a": torch.ones(2, 2).to_sparse()}, "which is not read"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "complex64"),
    ):
        torch.save(value, path)
        with pytest.raises(UserError, match=words):
            read_pickle(path)
    path.unlink()
    with pytest.raises(UserError, match="cannot read"):
        read_pickle(path)


def test_without_torch_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else real(name, *rest))
    torch.save({"a": torch.ones(1)}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"x\.ckpt is a pickle.*install torch, or convert the file to \.safetensors"):
        read_pickle(tmp_path / "x.ckpt")
