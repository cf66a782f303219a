"""A server for clients of A1111's API: tiny models with random weights behind the whole application."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import requests
import zoo
from listening import listening
from PIL import Image
from safetensors.numpy import save_file
from tiny_checkpoints import random_params, tiny_checkpoint

import sdjax
from sdjax.checkpoints.checkpoint import Component
from sdjax.checkpoints.layouts.diffusers import write_checkpoint, write_component
from sdjax.checkpoints.networks import controlnet
from sdjax.models.controlnet import config_for
from sdjax.serve.engine import Engine
from sdjax.serve.models import Models
from sdjax.serve.worker import EngineOptions

SIDE = 32
PROMPT = "red heart"
NET = "tiny_canny"


class Server(NamedTuple):
    """A server, the engine behind it, and the port that it listens at."""

    engine: Engine
    port: int

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path.lstrip('/')}"

    def get(self, path: str, **query: Any) -> Any:
        answer = requests.get(self.url(f"sdapi/v1/{path}"), params=query, timeout=120)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, status: int = 200, **fields: Any) -> Any:
        answer = requests.post(self.url(f"sdapi/v1/{path}"), json=fields, timeout=300)
        assert answer.status_code == status, answer.text
        return answer.json()

    def pipe(self, name: str = "tiny") -> sdjax.Pipeline:
        pipe = self.engine.models.all[name].pipe
        assert pipe is not None
        return pipe


@pytest.fixture(scope="session")
def a1111(folder, tmp_path_factory):
    """Five models: one, and the same under another name, with a ControlNet, with a LoRA and a word; one enlarges."""
    parent = tmp_path_factory.mktemp("a1111")
    config = config_for(zoo.UNETS["sd1"], zoo.FACTOR)
    net = Component(config, random_params(controlnet.shapes(config), 0))
    write_component(parent / NET, "controlnet", net)
    write_style(parent / "loras")
    save_file({"sparkle": np.full((1, 64), 0.1, np.float32)}, parent / "sparkle.safetensors")
    words = len(json.loads((folder / "tokenizer" / "vocab.json").read_text()))
    write_checkpoint(parent / "x4", tiny_checkpoint("x4_upscaler", folder / "tokenizer", words))
    loads = {
        "tiny.safetensors": lambda: sdjax.load(folder),
        "other": lambda: sdjax.load(folder),
        "controlled": lambda: sdjax.load(folder, controlnet=[parent / NET]),
        "styled": lambda: sdjax.load(folder, lora_dir=parent / "loras", embeddings=[parent / "sparkle.safetensors"]),
        "x4": lambda: sdjax.load(parent / "x4"),
    }
    models = Models({name.split(".")[0]: f"/srv/models/{name}" for name in loads}, lambda s: loads[s.split("/")[-1]]())
    engine = Engine(models, EngineOptions(batch_sizes=(1,)))
    engine.start([]).result(60.0)
    with listening(engine) as address:
        yield Server(engine, int(address.rsplit(":")[-1]))
    engine.stop(60.0)


def write_style(folder: Path) -> None:
    """A LoRA of one layer, in kohya's naming."""
    stem, draw = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_v", np.random.default_rng(0)
    shapes = {"lora_down": (4, 64), "lora_up": (64, 4)}
    tensors = {f"{stem}.{name}.weight": draw.standard_normal(size, np.float32) for name, size in shapes.items()}
    folder.mkdir()
    save_file(tensors, folder / "style.safetensors")


def picture(seed: int = 0, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """Smooth colours, of this width and height."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def box_mask(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """White within a box."""
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def in_base64(image: Image.Image, format: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, format=format)
    return base64.b64encode(file.getvalue()).decode()


def image_of(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def pixels(image: Image.Image | str) -> np.ndarray:
    """Values of an image, which may be in base64, for differences."""
    return np.asarray(image_of(image) if isinstance(image, str) else image, np.int32)
