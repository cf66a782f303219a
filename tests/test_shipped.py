"""The model in the repository: PyTorch diffusers loads it and paints the same pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline

import sdjax

FOLDER = Path(__file__).parents[1] / "checkpoints" / "openmoji"
SCHEDULERS = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}
PROMPTS = ["red heart", "woman firefighter: medium skin tone"]


@pytest.fixture(scope="module")
def ours():
    return sdjax.load(FOLDER)


@pytest.fixture(scope="module")
def theirs():
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_diffusers_paints_the_same(ours, theirs, sampler):
    """From the same latents, images in [0, 1] agree to 1e-3."""
    theirs.scheduler = SCHEDULERS[sampler].from_config(ours.scheduler_config)
    latents = np.random.default_rng(0).standard_normal((2, 16, 16, 16)).astype(np.float32)
    expected = theirs(
        PROMPTS,
        num_inference_steps=10,
        guidance_scale=2.5,
        latents=torch.from_numpy(latents.transpose(0, 3, 1, 2)),
        output_type="np",
    ).images
    found = ours(PROMPTS, steps=10, guidance_scale=2.5, sampler=sampler, latents=latents)
    assert found.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0)


def test_it_is_at_most_40_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 40_000_000
