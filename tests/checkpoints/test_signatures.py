"""Files that are something else than their name says: read where they hold weights, else named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from sdjax.checkpoints.storage.weights import read_file
from sdjax.core.errors import UserError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4265380512\n"
REFUSED = json.dumps({"error": "Unauthorized", "message": "The creator of this asset requires you to be logged in"})


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (POINTER, "is a Git LFS pointer in the place of the file; git lfs pull fetches it"),
        (b"<!DOCTYPE html>\n<html>" + b" " * 300, "is an HTML or XML page.*download the file again"),
        (b'\n<?xml version="1.0"?><Error>', "is an HTML or XML page"),
        (REFUSED.encode(), 'is text, as a failed download leaves it, that begins \'{"error": "Unauthorized"'),
        (b"Entry not found", "that begins 'Entry not found'"),
        ("Zugriff verweigert: für".encode() + "ü".encode() * 300, "that begins 'Zugriff verweigert"),
        (b"GGUF\3\0\0\0\0\0", "holds no weights: it is a GGUF file"),
        (b"\x89PNG\r\n\x1a\n\0\0", "it is a PNG image"),
        (b"\x1f\x8b\x08\0", "it is a gzip archive; unpack it"),
        (b"", "truncated|corrupt"),
        (bytes(40), "truncated|corrupt"),
    ],
)
def test_what_holds_no_weights_is_named(content: bytes, words: str, suffix: str, tmp_path: Path):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        read_file(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_safetensors_by_another_name(tmp_path: Path):
    stored = np.arange(6, dtype=np.float32).reshape(2, 3)
    (tmp_path / "model.ckpt").write_bytes(save({"a": stored}, {"modelspec.prediction_type": "v"}))
    tensors, facts, _ = read_file(tmp_path / "model.ckpt")
    np.testing.assert_array_equal(np.asarray(tensors["a"]), stored)
    assert facts == {"modelspec.prediction_type": "v"}


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_by_another_name(archive: bool, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(UserError, match=r"is a pickle under the name of a safetensors file; call it model\.ckpt"):
        read_file(path)
