"""ControlNets in whole pipelines against PyTorch diffusers: |difference| of images below 1e-3."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import zoo
from PIL import Image
from test_against_diffusers import SAMPLERS, check, to_torch

import sdjax

PROMPTS, NEGATIVES = ["red heart", "a painting of a dog"], ["blue cat", "flag"]
STEPS = 5
HINT = Image.fromarray(np.random.default_rng(5).integers(0, 256, (zoo.SIDE, zoo.SIDE, 3)).astype(np.uint8))
SECOND = HINT.transpose(Image.Transpose.ROTATE_90)


@pytest.fixture(scope="session")
def controlled(folders):
    """controlled(family, *nets): the pipeline of this library."""
    return functools.cache(lambda family, *nets: sdjax.load(folders(family), controlnet=list(nets)))


@pytest.fixture(scope="session")
def in_torch(folders):
    """in_torch(kind, family, *nets, sampler): diffusers' pipeline."""
    torch.set_num_threads(1)

    @functools.cache
    def read(kind: str, family: str, *nets: str) -> Any:
        found = [diffusers.ControlNetModel.from_pretrained(net) for net in nets]
        own = found if len(found) > 1 else found[0]
        pipe = getattr(diffusers, kind).from_pretrained(folders(family), controlnet=own, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe, {**pipe.scheduler.config, "clip_sample": False, "skip_prk_steps": True}

    def call(kind: str, family: str, *nets: str, sampler: str) -> Any:
        pipe, config = read(kind, family, *nets)
        pipe.scheduler = getattr(diffusers, SAMPLERS[sampler]).from_config(config)
        return pipe

    return call


def expected(pipe: Any, noise: np.ndarray, image: Any, **settings: Any) -> np.ndarray:
    """diffusers' images of text and hints."""
    how = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "np", "latents": to_torch(noise)}
    images = [image] * 2 if isinstance(image, Image.Image) else [[one] * 2 for one in image]
    return pipe(PROMPTS, negative_prompt=NEGATIVES, image=images, **how, **settings).images


def found(pipe: Any, noise: np.ndarray, image: Any, **settings: Any) -> np.ndarray:
    how = {"steps": STEPS, "guidance_scale": 4.0, "latents": noise, "control_image": image}
    return pipe(PROMPTS, NEGATIVES, **how, **settings)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_text_to_image(family, controlled, in_torch, nets, noise):
    kind = f"StableDiffusion{'XL' if family == 'sdxl' else ''}ControlNetPipeline"
    theirs = in_torch(kind, family, nets(family), sampler="euler")
    check(
        found(controlled(family, nets(family)), noise, HINT, sampler="euler", control_scale=0.8),
        expected(theirs, noise, HINT, controlnet_conditioning_scale=0.8),
    )


# Of diffusers' settings and ours.
WAYS = {
    "start and end": (
        {"control_guidance_start": 0.2, "control_guidance_end": 0.6},
        {"control_start": 0.2, "control_end": 0.6},
    ),
    "guess": ({"guess_mode": True}, {"control_mode": "guess"}),
    "guess without guidance": ({"guess_mode": True, "guidance_scale": 1.0},) * 2,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sampler", ["ddim"])
def test_ways_to_control(way, sampler, controlled, in_torch, nets, noise):
    theirs, ours = WAYS[way]
    pipe = in_torch("StableDiffusionControlNetPipeline", "sd1", nets("sd1"), sampler=sampler)
    images = pipe(
        PROMPTS,
        negative_prompt=NEGATIVES,
        image=[HINT] * 2,
        num_inference_steps=STEPS,
        output_type="np",
        latents=to_torch(noise),
        **{"guidance_scale": 4.0, **theirs},
    ).images
    how = {"guidance_scale": 4.0, **ours}
    check(
        controlled("sd1", nets("sd1"))(
            PROMPTS, NEGATIVES, steps=STEPS, latents=noise, control_image=HINT, sampler=sampler, **how
        ),
        images,
    )


def test_a_strength_of_zero_is_the_base_to_the_bit(opened, controlled, nets, noise):
    base = opened("sd1")(PROMPTS, NEGATIVES, steps=STEPS, guidance_scale=4.0, latents=noise, sampler="ddim")
    pipe = controlled("sd1", nets("sd1"))
    np.testing.assert_array_equal(found(pipe, noise, HINT, sampler="ddim", control_scale=0.0), base)
    np.testing.assert_array_equal(found(pipe, noise, HINT, sampler="ddim", control_start=0.9, control_end=0.95), base)
    assert np.abs(found(pipe, noise, HINT, sampler="ddim", control_scale=0.1) - base).max() > 0.05
