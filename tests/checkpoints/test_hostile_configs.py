"""Configs whose values are of other types and sizes than they should be: one line, before a network is traced."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import zoo
from hostile import OTHER_TYPES, changed

from sdjax.checkpoints import mapping
from sdjax.checkpoints.checkpoint import ALL_FORMATS, ReadOptions, read_params
from sdjax.checkpoints.layouts.diffusers import read_component
from sdjax.checkpoints.mapping import MAX_BLOCKS, stored_shapes
from sdjax.checkpoints.networks import autoencoder, embedders, unet, unet2d
from sdjax.checkpoints.storage.safetensors import write_safetensors
from sdjax.core.errors import UserError
from sdjax.models.autoencoder import VQConfig
from sdjax.models.embedders import ClassEmbedderConfig, RescalerConfig

SIZES = {
    "unet": zoo.UNETS["sdxl"],
    "unet without text": zoo.LDM,
    "unet of other sizes": zoo.ADM,
    "unet of captions": zoo.IF["if_ii"],
    "vae": zoo.VAES["vq_f4"],
    "text_encoder": zoo.clip_text(100, 99, projects=True),
    "text_encoder of T5": zoo.T5,
    "bert": zoo.BERT,
    "class_embedder": ClassEmbedderConfig(10, 8),
    "rescaler": RescalerConfig(10, 2, 3),
    "classifier": zoo.CLASSIFIER,
    "prior": zoo.PRIOR,
}


def read(name: str, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """As a folder is read, but that the config is at hand."""
    name = name.split()[0]
    read_params(name, ALL_FORMATS[name].from_config(config, "the config"), tensors, "the folder", ReadOptions())


def stored(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    form, sizes = ALL_FORMATS[name.split()[0]], SIZES[name]
    shapes = stored_shapes(form.table(sizes), form.shapes(sizes))
    tensors = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
    config = json.loads(json.dumps(form.to_config(sizes)))
    read(name, config, tensors)
    return config, tensors


def attempt(name: str, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> str:
    """The refusal; "" where the value is of no consequence for the weights."""
    try:
        if ALL_FORMATS[name.split()[0]].from_config(config, "the config") != SIZES[name]:
            read(name, config, tensors)  # heads, for one, are in no weights
    except UserError as error:
        return str(error).split("\n")[0]
    return ""


@pytest.mark.parametrize("name", SIZES)
def test_values_of_other_types(name: str):
    config, tensors = stored(name)
    for value in OTHER_TYPES[::2]:  # each that is accepted takes a tracing
        for key, other in changed(config, value):
            said = attempt(name, other, tensors)
            assert said == "" or "the config" in said or "the folder" in said, key
            assert len(said) < 1000, key


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_sizes_beyond_the_weights(name: str):
    config, tensors = stored(name)
    for value in (*OTHER_TYPES[1::2], 1, 3, 2**12, 2**20, [2**20, 2**20], [32] * 10):
        for key, other in changed(config, value):
            start = time.monotonic()
            attempt(name, other, tensors)
            assert time.monotonic() - start < 30, key


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("unet", {"layers_per_block": 2000}, r"24010 blocks of layers: the weights are \d+ tensors"),
        ("unet", {"layers_per_block": 10**9}, "layers_per_block = 1000000000 in the config is not supported"),
        ("unet", {"transformer_layers_per_block": 2**20}, "blocks of layers"),
        ("unet without text", {"layers_per_block": 1000}, "4004 blocks of layers"),
        ("unet of captions", {"layers_per_block": [1, 1000]}, "2008 blocks of layers"),
        ("vae", {"layers_per_block": 2000}, "12007 blocks of layers"),
        ("vae", {"block_out_channels": [8] * 30}, "a list of 1 to 10 positive integers"),
        ("vae", {"latent_channels": 10**12}, "latent_channels = 1000000000000 in the config"),
        ("text_encoder", {"num_hidden_layers": 100_000}, "100000 blocks of layers"),
        ("text_encoder", {"vocab_size": 10**12}, "vocab_size = 1000000000000 in the config"),
        ("bert", {"encoder_layers": 30_000}, "30000 blocks of layers"),
        ("rescaler", {"n_stages": 60}, "n_stages = 60 in the config is not supported"),
        ("classifier", {"size": 10**6}, "size = 1000000 in the config is not supported"),
        ("classifier", {"encoder": 3}, "encoder = 3 in the config is not supported"),
        ("classifier", {"size": 1}, "size = 1 in the config is not supported; it must be a multiple of 2"),
    ],
)
def test_sizes_that_no_weights_hold(name: str, change: dict[str, Any], words: str):
    config, tensors = stored(name)
    start = time.monotonic()
    with pytest.raises(UserError, match=words):
        read(name, config | change, tensors)
    assert time.monotonic() - start < 1


def test_blocks_are_bounded_whatever_the_weights_are(tmp_path: Path):
    """A file of very many empty tensors."""
    write_safetensors(tmp_path / "model.safetensors", {str(i): np.zeros(0, np.float32) for i in range(1500)}, None)
    config = ALL_FORMATS["text_encoder"].to_config(SIZES["text_encoder"])
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1200}))
    with pytest.raises(UserError, match=f"1200 blocks.*1500 tensors; at most {MAX_BLOCKS} blocks are read"):
        read_component(tmp_path, "text_encoder")


def test_a_large_image_is_no_array():
    """A codebook's autoencoder of ten levels is made for images of 512 pixels, which exist in name alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapping, "traced", lambda init, *inputs: {"inputs": inputs})
        for shapes, sizes in (
            (autoencoder.shapes, VQConfig((8,) * 10, groups=4)),
            (unet.shapes, dataclasses.replace(zoo.UNETS["sd1"], in_channels=2**20, channels=(8,) * 10)),
            (unet2d.shapes, dataclasses.replace(zoo.LDM, in_channels=2**20, channels=(8,) * 10)),
            (embedders.rescaler_shapes, RescalerConfig(10, 10, 3)),
            (unet2d.classifier_shapes, dataclasses.replace(zoo.CLASSIFIER, size=2**12)),
        ):
            (image, *_) = shapes.__wrapped__(sizes)["inputs"]  # not the cached result
            assert isinstance(image, jax.ShapeDtypeStruct)
