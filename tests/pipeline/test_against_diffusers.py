"""Whole pipelines against PyTorch diffusers from the same weights and noise: |difference| of images below 1e-3.

One model goes through every kind of sampler and every way to call it; test_families.py has the other models. All tables
are proved one by one in tests/diffusion.
"""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
import zoo
from PIL import Image

import sdjax

TOLERANCE = 1e-3
SIZE = zoo.SIDE
SAMPLERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "plms": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
PROMPTS = ["red heart", "a painting of a dog"]
NEGATIVES = ["blue cat", "flag"]
SIDES = {"width": SIZE, "height": SIZE}


def check(ours, theirs):
    assert theirs.std() > 0.02, "the images show nothing"
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


def to_torch(noise: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_text_to_image(sampler, in_diffusers, ours):
    """With the noise of a torch generator, that of every step of an ancestral sampler included.

    Of a seed of 64 bits PyTorch's generator reads 32.
    """
    seed = 2**40 + 7
    theirs = in_diffusers("StableDiffusionPipeline", "sd1", SAMPLERS[sampler])
    settings = {"guidance_scale": 5.0, "guidance_rescale": 0.7}
    generator = torch.Generator().manual_seed(seed)
    expected = theirs(
        PROMPTS, negative_prompt=NEGATIVES, num_inference_steps=7, generator=generator, output_type="np", **settings
    ).images
    check(ours(PROMPTS, NEGATIVES, steps=7, sampler=sampler, seed=seed, rng="torch", **settings), expected)


def test_defaults_are_the_checkpoints_own(theirs, ours):
    (row,) = ours.prepare("")
    chosen = {name: row.settings[name] for name in ("steps", "guidance_scale", "sampler", "width", "height")}
    side = theirs.unet.config.sample_size * theirs.vae_scale_factor
    assert chosen == {"steps": 50, "guidance_scale": 7.5, "sampler": "ddim", "width": side, "height": side}
    theirs.scheduler.set_timesteps(50)
    np.testing.assert_array_equal(row.parts[0].table.timestep[:50], theirs.scheduler.timesteps)


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_scale_of_one_or_less_is_no_guidance(scale, theirs, ours, noise):
    settings = {"guidance_scale": scale}
    expected = theirs(PROMPTS, num_inference_steps=3, latents=to_torch(noise), output_type="np", **settings).images
    check(ours(PROMPTS, steps=3, latents=noise, **settings), expected)


@pytest.mark.parametrize(("strength", "count"), [(0.45, 2), (1.0, 1)])
def test_image_to_image(strength, count, in_diffusers, ours, picture):
    """From one image for both prompts, which is drawn from its posterior once, or one for each."""
    pictures = [picture, picture.transpose(Image.Transpose.ROTATE_90)][:count]
    pipe = in_diffusers("StableDiffusionImg2ImgPipeline", "sd1", SAMPLERS["dpmpp_2m"])
    settings = {"guidance_scale": 4.0, "strength": strength}
    generator = torch.Generator().manual_seed(7)
    expected = pipe(
        PROMPTS,
        pictures,
        negative_prompt=NEGATIVES,
        num_inference_steps=10,
        generator=generator,
        output_type="np",
        **settings,
    ).images
    how = {"sampler": "dpmpp_2m", "seed": 7, "rng": "torch", "init_image": pictures}
    check(ours(PROMPTS, NEGATIVES, steps=10, **how, **settings), expected)


def test_given_images_are_drawn_from_their_posterior(theirs, ours, picture):
    """By the images' own keys; where nothing is made anew, the latents are those of the given image."""
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1.0
    with torch.no_grad():
        posterior = theirs.vae.encode(x).latent_dist
    given = {"init_image": picture, "mask": np.zeros((SIZE, SIZE)), "steps": 2, "output": "latent", "batch_size": 2}
    known = ours("", num_images=16, **given)
    mean, std = (moment.numpy().transpose(0, 2, 3, 1) for moment in (posterior.mean, posterior.std))
    assert std.min() > 0.1, "the posterior is narrow"
    noise = (known - mean) / std
    assert abs(noise.mean()) < 0.06  # of 4,096 values; 4 standard errors
    assert abs(noise.std() - 1.0) < 0.05
    assert np.abs(np.corrcoef(noise.reshape(16, -1)) - np.eye(16)).max() < 0.3
    np.testing.assert_allclose(ours("", first_index=5, **given)[0], known[5], atol=1e-4)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting(strength, in_diffusers, ours, picture, mask):
    pipe = in_diffusers("StableDiffusionInpaintPipeline", "sd1", SAMPLERS["euler"])
    settings = {"guidance_scale": 4.0, "strength": strength}
    expected = pipe(
        PROMPTS,
        image=picture,
        mask_image=mask,
        negative_prompt=NEGATIVES,
        num_inference_steps=10,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
        **SIDES,
        **settings,
    ).images
    how = {"sampler": "euler", "seed": 7, "rng": "torch", "init_image": picture, "mask": mask, "paste": False}
    check(ours(PROMPTS, NEGATIVES, steps=10, **how, **settings), expected)


def test_unscaled_latents(theirs, ours, noise):
    expected = theirs(PROMPTS, num_inference_steps=3, latents=to_torch(noise), output_type="latent").images
    expected = (expected / theirs.vae.config.scaling_factor).numpy().transpose(0, 2, 3, 1)
    result = ours(PROMPTS, steps=3, latents=noise, output="latent")
    np.testing.assert_allclose(result, expected, atol=1e-4 * np.abs(expected).max())


def test_diffusers_loads_what_is_saved(ours, noise, tmp_path):
    ours.save(tmp_path / "copy")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "copy", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(PROMPTS, num_inference_steps=3, latents=to_torch(noise), output_type="np").images
    found = ours(PROMPTS, steps=3, latents=noise)
    check(found, expected)
    np.testing.assert_array_equal(sdjax.load(tmp_path / "copy")(PROMPTS, steps=3, latents=noise), found)
