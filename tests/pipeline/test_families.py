"""SDXL, its refiner, inpainting and upscaling models against PyTorch diffusers: images agree to 1e-3 in float32."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from tiny_checkpoints import BETAS, random_params, tiny_checkpoint, write_tokenizer

import sdjax
from sdjax.convert.folder import read_folder, write_checkpoint
from sdjax.convert.single_file import TOKENIZER_FOLDERS, write_single_file
from sdjax.convert.unet import shapes as unet_shapes
from sdjax.core.errors import UserError

TOLERANCE = 1e-3
SIZE, LATENT = 16, 8
SAMPLERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
}
PROMPTS = ["a red heart", "a photo of a cat"]
NEGATIVES = ["cat", "a heart"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(family): a tiny checkpoint of it."""
    torch.set_num_threads(1)
    parent = tmp_path_factory.mktemp("families")
    vocab_size = write_tokenizer(parent / "tokenizer")

    def folder(family: str) -> Path:
        if not (parent / family).exists():
            write_checkpoint(parent / family, tiny_checkpoint(family, parent / "tokenizer", vocab_size))
        return parent / family

    return folder


@pytest.fixture
def noise():
    return np.random.default_rng(3).standard_normal((2, LATENT, LATENT, 4)).astype(np.float32)


@pytest.fixture
def posterior_mean(monkeypatch):
    """diffusers draws from the posterior of a given picture: it still does, and takes the mean."""

    def mean(self, generator=None):
        randn_tensor(self.mean.shape, generator=generator)
        return self.mode()

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", mean)


def pair(folder: Path, kind: str, sampler: str, **absent: None):
    theirs = getattr(diffusers, kind).from_pretrained(folder, local_files_only=True, **absent)
    # SDXL's own config, Euler's, says nothing of DDIM's clipping, which latents do not bear
    theirs.scheduler = SAMPLERS[sampler].from_config({**theirs.scheduler.config, "clip_sample": False})
    theirs.set_progress_bar_config(disable=True)
    return sdjax.load(folder), theirs


def to_torch(latents: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())


def check(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert theirs.std() > 0.02, "the pictures show nothing"
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


def picture(size: int) -> Image.Image:
    y, x = np.mgrid[0:size, 0:size] / size
    return Image.fromarray((255 * np.stack([x, y, (x + y) / 2], -1)).astype(np.uint8))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_stable_diffusion_2(sampler, zero_snr, folders, noise, tmp_path):
    """Predicts v; with zero terminal SNR it begins from pure noise at t = 999 (Lin et al. 2024)."""
    scheduler = {**BETAS, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "clip_sample": False}
    scheduler |= {"set_alpha_to_one": False, "steps_offset": 1}
    scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_snr else {}
    made = dataclasses.replace(read_folder(folders("sd2")), scheduler=scheduler)
    write_checkpoint(tmp_path / "sd2", made)
    ours, theirs = pair(tmp_path / "sd2", "StableDiffusionPipeline", sampler)
    common = {"negative_prompt": NEGATIVES, "guidance_scale": 6.0, "guidance_rescale": 0.7}
    expected = theirs(
        PROMPTS,
        num_inference_steps=6,
        latents=to_torch(noise),
        output_type="np",
        width=SIZE,
        height=SIZE,
        **common,
    ).images
    check(ours(PROMPTS, steps=6, sampler=sampler, latents=noise, **common), expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("negative", [None, NEGATIVES])
def test_sdxl(sampler, negative, folders, noise):
    """Without a negative prompt the unconditional embeddings are zeros; sizes and crops are told."""
    ours, theirs = pair(folders("sdxl"), "StableDiffusionXLPipeline", sampler)
    told = {"original_size": (40, 30), "target_size": (16, 24)}
    common = {"negative_prompt": negative, "guidance_scale": 5.0, "guidance_rescale": 0.5}
    expected = theirs(
        PROMPTS,
        num_inference_steps=6,
        latents=to_torch(noise),
        crops_coords_top_left=(3, 5),
        output_type="np",
        width=SIZE,
        height=SIZE,
        **told,
        **common,
    ).images
    found = ours(PROMPTS, steps=6, sampler=sampler, latents=noise, crop=(3, 5), **told, **common)
    check(found, expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_refiner_takes_over(sampler, folders, noise):
    """From 0.6 of the noise levels on; no noise is added and none is lost."""
    ours, base = pair(folders("sdxl"), "StableDiffusionXLPipeline", sampler)
    refiner, theirs = pair(folders("sdxl_refiner"), "StableDiffusionXLImg2ImgPipeline", sampler)
    common = {"negative_prompt": NEGATIVES, "guidance_scale": 4.0}
    latents = base(
        PROMPTS,
        num_inference_steps=10,
        denoising_end=0.6,
        latents=to_torch(noise),
        output_type="latent",
        width=SIZE,
        height=SIZE,
        **common,
    ).images
    sizes = {"original_size": (SIZE, SIZE), "target_size": (SIZE, SIZE)}
    expected = theirs(
        PROMPTS, image=latents, num_inference_steps=10, denoising_start=0.6, output_type="np", **sizes, **common
    ).images
    found = ours(PROMPTS, steps=10, sampler=sampler, latents=noise, refiner=refiner, refiner_start=0.6, **common)
    check(found, expected)


def test_torch_noise_goes_on_in_the_refiner(folders):
    """One generator for both, as its users pass it to both pipelines of diffusers."""
    ours, base = pair(folders("sdxl"), "StableDiffusionXLPipeline", "euler")
    refiner, theirs = pair(folders("sdxl_refiner"), "StableDiffusionXLImg2ImgPipeline", "euler")
    for pipe in (base, theirs):
        pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(base.scheduler.config)
    generator = torch.Generator().manual_seed(3)
    common = {"negative_prompt": NEGATIVES, "guidance_scale": 4.0, "num_inference_steps": 8, "generator": generator}
    size = {"width": SIZE, "height": SIZE}
    latents = base(PROMPTS, denoising_end=0.5, output_type="latent", **size, **common).images
    sizes = {"original_size": (SIZE, SIZE), "target_size": (SIZE, SIZE)}
    expected = theirs(PROMPTS, image=latents, denoising_start=0.5, output_type="np", **sizes, **common).images
    asked = {"steps": 8, "sampler": "euler_a", "guidance_scale": 4.0, "seed": 3, "refiner": refiner}
    check(ours(PROMPTS, NEGATIVES, rng="torch", refiner_start=0.5, **asked), expected)


def test_what_cannot_refine(folders):
    ours, other = (sdjax.load(folders(family)) for family in ("sdxl", "sd1_inpainting"))
    with pytest.raises(UserError, match="sd1_inpainting cannot refine what sdxl makes"):
        ours(PROMPTS, steps=4, refiner=other)
    with pytest.raises(UserError, match=r"refiner_start 0\.5 changes nothing without a refiner"):
        ours(PROMPTS, steps=4, refiner_start=0.5)
    refiner = sdjax.load(folders("sdxl_refiner"))
    with pytest.raises(UserError, match="refiner_start 0 gives the base 0 of 4 steps"):
        ours(PROMPTS, steps=4, refiner=refiner, refiner_start=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_nine_channel_inpainting(sampler, strength, folders, posterior_mean):
    ours, theirs = pair(folders("sd1_inpainting"), "StableDiffusionInpaintPipeline", sampler)
    white = np.zeros((SIZE, SIZE), np.uint8)
    white[4:10, 6:14] = 255
    common = {"negative_prompt": NEGATIVES, "guidance_scale": 4.0, "strength": strength}
    expected = theirs(
        PROMPTS,
        image=picture(SIZE),
        mask_image=Image.fromarray(white),
        width=SIZE,
        height=SIZE,
        num_inference_steps=6,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
        **common,
    ).images
    given = {"init_image": picture(SIZE), "mask": Image.fromarray(white), "paste": False}
    found = ours(PROMPTS, steps=6, sampler=sampler, seed=7, rng="torch", **given, **common)
    check(found, expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_depth_to_image(sampler, folders, posterior_mean):
    """Both pictures of one prompt begin from one picture, whose posterior is drawn from once."""
    absent = {"depth_estimator": None, "feature_extractor": None}
    ours, theirs = pair(folders("sd2_depth"), "StableDiffusionDepth2ImgPipeline", sampler, **absent)
    depth = np.random.default_rng(0).random((1, 12, 12)).astype(np.float32)
    common = {"guidance_scale": 4.0, "strength": 0.7}
    expected = theirs(
        PROMPTS[0],
        negative_prompt=NEGATIVES[0],
        image=picture(SIZE),
        depth_map=torch.from_numpy(depth),
        num_inference_steps=6,
        num_images_per_prompt=2,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
        **common,
    ).images
    given = {"init_image": picture(SIZE), "depth": depth[0], "num_images": 2}
    asked = {"steps": 6, "sampler": sampler, "seed": 7, "rng": "torch", **given, **common}
    found = ours(PROMPTS[0], NEGATIVES[0], **asked)
    check(found, expected)
    near_is_far = ours(PROMPTS[0], NEGATIVES[0], **{**asked, "depth": 1.0 - depth[0]})
    assert np.abs(near_is_far - found).max() > 0.01


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_upscaler(sampler, folders):
    ours, theirs = pair(folders("x4_upscaler"), "StableDiffusionUpscalePipeline", sampler)
    common = {"negative_prompt": NEGATIVES, "guidance_scale": 4.0, "noise_level": 2}
    expected = theirs(
        PROMPTS,
        image=[picture(LATENT)] * 2,
        num_inference_steps=6,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
        **common,
    ).images
    found = ours(PROMPTS, steps=6, sampler=sampler, seed=7, rng="torch", init_image=picture(LATENT), **common)
    check(found, expected)


def test_a_latent_consistency_model(folders, tmp_path):
    """In four steps, told the guidance scale, with noise between them."""
    tokenizer = folders("sd1") / "tokenizer"
    made = tiny_checkpoint("sd1", tokenizer, len(json.loads((tokenizer / "vocab.json").read_text())))
    part = made.components["unet"]
    config = dataclasses.replace(part.config, guidance_dim=256)
    unet = dataclasses.replace(part, config=config, params=random_params(unet_shapes(config), 0))
    scheduler = {**BETAS, "_class_name": "LCMScheduler", "original_inference_steps": 50}
    index = {"_class_name": "LatentConsistencyModelPipeline", "requires_safety_checker": False}
    made = dataclasses.replace(made.replace_component("unet", unet), scheduler=scheduler, model_index=index)
    write_checkpoint(tmp_path / "lcm", made)
    ours = sdjax.load(tmp_path / "lcm")
    theirs = diffusers.LatentConsistencyModelPipeline.from_pretrained(tmp_path / "lcm", local_files_only=True)
    expected = theirs(
        PROMPTS, generator=torch.Generator().manual_seed(5), output_type="np", width=SIZE, height=SIZE
    ).images
    chosen = ours.settings()
    assert (chosen.steps, chosen.guidance_scale, chosen.sampler) == (4, 8.5, "lcm")
    check(ours(PROMPTS, seed=5, rng="torch"), expected)
    assert np.abs(ours(PROMPTS, seed=5, guidance_scale=1.0) - ours(PROMPTS, seed=5)).max() > 0.01


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sdxl_lightning_2step.safetensors", (2, 0.0, "euler", "trailing")),
        ("sd_xl_turbo_1.0_fp16.safetensors", (4, 0.0, "euler_a", "trailing")),
        ("sd_xl_base_1.0.safetensors", (50, 7.5, "euler", None)),
    ],
)
def test_few_step_files_have_settings_of_their_own(name, expected, tmp_path, caplog):
    checkpoint = tiny_checkpoint("sdxl", TOKENIZER_FOLDERS / "clip_l", 49408, 77)
    write_single_file(tmp_path / name, checkpoint)
    with caplog.at_level("INFO", "sdjax"):
        pipe = sdjax.load(tmp_path / name)
    chosen = pipe.settings()
    assert (chosen.steps, chosen.guidance_scale, chosen.sampler, chosen.schedule) == expected
    assert ("is sampled as a" in caplog.text) == (expected[0] < 50)
    assert f"{name} is taken for SDXL" in caplog.text
    assert pipe.settings(steps=9, guidance_scale=3.0).steps == 9


def test_a_model_of_the_hub_is_called_what_it_is_called_there(folders, tmp_path, monkeypatch):
    """Its cache names folders by commits and files by their sums."""
    snapshot, blob = tmp_path / "snapshots" / "0123abc", tmp_path / "blobs" / "4567def"
    snapshot.parent.mkdir()
    snapshot.symlink_to(folders("sdxl"))
    blob.parent.mkdir()
    write_single_file(tmp_path / "made.safetensors", tiny_checkpoint("sdxl", TOKENIZER_FOLDERS / "clip_l", 49408, 77))
    (tmp_path / "made.safetensors").rename(blob)
    file = tmp_path / "sdxl_lightning_2step.safetensors"
    places = {"acme/sdxl-turbo@main": snapshot, f"acme/xl/{file.name}": file}
    file.symlink_to(blob)
    monkeypatch.setattr("sdjax.pipeline.loading.resolve", lambda source, variant=None: places[source])
    turbo, lightning = (sdjax.load(source) for source in places)
    assert (turbo.name, turbo.settings().steps, turbo.settings().guidance_scale) == ("sdxl-turbo", 4, 0.0)
    assert (lightning.name, lightning.settings().steps) == ("sdxl_lightning_2step", 2)


def test_a_single_file_paints_what_its_folder_paints(tmp_path):
    """Prompts through CLIP's own vocabulary, which single files lack."""
    checkpoint = tiny_checkpoint("sdxl", TOKENIZER_FOLDERS / "clip_l", 49408, 77)
    checkpoint = dataclasses.replace(checkpoint, tokenizer_2=TOKENIZER_FOLDERS / "open_clip")
    write_checkpoint(tmp_path / "folder", checkpoint)
    write_single_file(tmp_path / "file.safetensors", checkpoint)
    asked = {"steps": 3, "width": SIZE, "height": SIZE, "sampler": "euler", "schedule": "trailing"}
    from_folder, from_file = (sdjax.load(tmp_path / name)(PROMPTS, **asked) for name in ("folder", "file.safetensors"))
    np.testing.assert_allclose(from_file, from_folder, atol=1e-5)


def test_torch_noise_of_an_ancestral_sampler(folders):
    """--rng torch draws diffusers' own noise for a seed, that of every step included."""
    ours, theirs = pair(folders("sd1"), "StableDiffusionPipeline", "euler")
    theirs.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(theirs.scheduler.config)
    expected = theirs(
        PROMPTS,
        num_inference_steps=6,
        generator=torch.Generator().manual_seed(11),
        output_type="np",
        width=SIZE,
        height=SIZE,
    ).images
    check(ours(PROMPTS, steps=6, sampler="euler_a", seed=11, rng="torch"), expected)
