"""Loading streams: beside the weights themselves hardly more than one tensor is in memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from published import SDXL_UNET

from sdjax.checkpoints.mapping import read, stored_shapes
from sdjax.checkpoints.networks import unet
from sdjax.checkpoints.storage.safetensors import write_safetensors

SCRIPT = Path(__file__).with_name("peak_memory.py")
NOISE = np.random.default_rng(0).standard_normal(1_000_003).astype(np.float16)


@dataclass(frozen=True)
class Noise:
    """A tensor that comes into being when it is written."""

    shape: tuple[int, ...]
    dtype: np.dtype = NOISE.dtype

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        return np.resize(NOISE, self.shape)


@pytest.fixture
def sdxl(tmp_path: Path) -> Iterator[Path]:
    config = unet.from_diffusers_config(SDXL_UNET)
    tensors = {key: Noise(shape) for key, shape in stored_shapes(unet.table(config), unet.shapes(config)).items()}
    folder = tmp_path / "unet"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SDXL_UNET))
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors, np.float16)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
def test_peak_memory_of_loading_full_sdxl_unet(sdxl: Path):
    for dtype in ("float16", "bfloat16"):
        command = [sys.executable, str(SCRIPT), str(sdxl), dtype]
        environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        size, grown = map(int, done.stdout.split())
        assert size == 2 * 2_567_463_684
        # A system that reclaims pages early shows a peak a little below what was loaded.
        assert 0.9 * size < grown < 1.3 * size, f"{dtype}: {grown / size:.3f} times the weights"


class Counted:
    """A stored tensor that says when it is read."""

    def __init__(self, shape: tuple[int, ...], log: list[str], name: str) -> None:
        self.shape, self.log, self.name = shape, log, name

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        self.log.append(f"read {self.name}")
        return np.ones(self.shape, np.float32)


def test_each_tensor_is_placed_before_the_next_is_read():
    config = unet.from_diffusers_config(SDXL_UNET | {"block_out_channels": [32, 32, 32], "attention_head_dim": 1})
    table, shapes, log = unet.table(config), unet.shapes(config), []
    tensors = {key: Counted(shape, log, key) for key, shape in stored_shapes(table, shapes).items()}
    read(table, tensors, shapes, np.float16, "", lambda array, name: log.append("placed"))
    assert [entry.split()[0] for entry in log] == ["read", "placed"] * len(tensors)
