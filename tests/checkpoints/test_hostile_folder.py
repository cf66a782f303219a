"""A folder that somebody else wrote: each of its files damaged in turn, each value of its index of another type."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import zoo
from hostile import OTHER_TYPES
from tiny_checkpoints import DDIM, tiny_checkpoint, write_tokenizer
from torch_reference import drawn

from sdjax.checkpoints import checkpoint
from sdjax.checkpoints.checkpoint import ALL_FORMATS, Checkpoint, Component, tokenizers_of
from sdjax.checkpoints.layouts import diffusers
from sdjax.checkpoints.layouts.diffusers import INDEX, read_folder, write_checkpoint
from sdjax.checkpoints.open import resolve
from sdjax.core.errors import UserError
from sdjax.core.precision import dtype_named
from sdjax.diffusion_model.model import build_model
from sdjax.models.embedders import ClassEmbedderConfig

SETTINGS = {
    **{"task": "class_conditional", "size": 16, "steps": 4, "guidance_scale": 2.5, "none": 9, "classes": ["a", "b"]},
    **{"nothing": [1, 2], "object_classes": 3},
}
DAMAGE: dict[str, bytes] = {
    "nested": b"[" * 10_000,
    "a key twice": b'{"a": 1, "a": 2}',
    "half a surrogate pair": rb'{"_class_name": "\ud83d"}',
    "UTF-16": "{}".encode("utf-16"),
    "another type": b"[]",
}


@pytest.fixture(scope="module", params=["text", "classes"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion, and a latent model of classes that has all settings that there are."""
    path = tmp_path_factory.mktemp(request.param) / "model"
    if request.param == "text":
        tokenizer = path.parent / "tokenizer"
        write_checkpoint(path, tiny_checkpoint("sd1", tokenizer, write_tokenizer(tokenizer)))
        return path
    sizes = {"unet": zoo.ldm_unet(8), "vae": zoo.VAES["vq_f4"], "class_embedder": ClassEmbedderConfig(10, 8)}
    parts = {name: Component(config, drawn(ALL_FORMATS[name].shapes(config))) for name, config in sizes.items()}
    made = Checkpoint(components=parts, scheduler=DDIM, conditioning="class_conditional", settings=SETTINGS)
    write_checkpoint(path, made)
    return path


def opened(folder: Path) -> None:
    """The host's part of loading."""
    found = read_folder(folder)
    text = found.conditioning == "text"
    tokenizers = dict(zip(["text_encoder"], tokenizers_of(found), strict=True)) if text else {}
    build_model(found, tokenizers, dtype_named("float32"), folder)


@pytest.fixture(autouse=True)
def remembered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays are read once: it is what stands beside them that changes."""
    params, found = diffusers.read_params, dict[str, Any]()

    def once(name: str, *rest: Any) -> dict[str, Any]:
        if name not in found:
            found[name] = params(name, *rest)
        return found[name]

    monkeypatch.setattr(diffusers, "read_params", once)


def test_damaged_files(folder: Path):
    opened(folder)
    files = sorted(folder.rglob("*.json"))
    assert len(files) >= 5
    for file in files:
        whole = file.read_bytes()
        for damage in DAMAGE.values():
            file.write_bytes(damage)
            with pytest.raises(UserError, match=file.name) as error:
                opened(folder)
            assert "\n" not in str(error.value)
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(UserError):
            opened(folder)
        file.unlink()
        file.write_bytes(whole)
    opened(folder)


def test_an_index_of_other_types(folder: Path):
    path = folder / INDEX
    whole = json.loads(path.read_text())
    own = whole.get("_sdjax", {})
    changed = [{**whole, key: value} for key in whole for value in OTHER_TYPES[::2]]
    changed += [{**whole, "_sdjax": {**own, key: value}} for key in own for value in OTHER_TYPES]
    said = []
    for index in changed:
        path.write_text(json.dumps(index))
        try:
            opened(folder)
        except UserError as error:
            said.append(str(error))
    path.write_text(json.dumps(whole))
    assert len(said) > 20
    assert not [message for message in said if "\n" in message or "model" not in message]


def test_names_in_an_index_of_shards(folder: Path):
    """Which must lie beside it, and be files."""
    unet = folder / "unet"
    (weights,) = unet.glob("*.safetensors")
    hidden, index = unet / "hidden", unet / f"{weights.name}.index.json"
    weights.rename(hidden)
    os.mkfifo(unet / "pipe.safetensors")
    try:
        for file in (
            "a" * 5000,
            "a\0b.safetensors",
            "",
            ".",
            "..",
            "/etc/passwd",
            "../x.safetensors",
            "pipe.safetensors",
        ):
            index.write_text(json.dumps({"weight_map": {"conv_in.weight": file}}))
            with pytest.raises(UserError) as error:
                read_folder(folder)
            assert "\n" not in str(error.value)
    finally:
        index.unlink()
        hidden.rename(weights)
        (unet / "pipe.safetensors").unlink()
    opened(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens_map.json", "merges.txt"])
def test_a_tokenizers_link_to_another_file_is_not_copied(name: str, tmp_path: Path):
    """Into a folder that is then given to others."""
    tokenizer, secret = tmp_path / "tokenizer", tmp_path / "secret"
    write_tokenizer(tokenizer)
    secret.write_text("a user's key")
    (tokenizer / name).unlink(missing_ok=True)
    (tokenizer / name).symlink_to(secret)
    with pytest.raises(UserError, match=f"{name}|{tokenizer}"):
        checkpoint.write_tokenizer("text_encoder", tokenizer, tmp_path / "copy", {})
    assert not [path for path in (tmp_path / "copy").rglob("*") if path.read_bytes() == secret.read_bytes()]


@pytest.mark.parametrize("source", ["a" * 5000, "~nobody-of-this-name/model", "a/" * 2000 + "b", "a\nb/c"])
def test_names_that_are_none(source: str):
    with pytest.raises(UserError, match="there is no file or folder"):
        resolve(source)
