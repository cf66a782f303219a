"""DeepFloyd IF against the pipelines of PyTorch diffusers: images agree to 1e-3 in float32.

Both stages with random weights, T5 included; diffusers opens the folders that are written here. Its generator draws the
first noise, for stage II that of the small images, then the noise of each step.
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import zoo
from diffusers.pipelines.deepfloyd_if import smart27_timesteps
from PIL import Image
from tiny_checkpoints import assert_same, tiny_if

import sdjax
from sdjax.checkpoints.layouts.diffusers import read_folder, write_checkpoint
from sdjax.core.errors import UserError
from sdjax.data.text.tokenizer_training import train_unigrams

TOLERANCE = 1e-3
LENGTH = 77
PROMPTS = ["A red heart", "a photo of a cat"]
NEGATIVES = ["cat", "a heart"]
WIDE = {"height": zoo.SIDE, "width": 24}
STEPS = 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The folder of each stage."""
    parent = tmp_path_factory.mktemp("if")
    tokenizer = parent / "tokenizer"
    tokenizer.mkdir()
    train_unigrams([*PROMPTS, *NEGATIVES], tokenizer, zoo.T5.vocab_size)
    for stage in zoo.IF:
        write_checkpoint(parent / stage, tiny_if(stage, tokenizer, LENGTH))
    return {stage: parent / stage for stage in zoo.IF}


@pytest.fixture(scope="module")
def opened(folders):
    """opened(stage): the pipeline of this library."""
    return functools.cache(lambda stage: sdjax.load(folders[stage]))


@pytest.fixture(scope="module")
def theirs(folders):
    """theirs(class, stage, seed, **options): images of diffusers' pipeline."""
    torch.set_num_threads(1)

    @functools.cache
    def read(kind: str, stage: str) -> Any:
        pipe = getattr(diffusers, kind).from_pretrained(folders[stage], local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(kind: str, stage: str, seed: int = 7, **options: Any) -> np.ndarray:
        how = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(seed), "output_type": "np"}
        return read(kind, stage)(PROMPTS, **{**how, **options}).images

    return call


def check(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert theirs.std() > 0.02, "the images show nothing"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def picture(height: int, width: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width] / [[[height]], [[width]]]
    return Image.fromarray((255 * np.stack([x, y, (x + y) / 2], -1)).astype(np.uint8))


HOW = {"seed": 7, "rng": "torch", "steps": STEPS, "batch_size": 2}


@pytest.mark.parametrize("guidance", [1.0, 7.0])
def test_stage_one(guidance, opened, theirs):
    """With dynamic thresholds and the learned variance."""
    given = {"negative_prompt": NEGATIVES, "guidance_scale": guidance, **WIDE}
    check(opened("if_i")(PROMPTS, **given, **HOW), theirs("IFPipeline", "if_i", **given))


def test_uneven_timesteps(opened, theirs):
    expected = theirs("IFPipeline", "if_i", timesteps=smart27_timesteps, guidance_scale=7.0)
    found = opened("if_i")(PROMPTS, schedule="smart27", **{n: HOW[n] for n in HOW if n != "steps"})
    check(found, expected)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_stage_two(guidance, opened, theirs):
    """From images of half the size, with noise of a level."""
    given = {"guidance_scale": guidance, "noise_level": 100, **WIDE}
    small = picture(WIDE["height"] // 2, WIDE["width"] // 2)
    expected = theirs("IFSuperResolutionPipeline", "if_ii", image=[small] * 2, **given)
    found = opened("if_ii")(PROMPTS, init_image=small, **given, **HOW)
    check(found, expected)
    noisier = opened("if_ii")(PROMPTS, init_image=small, **given | {"noise_level": 900}, **HOW)
    assert np.abs(noisier - found).max() > 0.01


def test_both_stages_in_one_call(folders, theirs, tmp_path):
    """diffusers hands the first stage's images on as they are, neither rounded nor in [0, 1]."""
    shutil.copytree(folders["if_ii"], tmp_path / "if_ii")
    config = tmp_path / "if_ii" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 2 * zoo.SIDE}))
    second = {"guidance_scale": 4.0, "noise_level": 100}
    small = theirs("IFPipeline", "if_i", guidance_scale=7.0, output_type="pt")
    size = {"height": 2 * zoo.SIDE, "width": 2 * zoo.SIDE}
    expected = theirs("IFSuperResolutionPipeline", "if_ii", image=small, **size, **second)
    cascade = sdjax.load(folders["if_i"], then=tmp_path / "if_ii")
    check(cascade(PROMPTS, guidance_scale=7.0, stages=[{"steps": STEPS, **second}], **HOW), expected)


def test_image_to_image(opened, theirs):
    given, image = {"strength": 0.7, "guidance_scale": 7.0}, picture(zoo.SIDE, 24)
    expected = theirs("IFImg2ImgPipeline", "if_i", image=[image] * 2, **given)
    check(opened("if_i")(PROMPTS, init_image=image, **given, **HOW), expected)


@pytest.mark.parametrize("strength", [0.7, 1.0])
def test_inpainting_keeps_the_rest_clean(strength, opened, theirs):
    white = np.zeros((zoo.SIDE, zoo.SIDE), np.uint8)
    white[3:11, 5:14] = 255
    image, mask = picture(zoo.SIDE, zoo.SIDE), Image.fromarray(white)
    given = {"strength": strength, "guidance_scale": 7.0}
    expected = theirs("IFInpaintingPipeline", "if_i", image=[image] * 2, mask_image=[mask] * 2, **given)
    found = opened("if_i")(PROMPTS, init_image=image, mask=mask, paste=False, **given, **HOW)
    check(found, expected)
    kept = np.broadcast_to(white[..., None] == 0, found.shape)
    np.testing.assert_allclose(found[kept], np.broadcast_to(np.asarray(image) / 255.0, found.shape)[kept], atol=1e-6)


@pytest.mark.parametrize(("stage", "kind"), [("if_i", "IFPipeline"), ("if_ii", "IFSuperResolutionPipeline")])
def test_folders_go_both_ways(stage, kind, folders, tmp_path):
    """diffusers reads ours by the class that its index names, and what it writes is read here, whatever its class."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folders[stage], local_files_only=True)
    assert type(pipe).__name__ == kind
    pipe.save_pretrained(tmp_path / "theirs")
    ours, found = read_folder(folders[stage]), read_folder(tmp_path / "theirs")
    assert_same(ours, found)
    assert (found.low_res_scheduler or {}).get("beta_schedule") == (ours.low_res_scheduler or {}).get("beta_schedule")
    write_checkpoint(tmp_path / "again", found)
    assert_same(ours, read_folder(tmp_path / "again"))
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["_class_name"] == kind
    assert index["safety_checker"] == [None, None]
    assert index["tokenizer"] == ["transformers", "T5Tokenizer"]


def test_defaults_are_those_of_diffusers(opened):
    settings = {
        stage: opened(stage).prepare("a", **more)[0].settings
        for stage, more in {"if_i": {}, "if_ii": {"init_image": picture(8, 8)}}.items()
    }
    chosen = {stage: tuple(found[n] for n in ("steps", "guidance_scale")) for stage, found in settings.items()}
    assert chosen == {"if_i": (100, 7.0), "if_ii": (50, 4.0)}
    row = opened("if_ii").prepare("a", init_image=picture(8, 12))[0]
    assert row.size == (16, 24)
    assert row.parts[0].columns["noise_level"] == 250
    given = {"init_image": picture(32, 48), "mask": Image.new("L", (48, 32), 255)}
    row = opened("if_i").prepare("a", **given)[0]
    assert row.size == (16, 24)
    assert row.settings["strength"] == 1.0
    assert opened("if_i").prepare("a", init_image=given["init_image"])[0].settings["strength"] == 0.7


MISTAKES = {
    "no image": ("if_ii", {}, "if_ii needs init_image"),
    "level": ("if_ii", {"init_image": picture(8, 8), "noise_level": 1000}, "noise_level 1000: choose .*0 to 999"),
    "proportions": (
        "if_ii",
        {"init_image": picture(8, 12), "width": 16, "height": 16},
        "init_image is 12x8 pixels; if_ii enlarges it to 16x16: give one that is no larger",
    ),
    "too large": ("if_ii", {"init_image": picture(32, 32), "width": 16, "height": 16}, "init_image is 32x32 pixels"),
    "mask": ("if_ii", {"init_image": picture(8, 8), "mask": picture(8, 8)}, "mask changes nothing"),
    "level of stage one": ("if_i", {"noise_level": 3}, "noise_level 3 changes nothing"),
    "steps": ("if_i", {"schedule": "fast27", "steps": 50}, "steps 50: schedule 'fast27' has 27"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, opened):
    stage, options, message = MISTAKES[name]
    with pytest.raises(UserError, match=message) as error:
        opened(stage).prepare("a red heart", **options)
    assert "\n" not in str(error.value)
