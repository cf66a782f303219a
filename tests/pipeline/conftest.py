"""Tiny checkpoints of Stable Diffusion's families, each opened once by PyTorch diffusers and once here."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import diffusers
import every_model
import jax
import numpy as np
import pytest
import torch
import zoo
from every_model import KINDS
from PIL import Image
from tiny_checkpoints import tiny_checkpoint
from torch_reference import drawn, randomised

import sdjax
from sdjax.checkpoints.checkpoint import Component
from sdjax.checkpoints.layouts.diffusers import write_checkpoint, write_component
from sdjax.checkpoints.networks import controlnet
from sdjax.data.text.tokenizer_training import train_tokenizer
from sdjax.models.controlnet import config_for

WORDS = ("red heart", "blue cat with a hat", "a painting of a dog", "flag: Norway", "smiling face")
VOCABULARY = 560  # room for all bytes, so that any prompt has tokens of its own

T2I_ADAPTERS = {
    "full": {"channels": (64, 128), "downscale_factor": zoo.FACTOR},
    "grey": {"channels": (64, 128), "downscale_factor": zoo.FACTOR, "in_channels": 1},
    "xl": {"channels": (64, 64, 128, 128), "downscale_factor": 2 * zoo.FACTOR, "adapter_type": "full_adapter_xl"},
}


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, Path]:
    return every_model.write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="session")
def folder_of(files, tmp_path_factory):
    """folder_of(kind): its checkpoint, written once."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            KINDS[name].make(root / name, files)
        return root / name

    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """checkpoints(family): one with random weights."""
    tokenizer = tmp_path_factory.mktemp("source") / "tokenizer"
    size = train_tokenizer(WORDS, tokenizer, VOCABULARY).vocab_size
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": zoo.TOKENS}))

    return lambda family: tiny_checkpoint(family, tokenizer, size)


@pytest.fixture(scope="session")
def folders(tmp_path_factory, checkpoints):
    """folders(family, **scheduler): a folder of diffusers, with changes to its scheduler config."""
    parent = tmp_path_factory.mktemp("families")

    def folder(family: str, **scheduler: Any) -> Path:
        path = parent / "_".join([family, *map(str, scheduler.values())])
        if not path.exists():
            made = checkpoints(family)
            write_checkpoint(path, dataclasses.replace(made, scheduler={**made.scheduler, **scheduler}))
        return path

    return folder


@pytest.fixture(scope="session")
def opened(folders):
    """opened(family, **scheduler): the pipeline of this library."""
    return functools.cache(lambda family, **scheduler: sdjax.load(folders(family, **scheduler)))


@pytest.fixture(scope="session")
def nets(tmp_path_factory):
    """nets(family, seed, **changes): the folder of a ControlNet with random weights."""
    parent = tmp_path_factory.mktemp("controlnets")

    @functools.cache
    def made(family: str, seed: int = 0, **changes: Any) -> str:
        config = config_for(zoo.UNETS[family], zoo.FACTOR, **changes)
        folder = parent / "_".join([family, str(seed), *changes])
        write_component(folder, "controlnet", Component(config, drawn(controlnet.shapes(config), seed)))
        return str(folder)

    return made


@pytest.fixture(scope="session")
def adapters(tmp_path_factory):
    """adapters(name): an adapter of diffusers and its folder."""
    parent = tmp_path_factory.mktemp("t2i")

    @functools.cache
    def adapter(name: str):
        made = randomised(diffusers.T2IAdapter(**T2I_ADAPTERS[name]))
        made.save_pretrained(parent / name)
        return made, parent / name

    return adapter


@pytest.fixture(scope="session")
def in_diffusers(folders):
    """in_diffusers(kind, family, sampler class, **scheduler): diffusers' pipeline, whose networks are read once."""
    torch.set_num_threads(1)  # tiny networks gain nothing from more, and lose much where cores are shared

    @functools.cache
    def read(kind: str, folder: Path) -> Any:
        absent = dict.fromkeys(("depth_estimator", "feature_extractor") if "Depth" in kind else ())
        pipe = getattr(diffusers, kind).from_pretrained(folder, local_files_only=True, **absent)
        pipe.set_progress_bar_config(disable=True)
        return pipe, pipe.scheduler.config

    def call(kind: str, family: str, sampler: str | None = None, **scheduler: Any) -> Any:
        pipe, config = read(kind, folders(family, **scheduler))
        # SDXL's own config, Euler's, says nothing of DDIM's clipping, which latents do not bear.
        config = {**config, "clip_sample": False, "skip_prk_steps": True}
        pipe.scheduler = getattr(diffusers, sampler or config["_class_name"]).from_config(config)
        return pipe

    return call


@pytest.fixture(scope="session")
def in_torch(in_diffusers):
    """in_torch(kind, family, *nets, sampler class): diffusers' pipeline of `in_diffusers`' networks and ControlNets."""
    net = functools.cache(diffusers.ControlNetModel.from_pretrained)

    def call(kind: str, family: str, *nets: str, sampler: str) -> Any:
        base = in_diffusers(f"StableDiffusion{'XL' if family == 'sdxl' else ''}Pipeline", family, sampler)
        own = [net(name) for name in nets]
        pipe = getattr(diffusers, kind).from_pipe(base, controlnet=own if len(own) > 1 else own[0])
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return call


@pytest.fixture(scope="session")
def folder(folders) -> Path:
    return folders("sd1")


@pytest.fixture(scope="session")
def ours(opened):
    return opened("sd1")


@pytest.fixture
def theirs(in_diffusers):
    return in_diffusers("StableDiffusionPipeline", "sd1")


@pytest.fixture
def noise():
    """First noise of two images."""
    side = zoo.SIDE // 2
    return np.random.default_rng(3).standard_normal((zoo.BATCH, side, side, 4)).astype(np.float32)


@pytest.fixture
def picture():
    """Smooth, so that nothing is hidden by its encoding."""
    y, x = np.mgrid[0 : zoo.SIDE, 0 : zoo.SIDE] / zoo.SIDE
    return Image.fromarray((255 * np.stack([x, y, (x + y) / 2], -1)).astype(np.uint8))


@pytest.fixture
def mask():
    white = np.zeros((zoo.SIDE, zoo.SIDE), np.uint8)
    white[3:11, 5:14] = 255
    return Image.fromarray(white)


@pytest.fixture
def compilations():
    """A list that grows by the seconds of every program that XLA compiles, or takes from its cache."""
    compiled = []

    def listener(event: str, seconds: float, **kwargs: object) -> None:
        del kwargs
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listener)
    jax.jit(lambda x: x + 1)(0)
    assert compiled, "the listener hears nothing"
    compiled.clear()
    yield compiled
    jax.monitoring.unregister_event_duration_listener(listener)
