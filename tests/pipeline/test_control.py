"""ControlNets in whole pipelines against PyTorch diffusers: |difference| of images below 1e-3."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import zoo
from PIL import Image
from test_against_diffusers import SIDES, check, to_torch

import sdjax
from sdjax.checkpoints.controlnets import add_controlnets, read_controlnet
from sdjax.checkpoints.layouts.diffusers import write_checkpoint
from sdjax.checkpoints.open import read_checkpoint
from sdjax.core.errors import UserError

PROMPTS, NEGATIVES = ["red heart", "a painting of a dog"], ["blue cat", "flag"]
STEPS = 5
HINT = Image.fromarray(np.random.default_rng(5).integers(0, 256, (zoo.SIDE, zoo.SIDE, 3)).astype(np.uint8))
SECOND = HINT.transpose(Image.Transpose.ROTATE_90)


@pytest.fixture(scope="session")
def controlled(folders):
    """controlled(family, *nets): the pipeline of this library."""
    return functools.cache(lambda family, *nets: sdjax.load(folders(family), controlnet=list(nets)))


def expected(pipe: Any, noise: np.ndarray, image: Any, **settings: Any) -> np.ndarray:
    """diffusers' images of text and hints."""
    settings = {"guidance_scale": 4.0, **settings}
    how = {"num_inference_steps": STEPS, "output_type": "np", "latents": to_torch(noise)}
    return pipe(PROMPTS, negative_prompt=NEGATIVES, image=[image] * 2, **how, **settings).images


def found(pipe: Any, noise: np.ndarray, image: Any, **settings: Any) -> np.ndarray:
    """This library's, of the same."""
    how = {"steps": STEPS, "guidance_scale": 4.0, "latents": noise, "control_image": image}
    return pipe(PROMPTS, NEGATIVES, **how | settings)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_text_to_image(family, controlled, in_torch, nets, noise):
    kind = f"StableDiffusion{'XL' if family == 'sdxl' else ''}ControlNetPipeline"
    theirs = in_torch(kind, family, nets(family), sampler="EulerDiscreteScheduler")
    check(
        found(controlled(family, nets(family)), noise, HINT, sampler="euler", control_scale=0.8),
        expected(theirs, noise, HINT, controlnet_conditioning_scale=0.8),
    )


def test_a_folder_with_controlnets_is_a_base_with_them(controlled, in_torch, nets, tmp_path):
    """As diffusers saves a pipeline of several; those that are given by name take their place."""
    both, whole = (nets("sd1"), nets("sd1", 1)), tmp_path / "whole"
    in_torch("StableDiffusionControlNetPipeline", "sd1", *both, sampler="DDIMScheduler").save_pretrained(whole)
    jax.tree.map(np.testing.assert_array_equal, sdjax.load(whole).params, controlled("sd1", *both).params)
    other = sdjax.load(whole, controlnet=[both[1]]).params
    jax.tree.map(np.testing.assert_array_equal, other, controlled("sd1", both[1]).params)
    write_checkpoint(tmp_path / "base", read_checkpoint(whole))
    assert json.loads((tmp_path / "base/model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    shutil.rmtree(whole / "controlnet_1")
    with pytest.raises(UserError, match=r"model_index\.json lists controlnet, but there is no .*controlnet_1$"):
        sdjax.load(whole)


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
def test_ways_to_control(way, controlled, in_torch, nets, noise):
    theirs, ours = WAYS[way]
    pipe = in_torch("StableDiffusionControlNetPipeline", "sd1", nets("sd1"), sampler="DDIMScheduler")
    check(
        found(controlled("sd1", nets("sd1")), noise, HINT, sampler="ddim", **ours),
        expected(pipe, noise, HINT, **theirs),
    )


@pytest.mark.parametrize("way", ["scales", "bounds, and a guess"])
def test_two_at_once(way, controlled, in_torch, nets, noise):
    theirs, ours = {
        "scales": ({"controlnet_conditioning_scale": [0.5, 1.2]}, {"control_scale": [0.5, 1.2]}),
        "bounds, and a guess": (
            {"control_guidance_start": [0.0, 0.3], "control_guidance_end": [0.7, 1.0], "guess_mode": True},
            {"control_start": [0.0, 0.3], "control_end": [0.7, 1.0], "control_mode": "guess"},
        ),
    }[way]
    pair = nets("sd1"), nets("sd1", 1)
    pipe = in_torch("StableDiffusionControlNetPipeline", "sd1", *pair, sampler="DDIMScheduler")
    check(
        found(controlled("sd1", *pair), noise, [HINT, SECOND], sampler="ddim", **ours),
        expected(pipe, noise, [HINT, SECOND], **theirs),
    )


def test_averaged_residuals_are_a_guess(controlled, in_torch, nets, noise):
    net = nets("sd1", global_pool=True)
    pipe = in_torch("StableDiffusionControlNetPipeline", "sd1", net, sampler="DDIMScheduler")
    check(
        found(controlled("sd1", net), noise, HINT, sampler="ddim", control_scale=0.7),
        expected(pipe, noise, HINT, controlnet_conditioning_scale=0.7),
    )


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_image_to_image(family, controlled, in_torch, nets, picture):
    xl = "XL" if family == "sdxl" else ""
    pipe = in_torch(f"StableDiffusion{xl}ControlNetImg2ImgPipeline", family, nets(family), sampler="DDIMScheduler")
    settings = {"guidance_scale": 4.0, "strength": 0.6}
    images = pipe(
        PROMPTS,
        image=[picture] * 2,
        control_image=[HINT] * 2,
        negative_prompt=NEGATIVES,
        num_inference_steps=10,
        controlnet_conditioning_scale=0.8,
        control_guidance_end=0.5,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
        **settings,
    ).images
    how = {"sampler": "ddim", "seed": 7, "rng": "torch", "init_image": [picture] * 2, "steps": 10}
    control = {"control_image": HINT, "control_scale": 0.8, "control_end": 0.5}
    check(controlled(family, nets(family))(PROMPTS, NEGATIVES, **how, **control, **settings), images)


@pytest.mark.parametrize("family", ["sd1", "sd1_inpainting", "sdxl"])
def test_inpainting(family, controlled, in_torch, nets, picture, mask):
    """With latents held to the image, or nine channels, of which the ControlNet sees the first four; and with its hint
    of the image, -1 where it is made anew."""
    xl = "XL" if family == "sdxl" else ""
    pipe = in_torch(f"StableDiffusion{xl}ControlNetInpaintPipeline", family, nets(family), sampler="DDIMScheduler")
    settings = {"guidance_scale": 4.0, "strength": 0.8}
    hole = np.asarray(mask, np.float32)[..., None] > 127
    hint = np.where(hole, np.float32(-1.0), np.asarray(picture, np.float32) / np.float32(255.0))
    images = pipe(
        PROMPTS,
        image=picture,
        mask_image=mask,
        control_image=torch.from_numpy(hint.transpose(2, 0, 1)[None].repeat(2, 0)),
        negative_prompt=NEGATIVES,
        num_inference_steps=10,
        controlnet_conditioning_scale=0.5,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
        **SIDES,
        **settings,
    ).images
    how = {"sampler": "ddim", "seed": 7, "rng": "torch", "init_image": picture, "mask": mask, "paste": False}
    control = {"control_image": picture, "control_from": "inpaint", "control_scale": 0.5}
    check(controlled(family, nets(family))(PROMPTS, NEGATIVES, steps=10, **how, **control, **settings), images)


def test_controlnets_have_the_names_of_their_files(controlled, nets, tmp_path):
    two = [nets("sd1"), nets("sd1", 1)]
    assert controlled("sd1", *two).controlnets == ("sd1_0", "sd1_1")
    net = tmp_path / "control.v11.safetensors"
    net.symlink_to(Path(two[0]) / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").symlink_to(Path(two[0]) / "config.json")
    component = read_controlnet(net)
    checkpoint = controlled("sd1", *two).checkpoint
    added = add_controlnets([(str(net), component), ("lllyasviel/sd-controlnet-canny", component)])(checkpoint)
    assert added.controlnets == ("control.v11", "sd-controlnet-canny")


def test_a_strength_of_zero_is_the_base_to_the_bit(opened, controlled, nets, noise):
    base = opened("sd1")(PROMPTS, NEGATIVES, steps=STEPS, guidance_scale=4.0, latents=noise, sampler="ddim")
    pipe = controlled("sd1", nets("sd1"))
    np.testing.assert_array_equal(found(pipe, noise, HINT, sampler="ddim", control_scale=0.0), base)
    np.testing.assert_array_equal(found(pipe, noise, HINT, sampler="ddim", control_start=0.9, control_end=0.95), base)
    assert np.abs(found(pipe, noise, HINT, sampler="ddim", control_scale=0.1) - base).max() > 0.05


def test_a_refiner_takes_over_from_a_controlled_base(folders, nets, in_torch, in_diffusers):
    """Shares of the steps are of all, as diffusers counts them before it cuts those of the base."""
    common = {"negative_prompt": NEGATIVES, "guidance_scale": 4.0, "num_inference_steps": 10}
    common["generator"] = torch.Generator().manual_seed(3)
    base = in_torch("StableDiffusionXLControlNetPipeline", "sdxl", nets("sdxl"), sampler="EulerDiscreteScheduler")
    theirs = in_diffusers("StableDiffusionXLImg2ImgPipeline", "sdxl_refiner", "EulerDiscreteScheduler")
    how = {"denoising_end": 0.6, "control_guidance_end": 0.5, "output_type": "latent"}
    latents = base(PROMPTS, image=[HINT] * 2, **how, **common).images
    sizes = {"original_size": (zoo.SIDE,) * 2, "target_size": (zoo.SIDE,) * 2}
    images = theirs(PROMPTS, image=latents, denoising_start=0.6, output_type="np", **sizes, **common).images
    pipe = sdjax.load(folders("sdxl"), refiner=folders("sdxl_refiner"), controlnet=nets("sdxl"))
    how = {"steps": 10, "sampler": "euler", "seed": 3, "rng": "torch", "refiner_start": 0.6, "control_end": 0.5}
    check(pipe(PROMPTS, NEGATIVES, guidance_scale=4.0, control_image=HINT, **how), images)


def test_settings_compile_nothing(controlled, nets, noise, compilations):
    pipe = controlled("sd1", nets("sd1"))
    found(pipe, noise, HINT)
    compilations.clear()
    for mode in ("balanced", "prompt", "control", "guess", "resolution"):
        found(pipe, noise, SECOND, control_mode=mode, control_scale=0.3, control_start=0.1, control_end=0.7)
    assert not compilations


def test_every_prompt_may_have_its_own_hints(controlled, nets):
    """A list of lists is one list a prompt, and one image serves all; the size is the hint's, cut to latents."""
    pipe = controlled("sd1", nets("sd1"))
    odd = HINT.resize((zoo.SIDE + 1, zoo.SIDE))
    own, shared = (pipe.prepare(PROMPTS, control_image=hints, steps=2) for hints in ([[HINT], [odd]], HINT))
    assert {row.size for row in (*own, *shared)} == {(zoo.SIDE, zoo.SIDE)}
    hints = [row.parts[0].columns["control_image"] for row in (*own, *shared)]
    np.testing.assert_array_equal(hints[0], np.asarray(HINT, np.float32) / np.float32(255.0))
    np.testing.assert_array_equal(hints[0], hints[3])
    assert np.abs(hints[1] - hints[0]).max() > 0.1
    (row,) = pipe.prepare("flag", control_image=HINT, steps=4, hires=2)
    assert row.second.parts[0].columns["control_image"].shape == (2 * zoo.SIDE, 2 * zoo.SIDE, 3)


@pytest.mark.slow
def test_composed_prompts_are_all_controlled(controlled, nets, noise):
    """A second prompt of no weight changes nothing: rows of prompts have the prompt's factors, the last the null's."""
    pipe = controlled("sd1", nets("sd1"))
    how = {"latents": noise[:1], "steps": 3, "guidance_scale": 4.0, "control_image": HINT, "control_mode": "control"}
    np.testing.assert_allclose(pipe("red heart AND flag :0", **how), pipe("red heart", **how), atol=1e-4)


@pytest.mark.parametrize(
    ("net", "options", "said"),
    [
        ("sdxl", {}, "is for another base model: its channels (64, 64, 128), this one's (64, 128)"),
        ("sd1", {}, "sd1 needs control_image"),
        ("sd1", {"control_image": [HINT, SECOND]}, "2 entries in control_image for 1 in controlnet"),
        ("sd1", {"control_image": HINT, "control_mode": "guessing"}, "unknown control_mode 'guessing'"),
        ("sd1", {"control_image": HINT, "control_from": "inpaint"}, "control_from 'inpaint' needs a mask"),
        (
            "sd1",
            {"control_image": HINT, "width": 3 * zoo.SIDE},
            f"control_image has {zoo.SIDE}x{zoo.SIDE} pixels, the image {3 * zoo.SIDE}x{zoo.SIDE}: their proportions",
        ),
        ("", {"control_image": HINT}, "control_image changes nothing without a controlnet"),
        ("", {"control_scale": 0.5}, "control_scale 0.5 changes nothing without a controlnet"),
    ],
)
def test_rejects_with_one_line(net, options, said, folders, nets):
    with pytest.raises(UserError) as error:
        sdjax.load(folders("sd1"), controlnet=[nets(net)] if net else []).prepare(PROMPTS, **options)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
