"""The model in the repository: PyTorch diffusers loads it and makes the same images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

import sdjax

FOLDER = Path(__file__).parents[1] / "checkpoints" / "openmoji"
PROMPTS = ["red heart", "woman firefighter: medium skin tone"]


def test_diffusers_makes_the_same_images():
    """By the scheduler that the folder names, from the same latents; images in [0, 1] agree to 1e-3."""
    torch.set_num_threads(1)
    theirs = StableDiffusionPipeline.from_pretrained(FOLDER)
    theirs.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(0).standard_normal((2, 16, 16, 16)).astype(np.float32)
    expected = theirs(
        PROMPTS,
        num_inference_steps=10,
        guidance_scale=2.5,
        latents=torch.from_numpy(latents.transpose(0, 3, 1, 2)),
        output_type="np",
    ).images
    found = sdjax.load(FOLDER)(PROMPTS, steps=10, guidance_scale=2.5, latents=latents)
    assert found.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0)


def test_it_is_at_most_40_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 40_000_000
