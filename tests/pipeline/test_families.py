"""SDXL, its refiner, inpainting and upscaling models against PyTorch diffusers: images agree to 1e-3 in float32."""

from __future__ import annotations

import dataclasses
import importlib
import os

import diffusers
import jax
import numpy as np
import pytest
import torch
import zoo
from PIL import Image
from tiny_checkpoints import BETAS, random_params, tiny_checkpoint
from torch_reference import drawn

import sdjax
from sdjax.checkpoints.checkpoint import Component
from sdjax.checkpoints.layouts.diffusers import write_checkpoint
from sdjax.checkpoints.layouts.original import TOKENIZER_FOLDERS
from sdjax.checkpoints.layouts.original_writer import write_single_file
from sdjax.checkpoints.networks.unet import shapes as unet_shapes
from sdjax.core.errors import UserError
from sdjax.pipeline.few_step import few_step_defaults

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
def test_sdxl(negative, in_diffusers, opened):
    """Without a negative prompt the null embeddings are zeros; sizes and crops are conditions."""
    theirs = in_diffusers("StableDiffusionXLPipeline", "sdxl", "EulerAncestralDiscreteScheduler")
    sizes = {"original_size": (40, 30), "target_size": (16, 24)}
    common = {"negative_prompt": negative, "guidance_scale": 5.0, "guidance_rescale": 0.5}
    expected = theirs(
        PROMPTS,
        num_inference_steps=6,
        generator=torch.Generator().manual_seed(3),
        crops_coords_top_left=(3, 5),
        output_type="np",
        **SIDES,
        **sizes,
        **common,
    ).images
    how = {"steps": 6, "sampler": "euler_a", "seed": 3, "rng": "torch"}
    check(opened("sdxl")(PROMPTS, crop=(3, 5), **how, **sizes, **common), expected)


def test_small_sdxl(checkpoints, tmp_path):
    """diffusers' small test models have 8 features of each size, not 256."""
    made = checkpoints("sdxl")
    config = dataclasses.replace(zoo.UNETS["sdxl"], vector_dim=64 + 6 * 8)
    unet = Component(config, drawn(unet_shapes(config)), {"sample_size": LATENT, "addition_time_embed_dim": 8})
    checkpoint = dataclasses.replace(made, components={**made.components, "unet": unet})
    write_checkpoint(tmp_path / "model", checkpoint)
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    expected = theirs(
        PROMPTS[:1], num_inference_steps=2, guidance_scale=5.0, generator=generator, output_type="np", **SIDES
    ).images
    pipe = sdjax.load(tmp_path / "model")
    check(pipe(PROMPTS[:1], steps=2, guidance_scale=5.0, seed=3, rng="torch"), expected)
    with pytest.raises(UserError, match="addition_time_embed_dim = 8: a single file does not tell it"):
        write_single_file(tmp_path / "model.safetensors", checkpoint)


@pytest.fixture(scope="module")
def refined(folders):
    """SDXL's base and its refiner."""
    return sdjax.load(folders("sdxl"), refiner=folders("sdxl_refiner"))


def test_refiner(in_diffusers, refined):
    """From 0.6 of the noise levels on: none is lost, and a multistep solver begins anew.

    One torch generator goes on from the base to the refiner, as diffusers' users pass it to both pipelines.
    """
    base = in_diffusers("StableDiffusionXLPipeline", "sdxl", DPMPP_2M)
    theirs = in_diffusers("StableDiffusionXLImg2ImgPipeline", "sdxl_refiner", DPMPP_2M)
    for pipe in (base, theirs):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, algorithm_type="sde-dpmsolver++")
    generator = torch.Generator().manual_seed(3)
    common = {"negative_prompt": NEGATIVES, "guidance_scale": 4.0, "num_inference_steps": 10, "generator": generator}
    latents = base(PROMPTS, denoising_end=0.6, output_type="latent", **SIDES, **common).images
    sizes = {"original_size": (SIZE, SIZE), "target_size": (SIZE, SIZE)}
    expected = theirs(PROMPTS, image=latents, denoising_start=0.6, output_type="np", **sizes, **common).images
    how = {"steps": 10, "sampler": "dpmpp_2m_sde", "seed": 3, "rng": "torch"}
    check(refined(PROMPTS, NEGATIVES, refiner_start=0.6, guidance_scale=4.0, **how), expected)


def test_edited_prompts_go_on_in_the_refiner(refined):
    """It takes over after step 6 of 10; the words change after step 8."""
    (row,) = refined.prepare("[red heart:flag:8]", steps=10, refiner_start=0.6, sampler="dpmpp_2m")
    assert [part.schedule is None for part in row.parts] == [True, False]
    refiner = row.parts[1]
    assert refiner.schedule.places[refiner.table.active, 0].tolist() == [0, 0, 2, 2]


def test_rejects_what_cannot_refine(folders, opened, refined):
    with pytest.raises(UserError, match="sd1_inpainting cannot refine what sdxl makes"):
        sdjax.load(folders("sdxl"), refiner=folders("sd1_inpainting"))
    with pytest.raises(UserError, match=r"the latents that it knows are scaled by 0\.13025, not 0\.18215"):
        sdjax.load(folders("sd1"), refiner=folders("sdxl_refiner"))
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
    with pytest.raises(UserError, match="lcm was distilled to do without the null condition, with which AND composes"):
        ours.prepare("a red heart AND a cat")


@pytest.fixture(scope="module")
def single_file(tmp_path_factory):
    """A single file of SDXL with CLIP's own vocabulary, which single files lack, and the folder of the same model."""
    parent = tmp_path_factory.mktemp("single")
    made = tiny_checkpoint("sdxl", TOKENIZER_FOLDERS / "clip_l", 49408, 77)
    second = {"text_encoder_2": TOKENIZER_FOLDERS / "open_clip"}
    made = dataclasses.replace(made, tokenizers={**made.tokenizers, **second})
    write_single_file(parent / "model.safetensors", made)
    write_checkpoint(parent / "folder", made)
    return parent / "model.safetensors", parent / "folder"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sdxl_lightning_2step.safetensors", (2, 0.0, "euler", "trailing")),
        ("sd_xl_turbo_1.0_fp16.safetensors", (4, 0.0, "euler_a", "trailing")),
        ("sd_xl_base_1.0.safetensors", (50, 7.5, "euler", None)),
    ],
)
def test_few_step_files_have_settings_of_their_own(name, expected, single_file, tmp_path, caplog):
    os.link(single_file[0], tmp_path / name)
    with caplog.at_level("INFO", "sdjax"):
        pipe = sdjax.load(tmp_path / name)
    assert chosen(pipe) == expected
    assert ("is sampled as a" in caplog.text) == (expected[0] < 50)
    assert f"{name} is taken for SDXL" in caplog.text
    assert chosen(pipe, steps=9, guidance_scale=3.0)[:2] == (9, 3.0)


LIGHTNING, TURBO = ("euler", "trailing"), ("euler_a", "trailing")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sdxl_lightning_8step_unet", (8, 0.0, *LIGHTNING)),
        ("sdxl_lightning_1step_unet_x0", (1, 0.0, *LIGHTNING)),
        ("SDXL-Lightning-4-steps", (4, 0.0, *LIGHTNING)),
        ("realvis_4step_Lightning", (4, 0.0, *LIGHTNING)),
        ("sdxl-turbo", (4, 0.0, *TURBO)),
        ("sd_turbo", (4, 0.0, *TURBO)),
        ("Hyper-SDXL-8steps", (8, 0.0, "ddim", "trailing")),
        ("dmd2_sdxl_4step_unet_fp16", (4, 1.0, "lcm", None)),
        ("dreamshaper_8LCM", (4, 1.0, "lcm", None)),
        ("lcm-sdxl", (4, 1.0, "lcm", None)),
        *((name, None) for name in ("lightning_bolts_v2", "thunderLightning", "lightning_30steps", "turbokid_xl")),
        *((name, None) for name in ("hyperrealism_v3", "calcmodel", "welcome", "misd_turbocharged", "sd_xl_base_1.0")),
    ],
)
def test_names_of_few_step_models(name, expected, caplog):
    """A word of a way of distilling is also in names of plain models; their log says how to sample it otherwise."""
    with caplog.at_level("INFO", "sdjax"):
        found = few_step_defaults(name, {"_class_name": "EulerDiscreteScheduler"}, False, True)
    names = ("steps", "guidance_scale", "sampler", "schedule")
    assert (tuple(map(found.get, names)) if found else None) == expected
    if expected is None and ("lightning" in name.lower() or "turbo" in name):
        assert "is sampled as a plain model; if it is a" in caplog.text


def test_hub_models_keep_their_names(single_file, tmp_path, monkeypatch):
    """The Hub's cache names folders by commits and files by their sums."""
    snapshot, blob = tmp_path / "snapshots" / "0123abc", tmp_path / "blobs" / "4567def"
    snapshot.parent.mkdir()
    snapshot.symlink_to(single_file[1])
    blob.parent.mkdir()
    os.link(single_file[0], blob)
    file = tmp_path / "sdxl_lightning_2step.safetensors"
    places = {"acme/sdxl-turbo@main": snapshot, f"acme/xl/{file.name}": file}
    file.symlink_to(blob)
    # The function of this name hides its module.
    module = importlib.import_module("sdjax.pipeline.load")
    monkeypatch.setattr(module, "resolve", lambda source, variant=None: places[source])
    turbo, lightning = (sdjax.load(source) for source in places)
    assert (turbo.name, *chosen(turbo)[:2]) == ("sdxl-turbo", 4, 0.0)
    assert (lightning.name, chosen(lightning)[0]) == ("sdxl_lightning_2step", 2)


def test_single_file_is_its_folder(single_file):
    """The same networks, parameters and rows, prompts through CLIP's own vocabulary: so the same images."""
    from_file, from_folder = map(sdjax.load, single_file)
    assert from_file.model == from_folder.model
    how = {"steps": 3, "sampler": "euler", "schedule": "trailing", "guidance_scale": 3.0, **SIDES}
    for name, (ours, expected) in {
        "params": (from_file.params, from_folder.params),
        "rows": tuple(
            [row._replace(settings={}) for row in pipe.prepare(PROMPTS, **how)] for pipe in (from_file, from_folder)
        ),
    }.items():
        jax.tree.map(lambda a, b, name=name: np.testing.assert_array_equal(a, b, err_msg=name), ours, expected)
