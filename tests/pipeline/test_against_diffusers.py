"""Whole pipelines against PyTorch diffusers from the same weights and noise: |difference| of images below 1e-3."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from tiny_diffusers import LATENT, SIZE

import sdjax

TOLERANCE = 1e-3
SAMPLERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "plms": diffusers.PNDMScheduler,
}
PROMPTS = ["red heart", "a painting of a dog"]
NEGATIVES = ["blue cat", "flag"]


@pytest.fixture(params=SAMPLERS)
def sampler(request, theirs):
    """Also gives it to diffusers, as its users do."""
    extra = {"skip_prk_steps": True} if request.param == "plms" else {}
    config = {**theirs.scheduler.config, **extra}
    kept, theirs.scheduler = theirs.scheduler, SAMPLERS[request.param].from_config(config)
    yield request.param
    theirs.scheduler = kept


@pytest.fixture
def noise():
    return np.random.default_rng(3).standard_normal((2, LATENT, LATENT, 4)).astype(np.float32)


@pytest.fixture
def same_noise(monkeypatch, noise):
    """diffusers' img2img and inpainting draw the noise and a sample of the posterior themselves."""
    for name in ("img2img", "inpaint"):
        module = f"diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_{name}"
        monkeypatch.setattr(f"{module}.randn_tensor", lambda *a, **k: torch.from_numpy(noise.transpose(0, 3, 1, 2)))
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


@pytest.fixture
def picture():
    """Smooth, so that nothing is hidden by its encoding."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    return Image.fromarray((255 * np.stack([x, y, (x + y) / 2], -1)).astype(np.uint8))


@pytest.fixture
def mask():
    white = np.zeros((SIZE, SIZE), np.uint8)
    white[5:20, 9:27] = 255
    return Image.fromarray(white)


def check(ours, theirs):
    assert theirs.std() > 0.02, "the pictures show nothing"
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


def sibling(theirs, cls):
    pipe = cls(**theirs.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_text_to_image(sampler, rescale, theirs, ours, noise):
    settings = {"negative_prompt": NEGATIVES, "guidance_scale": 5.0, "guidance_rescale": rescale}
    expected = theirs(
        PROMPTS,
        num_inference_steps=8,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2)),
        output_type="np",
        **settings,
    ).images
    check(ours(PROMPTS, steps=8, sampler=sampler, latents=noise, **settings), expected)


def test_what_the_checkpoint_says_is_the_default(theirs, ours):
    chosen = ours.settings()
    assert (chosen.steps, chosen.guidance_scale, chosen.sampler) == (50, 7.5, "ddim")
    assert chosen.width == chosen.height == theirs.unet.config.sample_size * theirs.vae_scale_factor
    theirs.scheduler.set_timesteps(50)
    called = chosen.table(ours.scheduler_config).timestep[:50]
    np.testing.assert_array_equal(called, theirs.scheduler.timesteps)


def test_scale_of_one_or_less_is_no_guidance(theirs, ours, noise):
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2))
    for scale in (1.0, 0.0):
        expected = theirs(
            PROMPTS, num_inference_steps=3, latents=latents, guidance_scale=scale, output_type="np"
        ).images
        check(ours(PROMPTS, steps=3, latents=noise, guidance_scale=scale), expected)


@pytest.mark.parametrize("strength", [0.45, 1.0])
def test_image_to_image(sampler, strength, theirs, ours, noise, picture, same_noise):
    pipe = sibling(theirs, diffusers.StableDiffusionImg2ImgPipeline)
    settings = {"negative_prompt": NEGATIVES, "guidance_scale": 4.0, "strength": strength}
    expected = pipe(PROMPTS, image=picture, num_inference_steps=10, output_type="np", **settings).images
    check(ours(PROMPTS, steps=10, sampler=sampler, latents=noise, init_image=picture, **settings), expected)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting(sampler, strength, theirs, ours, noise, picture, mask, same_noise):
    pipe = sibling(theirs, diffusers.StableDiffusionInpaintPipeline)
    settings = {"negative_prompt": NEGATIVES, "guidance_scale": 4.0, "strength": strength}
    expected = pipe(
        PROMPTS,
        image=picture,
        mask_image=mask,
        height=SIZE,
        width=SIZE,
        num_inference_steps=10,
        output_type="np",
        **settings,
    ).images
    result = ours(
        PROMPTS, steps=10, sampler=sampler, latents=noise, init_image=picture, mask=mask, paste=False, **settings
    )
    check(result, expected)


def test_unscaled_latents(theirs, ours, noise):
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2))
    expected = theirs(PROMPTS, num_inference_steps=3, latents=latents, output_type="latent").images
    expected = (expected / theirs.vae.config.scaling_factor).numpy().transpose(0, 2, 3, 1)
    result = ours(PROMPTS, steps=3, latents=noise, output="latent")
    np.testing.assert_allclose(result, expected, atol=1e-4 * np.abs(expected).max())


def test_diffusers_loads_what_is_saved(ours, noise, tmp_path):
    ours.save(tmp_path / "copy")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "copy", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2))
    expected = pipe(PROMPTS, num_inference_steps=3, latents=latents, output_type="np").images
    check(ours(PROMPTS, steps=3, latents=noise), expected)
    np.testing.assert_array_equal(
        sdjax.load(tmp_path / "copy")(PROMPTS, steps=3, seed=4), ours(PROMPTS, steps=3, seed=4)
    )
