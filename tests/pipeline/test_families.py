"""SDXL, its refiner, inpainting and upscaling models against PyTorch diffusers: images agree to 1e-3 in float32."""

from __future__ import annotations

import dataclasses

import diffusers
import numpy as np
import pytest
import torch
import zoo
from PIL import Image
from tiny_checkpoints import BETAS, random_params, tiny_checkpoint

import sdjax
from sdjax.convert.folder import write_checkpoint
from sdjax.convert.single_file import TOKENIZER_FOLDERS, write_single_file
from sdjax.convert.unet import shapes as unet_shapes
from sdjax.core.errors import UserError

TOLERANCE = 1e-3
SIZE, LATENT = zoo.SIDE, zoo.SIDE // 2
DDIM, EULER, DPMPP_2M = "DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"
SIDES = {"width": SIZE, "height": SIZE}
PROMPTS = ["a red heart", "a photo of a cat"]
NEGATIVES = ["cat", "a heart"]


def to_torch(latents: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())


def check(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert theirs.std() > 0.02, "the images show nothing"
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


def picture(size: int) -> Image.Image:
    y, x = np.mgrid[0:size, 0:size] / size
    return Image.fromarray((255 * np.stack([x, y, (x + y) / 2], -1)).astype(np.uint8))


def chosen(pipe: sdjax.Pipeline, **options: object) -> tuple[object, ...]:
    """Steps, guidance scale, sampler and schedule of a call."""
    settings = pipe.prepare("", **options)[0].settings
    return tuple(settings.get(name) for name in ("steps", "guidance_scale", "sampler", "schedule"))


@pytest.mark.parametrize(("sampler", "kind", "zero_snr"), [("dpmpp_2m", DPMPP_2M, False), ("ddim", DDIM, True)])
def test_stable_diffusion_2(sampler, kind, zero_snr, in_diffusers, opened, noise):
    """Predicts v; with zero terminal SNR it begins from pure noise at t = 999 (Lin et al. 2024)."""
    scheduler = {"prediction_type": "v_prediction"}
    scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_snr else {}
    theirs = in_diffusers("StableDiffusionPipeline", "sd2", kind, **scheduler)
    common = {"negative_prompt": NEGATIVES, "guidance_scale": 6.0, "guidance_rescale": 0.7}
    expected = theirs(
        PROMPTS, num_inference_steps=6, latents=to_torch(noise), output_type="np", **SIDES, **common
    ).images
    check(opened("sd2", **scheduler)(PROMPTS, steps=6, sampler=sampler, latents=noise, **common), expected)


@pytest.mark.parametrize("negative", [None, NEGATIVES])
def test_sdxl(negative, in_diffusers, opened, noise):
    """Without a negative prompt the null embeddings are zeros; sizes and crops are conditions."""
    theirs = in_diffusers("StableDiffusionXLPipeline", "sdxl")
    sizes = {"original_size": (40, 30), "target_size": (16, 24)}
    common = {"negative_prompt": negative, "guidance_scale": 5.0, "guidance_rescale": 0.5}
    expected = theirs(
        PROMPTS,
        num_inference_steps=6,
        latents=to_torch(noise),
        crops_coords_top_left=(3, 5),
        output_type="np",
        **SIDES,
        **sizes,
        **common,
    ).images
    check(opened("sdxl")(PROMPTS, steps=6, latents=noise, crop=(3, 5), **sizes, **common), expected)


@pytest.fixture(scope="module")
def refined(folders):
    """SDXL's base and its refiner."""
    return sdjax.load(folders("sdxl"), refiner=folders("sdxl_refiner"))


def refined_by_diffusers(in_diffusers, sampler: str, share: float, base: dict, both: dict) -> np.ndarray:
    """Latents of SDXL's base up to a share of the noise levels, from there on its refiner's images."""
    first = in_diffusers("StableDiffusionXLPipeline", "sdxl", sampler)
    second = in_diffusers("StableDiffusionXLImg2ImgPipeline", "sdxl_refiner", sampler)
    both = {"negative_prompt": NEGATIVES, "guidance_scale": 4.0, **both}
    latents = first(PROMPTS, denoising_end=share, output_type="latent", **SIDES, **base, **both).images
    sizes = {"original_size": (SIZE, SIZE), "target_size": (SIZE, SIZE)}
    return second(PROMPTS, image=latents, denoising_start=share, output_type="np", **sizes, **both).images


def test_refiner(in_diffusers, refined, noise):
    """From 0.6 of the noise levels on; no noise is added and none is lost, and a multistep solver begins anew."""
    latents, steps = {"latents": to_torch(noise)}, {"num_inference_steps": 10}
    expected = refined_by_diffusers(in_diffusers, DPMPP_2M, 0.6, latents, steps)
    how = {"steps": 10, "sampler": "dpmpp_2m", "latents": noise, "refiner_start": 0.6, "guidance_scale": 4.0}
    check(refined(PROMPTS, NEGATIVES, **how), expected)


def test_torch_noise_goes_on_in_the_refiner(in_diffusers, refined):
    """One generator for both, as its users pass it to both pipelines of diffusers."""
    both = {"num_inference_steps": 8, "generator": torch.Generator().manual_seed(3)}
    expected = refined_by_diffusers(in_diffusers, "EulerAncestralDiscreteScheduler", 0.5, {}, both)
    how = {"steps": 8, "sampler": "euler_a", "guidance_scale": 4.0, "seed": 3, "rng": "torch", "refiner_start": 0.5}
    check(refined(PROMPTS, NEGATIVES, **how), expected)


def test_rejects_what_cannot_refine(folders, opened, refined):
    with pytest.raises(UserError, match="sd1_inpainting cannot refine what sdxl makes"):
        sdjax.load(folders("sdxl"), refiner=folders("sd1_inpainting"))
    with pytest.raises(UserError, match=r"refiner_start 0\.5 changes nothing without a refiner"):
        opened("sdxl").prepare(PROMPTS, steps=4, refiner_start=0.5)
    with pytest.raises(UserError, match="refiner_start 0 gives the base 0 of 4 steps"):
        refined.prepare(PROMPTS, steps=4, refiner_start=0)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_nine_channel_inpainting(strength, in_diffusers, opened):
    theirs = in_diffusers("StableDiffusionInpaintPipeline", "sd1_inpainting", DDIM)
    white = np.zeros((SIZE, SIZE), np.uint8)
    white[4:10, 6:14] = 255
    common = {"negative_prompt": NEGATIVES, "guidance_scale": 4.0, "strength": strength}
    expected = theirs(
        PROMPTS,
        image=picture(SIZE),
        mask_image=Image.fromarray(white),
        num_inference_steps=6,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
        **SIDES,
        **common,
    ).images
    given = {"init_image": picture(SIZE), "mask": Image.fromarray(white), "paste": False}
    check(opened("sd1_inpainting")(PROMPTS, steps=6, seed=7, rng="torch", **given, **common), expected)


def test_depth_to_image(in_diffusers, opened):
    """Both images of one prompt begin from one image, whose posterior is drawn from once."""
    theirs, ours = in_diffusers("StableDiffusionDepth2ImgPipeline", "sd2_depth", EULER), opened("sd2_depth")
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
    how = {"steps": 6, "sampler": "euler", "seed": 7, "rng": "torch", **given, **common}
    found = ours(PROMPTS[0], NEGATIVES[0], **how)
    check(found, expected)
    near_is_far = ours(PROMPTS[0], NEGATIVES[0], **{**how, "depth": 1.0 - depth[0]})
    assert np.abs(near_is_far - found).max() > 0.01


def test_upscaler(in_diffusers, opened):
    theirs = in_diffusers("StableDiffusionUpscalePipeline", "x4_upscaler", DDIM)
    common = {"negative_prompt": NEGATIVES, "guidance_scale": 4.0, "noise_level": 2}
    expected = theirs(
        PROMPTS,
        image=[picture(LATENT)] * 2,
        num_inference_steps=6,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
        **common,
    ).images
    found = opened("x4_upscaler")(PROMPTS, steps=6, seed=7, rng="torch", init_image=picture(LATENT), **common)
    check(found, expected)


def test_latent_consistency_model(checkpoints, tmp_path):
    """In four steps, conditioned on the guidance scale, with noise between them."""
    made = checkpoints("sd1")
    part = made.components["unet"]
    config = dataclasses.replace(part.config, guidance_dim=256)  # as many as diffusers gives it
    unet = dataclasses.replace(part, config=config, params=random_params(unet_shapes(config), 0))
    scheduler = {**BETAS, "_class_name": "LCMScheduler", "original_inference_steps": 50}
    index = {"_class_name": "LatentConsistencyModelPipeline", "requires_safety_checker": False}
    made = dataclasses.replace(made.replace_component("unet", unet), scheduler=scheduler, model_index=index)
    write_checkpoint(tmp_path / "lcm", made)
    ours = sdjax.load(tmp_path / "lcm")
    theirs = diffusers.LatentConsistencyModelPipeline.from_pretrained(tmp_path / "lcm", local_files_only=True)
    generator = torch.Generator().manual_seed(5)
    expected = theirs(PROMPTS, generator=generator, output_type="np", **SIDES).images
    assert chosen(ours) == (4, 8.5, "lcm", None)
    found = ours(PROMPTS, seed=5, rng="torch")
    check(found, expected)
    assert np.abs(ours(PROMPTS, seed=5, rng="torch", guidance_scale=1.0) - found).max() > 0.01


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
    assert chosen(pipe) == expected
    assert ("is sampled as a" in caplog.text) == (expected[0] < 50)
    assert f"{name} is taken for SDXL" in caplog.text
    assert chosen(pipe, steps=9, guidance_scale=3.0)[:2] == (9, 3.0)


def test_hub_models_keep_their_names(folders, tmp_path, monkeypatch):
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
    monkeypatch.setattr("sdjax.pipeline.load.resolve", lambda source, variant=None: places[source])
    turbo, lightning = (sdjax.load(source) for source in places)
    assert (turbo.name, *chosen(turbo)[:2]) == ("sdxl-turbo", 4, 0.0)
    assert (lightning.name, chosen(lightning)[0]) == ("sdxl_lightning_2step", 2)


def test_a_single_file_paints_what_its_folder_paints(tmp_path):
    """Prompts through CLIP's own vocabulary, which single files lack."""
    checkpoint = tiny_checkpoint("sdxl", TOKENIZER_FOLDERS / "clip_l", 49408, 77)
    checkpoint = dataclasses.replace(checkpoint, tokenizer_2=TOKENIZER_FOLDERS / "open_clip")
    write_checkpoint(tmp_path / "folder", checkpoint)
    write_single_file(tmp_path / "file.safetensors", checkpoint)
    asked = {"steps": 3, "width": SIZE, "height": SIZE, "sampler": "euler", "schedule": "trailing"}
    from_folder, from_file = (sdjax.load(tmp_path / name)(PROMPTS, **asked) for name in ("folder", "file.safetensors"))
    np.testing.assert_allclose(from_file, from_folder, atol=1e-5)
