from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_diffusers import make_pipeline

import sdjax


@pytest.fixture(scope="session")
def theirs(tmp_path_factory):
    """diffusers' own pipeline, from its folder as everybody has it; that is `theirs.folder`."""
    torch.set_num_threads(1)  # tiny networks gain nothing from more, and lose much where cores are shared
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    make_pipeline(tmp_path_factory.mktemp("made")).save_pretrained(folder)
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.folder = folder
    return pipe


@pytest.fixture(scope="session")
def ours(theirs):
    return sdjax.load(theirs.folder)
