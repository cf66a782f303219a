"""A server for clients of A1111's API: tiny models with random weights behind the whole application."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from typing import Any, NamedTuple

import numpy as np
import pytest
import requests
import uvicorn
import zoo
from PIL import Image
from tiny_checkpoints import random_params, tiny_checkpoint

import sdjax
from sdjax.checkpoints.checkpoint import Component
from sdjax.checkpoints.layouts.diffusers import write_checkpoint, write_component
from sdjax.checkpoints.networks import controlnet
from sdjax.models.controlnet import config_for
from sdjax.serve.app import make_app
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
    """Four models: one, the same under another name, one with a ControlNet, and one that enlarges."""
    parent = tmp_path_factory.mktemp("a1111")
    config = config_for(zoo.UNETS["sd1"], zoo.FACTOR)
    net = Component(config, random_params(controlnet.shapes(config), 0))
    write_component(parent / NET, "controlnet", net)
    words = len(json.loads((folder / "tokenizer" / "vocab.json").read_text()))
    write_checkpoint(parent / "x4", tiny_checkpoint("x4_upscaler", folder / "tokenizer", words))
    loads = {
        "tiny.safetensors": lambda: sdjax.load(folder),
        "other": lambda: sdjax.load(folder),
        "controlled": lambda: sdjax.load(folder, controlnet=[parent / NET]),
        "x4": lambda: sdjax.load(parent / "x4"),
    }
    models = Models({name.split(".")[0]: f"/srv/models/{name}" for name in loads}, lambda s: loads[s.split("/")[-1]]())
    engine = Engine(models, EngineOptions(batch_sizes=(1,)))
    engine.start([]).result(60.0)
    server = uvicorn.Server(uvicorn.Config(make_app(engine), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield Server(engine, server.servers[0].sockets[0].getsockname()[1])
    server.should_exit = True
    thread.join(60.0)
    engine.stop(60.0)


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
