"""Folders of every family: what is written is loaded by diffusers' pipeline of that family and holds the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
from tiny_checkpoints import DDIM, FAMILIES, assert_same, tiny_checkpoint, write_tokenizer

from sdjax.checkpoints.layouts.diffusers import absent_parts, read_folder, write_checkpoint
from sdjax.core.errors import UserError
from sdjax.core.tree import flatten

CLASSES = {
    "sd1": "StableDiffusionPipeline",
    "sd1_inpainting": "StableDiffusionInpaintPipeline",
    "sd2": "StableDiffusionPipeline",
    "sd2_depth": "StableDiffusionDepth2ImgPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl_refiner": "StableDiffusionXLImg2ImgPipeline",
    "x4_upscaler": "StableDiffusionUpscalePipeline",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("source") / "tokenizer"
    return folder, write_tokenizer(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_round_trip_of_each_family(family: str, tokenizer, tmp_path: Path):
    checkpoint = tiny_checkpoint(family, *tokenizer)
    write_checkpoint(tmp_path / "ours", checkpoint)
    # the depth estimator and its processor are no part of the model here; diffusers insists on hearing of them
    left_out = {name: None for name in ("depth_estimator", "feature_extractor") if family == "sd2_depth"}
    assert set(left_out) <= set(absent_parts(checkpoint))
    kind = getattr(diffusers, CLASSES[family])
    generic = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours", local_files_only=True, **left_out)
    assert type(generic) is kind, "model_index.json names the class"
    theirs = kind.from_pretrained(tmp_path / "ours", local_files_only=True, **left_out)
    assert theirs.unet.config.in_channels == checkpoint.components["unet"].config.in_channels
    theirs.save_pretrained(tmp_path / "theirs")
    found = read_folder(tmp_path / "theirs")
    assert_same(checkpoint, found)
    assert found.model_index["_class_name"] == CLASSES[family]
    assert (found.low_res_scheduler is None) == (family != "x4_upscaler")
    if family.startswith("sdxl"):
        refines = family == "sdxl_refiner"
        assert found.model_index["force_zeros_for_empty_prompt"] is not refines
        assert found.model_index.get("requires_aesthetics_score", False) is refines
        entry = json.loads((tmp_path / "ours" / "model_index.json").read_text())["text_encoder"]
        assert (entry == [None, None]) is refines


def test_the_index_of_a_folder_is_kept(tokenizer, tmp_path: Path):
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": False, "add_watermarker": None}
    checkpoint = dataclasses.replace(tiny_checkpoint("sdxl", *tokenizer), model_index=index)
    write_checkpoint(tmp_path / "model", checkpoint)
    assert read_folder(tmp_path / "model").model_index == index


def test_each_network_has_its_own_type_and_place(tokenizer, tmp_path: Path):
    write_checkpoint(tmp_path / "model", tiny_checkpoint("sdxl", *tokenizer), "float16")
    seen: dict[str, np.ndarray] = {}

    def place(array: np.ndarray, path: str) -> str:
        seen[path] = array
        return path

    found = read_folder(tmp_path / "model", {"vae": "float32", "unet": "bfloat16"}, place=place)
    for name, component in found.components.items():
        flat = flatten(component.params)
        assert all(leaf == f"{name}/{key}" for key, leaf in flat.items())
    types = {"unet": "bfloat16", "vae": "float32", "text_encoder": "float16", "text_encoder_2": "float16"}
    assert all(array.dtype == types[path.split("/")[0]] for path, array in seen.items())


def test_stored_types_are_kept_when_none_is_asked_for(tokenizer, tmp_path: Path):
    checkpoint = tiny_checkpoint("sd1", *tokenizer)
    write_checkpoint(tmp_path / "half", checkpoint, "float16")
    write_checkpoint(tmp_path / "again", read_folder(tmp_path / "half", None), None)
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        file = f"{name}.safetensors"
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "half" / file).read_bytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"components": {}}, "no text encoder"),
        ({"tokenizers": {"text_encoder": Path()}}, "text_encoder_2 without its tokenizer_2"),
        ({"low_res_scheduler": {}}, "low_res_scheduler config has no _class_name"),
    ],
)
def test_an_incomplete_checkpoint_is_not_written(changes: dict, words: str, tokenizer, tmp_path: Path):
    checkpoint = dataclasses.replace(tiny_checkpoint("sdxl", *tokenizer), scheduler=DDIM, **changes)
    with pytest.raises(UserError, match=words):
        write_checkpoint(tmp_path / "model", checkpoint)
    assert not list(tmp_path.iterdir())
