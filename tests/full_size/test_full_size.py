"""Stable Diffusion 1.5 and SDXL in their published sizes, in both layouts, beside diffusers.

    python -m pytest tests/full_size -n 0 -m slow -s

SDXL takes 15 GiB of disk and about 16 of memory. What is written is deleted.
"""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published import CLIPS, UNETS, VAES

from sdjax.checkpoints.checkpoint import FORMATS, TOKENIZERS, Checkpoint, Component
from sdjax.checkpoints.families import scheduler_config
from sdjax.checkpoints.layouts.diffusers import read_folder, write_checkpoint
from sdjax.checkpoints.layouts.original import TOKENIZER_FOLDERS, read_single_file
from sdjax.checkpoints.layouts.original_writer import write_single_file
from sdjax.core.compilation import jit
from sdjax.core.tree import flatten, size, unflatten
from sdjax.models.autoencoder import Autoencoder
from sdjax.models.conditioning import Cond
from sdjax.models.layers import timestep_embedding
from sdjax.models.unet import UNet

SCRIPT = Path(__file__).with_name("diffusers_outputs.py")
TOLERANCE = 1e-4  # of the largest value of diffusers' output
NOISE = np.random.default_rng(0).standard_normal(1_000_003).astype(np.float16)
LATENTS = (1, 32, 32, 4)

MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "sd1": {"unet": UNETS["sd1"], "vae": VAES["sd"], "text_encoder": CLIPS["clip_l"]},
    "sdxl": {
        "unet": UNETS["sdxl"],
        "vae": VAES["sdxl"],
        "text_encoder": CLIPS["clip_l"],
        "text_encoder_2": CLIPS["openclip_bigg"],
    },
}
TOTALS = {"sd1": 859_520_964, "sdxl": 2_567_463_684}  # parameters of the published UNets
# What is compared is float32; the text encoders are only read.
DTYPES: dict[str, str | None] = {"unet": "float32", "vae": "float32", "text_encoder": None, "text_encoder_2": None}


class Written(NamedTuple):
    """A model of random float16 weights on disk, and diffusers' answers."""

    folder: Path
    file: Path
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


@pytest.fixture(params=MODELS)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Written]:
    folder, file = tmp_path / "folder", tmp_path / "model.safetensors"
    checkpoint = random_checkpoint(request.param)
    assert size(checkpoint.components["unet"].params) == TOTALS[request.param]
    write_checkpoint(folder, checkpoint, None)
    write_single_file(file, checkpoint, None)
    del checkpoint
    gc.collect()
    inputs = random_inputs(request.param)
    np.savez(tmp_path / "inputs.npz", **inputs)
    command = [sys.executable, SCRIPT, folder, tmp_path / "inputs.npz", tmp_path / "outputs.npz"]
    subprocess.run(command, check=True, capture_output=True)
    yield Written(folder, file, inputs, dict(np.load(tmp_path / "outputs.npz")))
    shutil.rmtree(folder)
    file.unlink()


@pytest.mark.slow
def test_full_size_outputs_match_diffusers(written: Written):
    readers: dict[str, Callable[[], Checkpoint]] = {
        "folder": partial(read_folder, written.folder, DTYPES, place=place),
        "single file": partial(read_single_file, written.file, DTYPES, place=place),
    }
    for layout, read in readers.items():
        found = ours(read(), written.inputs)
        for name, expected in written.outputs.items():
            assert expected.std() > 0.1
            error = np.abs(found[name] - expected).max() / np.abs(expected).max()
            print(f"{written.outputs['unet'].shape} {layout}, {name}: {error:.1e} of the largest value")
            assert error < TOLERANCE, f"{layout}, {name}: {error:.1e}"
        gc.collect()


def ours(checkpoint: Checkpoint, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the checkpoint's UNet and decoder answer."""
    vector = None
    if checkpoint.components["unet"].config.vector_dim is not None:
        sinusoids = timestep_embedding(jnp.asarray(inputs["numbers"]).reshape(-1), 256).reshape(1, -1)
        vector = jnp.concatenate([inputs["pooled"], sinusoids], axis=-1)
    network, autoencoder = UNet(checkpoint.components["unet"].config), Autoencoder(checkpoint.components["vae"].config)
    unet = jit(lambda params, x, t, cond: network.apply({"params": params}, x, t, cond))
    decode = jit(lambda params, z: autoencoder.apply({"params": params}, z, method="decode"))
    cond = Cond(context=jnp.asarray(inputs["context"]), vector=vector)
    return {
        "unet": np.asarray(unet(checkpoint.components["unet"].params, inputs["x"], inputs["t"], cond)),
        "picture": np.asarray(decode(checkpoint.components["vae"].params, inputs["z"])),
    }


def random_checkpoint(family: str) -> Checkpoint:
    parts: dict[str, Component] = {}
    tokenizers: dict[str, Path] = {}
    for name, config in MODELS[family].items():
        sizes = FORMATS[name].from_config(config, name)
        parts[name] = Component(sizes, random_params(FORMATS[name].shapes(sizes)), config)
        if name in TOKENIZERS:
            tokenizers[name] = TOKENIZER_FOLDERS / ("clip_l" if name == "text_encoder" else "open_clip")
    return Checkpoint(components=parts, scheduler=scheduler_config(family, "epsilon", ()), tokenizers=tokenizers)


def random_params(shapes: Any) -> dict[str, Any]:
    """In float16: kernels of unit gain, scales around 1, biases around 0."""

    def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
        # Each parameter begins elsewhere in the noise, so that two of one shape differ.
        noise = np.resize(np.roll(NOISE, -sum(name.encode()) * 997), shape)
        if len(shape) == 1:
            return (noise * np.float16(0.2) + np.float16(name.endswith("scale"))).astype(np.float16)
        return noise * np.float16(1 / np.sqrt(np.prod(shape[:-1], dtype=np.float64)))

    return unflatten({name: value(name, leaf.shape) for name, leaf in flatten(shapes).items()})


def random_inputs(family: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "x": rng.standard_normal(LATENTS, np.float32),
        "t": np.array([321.0], np.float32),
        "context": rng.standard_normal((1, 77, UNETS[family]["cross_attention_dim"]), np.float32),
        "pooled": rng.standard_normal((1, 1280), np.float32),
        "numbers": np.array([[1024, 1024, 0, 16, 768, 1024]], np.float32),
        "z": rng.standard_normal(LATENTS, np.float32),
    }


def place(array: np.ndarray, name: str) -> jax.Array:
    del name
    return jax.device_put(array)
