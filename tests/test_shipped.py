"""The model in the repository: PyTorch diffusers loads it and makes the same images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline

import sdjax
from sdjax.data.sources.openmoji_parts import lines
from sdjax.eval.edges import edge_agreement

FOLDER = Path(__file__).parents[1] / "checkpoints" / "openmoji"
LINEART = FOLDER.with_name("openmoji_lineart")
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


def test_diffusers_makes_the_same_images_of_a_line_drawing():
    """With the ControlNet of line drawings, whose hint is what the card's command makes of black lines."""
    torch.set_num_threads(1)
    net = ControlNetModel.from_pretrained(LINEART)
    theirs = StableDiffusionControlNetPipeline.from_pretrained(FOLDER, controlnet=net)
    theirs.set_progress_bar_config(disable=True)
    drawing = 255 - lines("1F408")
    hint = torch.from_numpy(lines("1F408").transpose(2, 0, 1)[None] / np.float32(255.0))
    latents = np.random.default_rng(0).standard_normal((1, 16, 16, 16)).astype(np.float32)
    how = {"num_inference_steps": 10, "guidance_scale": 2.5, "output_type": "np"}
    expected = theirs("", image=hint, latents=torch.from_numpy(latents.transpose(0, 3, 1, 2)), **how).images
    pipe = sdjax.load(FOLDER, controlnet=[LINEART])
    options = {"control_image": drawing, "control_from": "invert", "steps": 10, "guidance_scale": 2.5}
    found = pipe("", latents=latents, **options)
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0)
    f1 = edge_agreement(found[0], lines("1F408") / np.float32(255.0)).f1
    without = edge_agreement(pipe("", latents=latents, control_scale=0.0, **options)[0], lines("1F408") / 255.0).f1
    assert f1 > 0.7
    assert f1 > without + 0.25


def test_the_lineart_controlnet_is_at_most_16_megabytes():
    assert sum(path.stat().st_size for path in LINEART.rglob("*") if path.is_file()) <= 16_000_000
