from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from every_model import KINDS, write_files
from PIL import Image
from tiny_checkpoints import tiny_checkpoint, write_tokenizer

from sdjax.checkpoints.layouts.diffusers import write_checkpoint

SIZES = ((48, 48), (40, 80), (96, 48))  # height, width


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Twenty-four captioned images of noise, a third of them square, a third wide, a third tall."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(24):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        coarse.resize(SIZES[i % 3][::-1], Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"an image of the number {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """bases(family): a folder of tiny networks."""
    root = tmp_path_factory.mktemp("bases")
    size = write_tokenizer(root / "tokenizer")

    def folder(family: str) -> Path:
        if not (root / family).exists():
            write_checkpoint(root / family, tiny_checkpoint(family, root / "tokenizer", size))
        return root / family

    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """folders(kind): a tiny checkpoint of that kind."""
    root = tmp_path_factory.mktemp("kinds")
    files = write_files(root / "files")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            KINDS[name].make(root / name, files)
        return root / name

    return folder


@pytest.fixture(scope="session")
def few(tmp_path_factory) -> Path:
    """Three images without captions."""
    folder, rng = tmp_path_factory.mktemp("few"), np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{i}.png")
    return folder
