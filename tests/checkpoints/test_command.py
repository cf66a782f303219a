"""python -m sdjax.convert: from one layout to another and back, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from faults import full_disk
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from tiny_checkpoints import tiny_checkpoint

from sdjax.checkpoints.layouts.diffusers import read_component, read_folder, write_checkpoint
from sdjax.checkpoints.layouts.original import TOKENIZER_FOLDERS, read_single_file
from sdjax.checkpoints.layouts.original_writer import write_single_file
from sdjax.checkpoints.networks.clip import VOCABULARY
from sdjax.checkpoints.open import read_checkpoint
from sdjax.core.errors import UserError

PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl_refiner": "StableDiffusionXLImg2ImgPipeline",
}


def original(path: Path, family: str, dtype: str) -> Path:
    write_single_file(path, tiny_checkpoint(family, TOKENIZER_FOLDERS / "clip_l", VOCABULARY), dtype)
    return path


@pytest.mark.parametrize(
    ("family", "dtype"), zip(PIPELINES, ("float16", "float32", "float16", "bfloat16"), strict=True)
)
def test_a_round_trip_is_bit_identical(family: str, dtype: str, convert, tmp_path: Path, capsys):
    first = original(tmp_path / "first.safetensors", family, dtype)
    convert(first, tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "second.safetensors")
    assert (tmp_path / "second.safetensors").read_bytes() == first.read_bytes()
    assert f"first.safetensors: {'the refiner' if family == 'sdxl_refiner' else ''}" in capsys.readouterr().out


@pytest.mark.parametrize("family", PIPELINES)
def test_diffusers_loads_the_files_tensors(family: str, convert, tmp_path: Path):
    first = original(tmp_path / "first.safetensors", family, "float16")
    convert(first, tmp_path / "folder")
    pipe = getattr(diffusers, PIPELINES[family]).from_pretrained(tmp_path / "folder", local_files_only=True)
    # one tensor that is stored as it is in both layouts, at the end of a chain of renamings
    ours = load_file(first)["model.diffusion_model.out.2.weight"]
    np.testing.assert_array_equal(pipe.unet.conv_out.weight.detach().numpy(), ours.astype(np.float32))
    pads = {"tokenizer": 0 if family == "sd2" else 49407, "tokenizer_2": 0}
    tokenizers = {name: getattr(pipe, name, None) for name in pads}
    found = {name: tokenizer.pad_token_id for name, tokenizer in tokenizers.items() if tokenizer is not None}
    assert found == {name: pads[name] for name in found}
    assert len(found) == (2 if family == "sdxl" else 1)


def test_types_families_and_predictions_as_asked(convert, tmp_path: Path, capsys):
    first = original(tmp_path / "first.safetensors", "sd2", "float32")
    convert("--dtype", "float16", first, tmp_path / "folder", "--prediction=v")
    assert "Stable Diffusion 2; predicts v_prediction (as requested)" in capsys.readouterr().out
    found = read_folder(tmp_path / "folder", None)
    assert found.components["unet"].params["conv_in"]["kernel"].dtype == np.float16
    assert found.scheduler["prediction_type"] == "v_prediction"
    convert(tmp_path / "folder", tmp_path / "second.safetensors", "--prediction", "epsilon")
    assert read_single_file(tmp_path / "second.safetensors").scheduler["prediction_type"] == "epsilon"


def test_an_autoencoder_alone(convert, tmp_path: Path):
    whole = load_torch(original(tmp_path / "whole.safetensors", "sdxl", "float16"))
    stem = "first_stage_model."
    file = {key.removeprefix(stem): tensor for key, tensor in whole.items() if key.startswith(stem)}
    save_torch(file, tmp_path / "vae.safetensors")
    convert(tmp_path / "vae.safetensors", tmp_path / "vae", "--family=sdxl")
    assert read_component(tmp_path / "vae", "vae").config.scaling_factor == 0.13025
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae", local_files_only=True)
    assert torch.equal(theirs.decoder.conv_in.weight, file["decoder.conv_in.weight"].float())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{source}",), "TARGET is missing"),
        (("{source}", "a", "b"), "there is no file or folder 'a'"),
        (("{source}", "{tmp}/x.ckpt"), r"written as \.safetensors"),
        (("{tmp}/none.safetensors", "{tmp}/x"), "no file or folder"),
        (("{source}", "{mine}"), "was not written by sdjax"),
        (("{source}", "{tmp}/x", "--dtype=int4"), "unknown dtype 'int4'"),
        (("{source}", "{tmp}/x", "--family=sd9"), "unknown family 'sd9'"),
        (("{folder}", "{tmp}/x", "--family=sd1"), "--family sd1 is not for .*; what is: --dtype, --prediction"),
        (("{folder}", "{tmp}/x", "--prediction=w"), "unknown prediction 'w'"),
        (("{source}", "{tmp}/x", "--size=3"), "size"),
    ],
)
def test_mistakes_are_said_and_nothing_is_written(arguments, words: str, convert, tmp_path: Path):
    source = original(tmp_path / "first.safetensors", "sd1", "float16")
    write_checkpoint(tmp_path / "folder", read_single_file(source))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("text")
    before = sorted(tmp_path.rglob("*"))
    places = {"source": source, "tmp": tmp_path, "mine": tmp_path / "mine", "folder": tmp_path / "folder"}
    with pytest.raises(UserError, match=words):
        convert(*(argument.format(**places) for argument in arguments))
    assert sorted(tmp_path.rglob("*")) == before


TARGETS = ("folder", "second.safetensors")


@pytest.mark.parametrize("target", TARGETS)
def test_a_full_disk_leaves_nothing_and_the_same_command_goes_on(target: str, convert, tmp_path: Path):
    first = original(tmp_path / "first.safetensors", "sd1", "float16")
    for nbytes in (0, 1000, 100_000):
        message = "cannot write .*: File too large; make room and run the same command again"
        with full_disk(nbytes), pytest.raises(UserError, match=message):
            convert(first, tmp_path / target)
        assert [path.name for path in tmp_path.iterdir()] == [first.name]
    convert(first, tmp_path / target)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([first.name, target])
    read_checkpoint(tmp_path / target)


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_is_checked_before_the_source_is_read(target: str, convert):
    with pytest.raises(UserError, match="cannot write /proc/sdjax: No such file or directory; choose another place"):
        convert("nowhere", f"/proc/sdjax/{target}")


def test_an_autoencoder_is_converted_whole_or_not_at_all(convert, tmp_path: Path):
    """Its weights are written before its config."""
    whole = load_torch(original(tmp_path / "whole.safetensors", "sd1", "float16"))
    stem = "first_stage_model."
    file = {key.removeprefix(stem): tensor for key, tensor in whole.items() if key.startswith(stem)}
    save_torch(file, tmp_path / "vae.safetensors")
    (tmp_path / "vae").mkdir()
    with full_disk(1000), pytest.raises(UserError, match="make room"):
        convert(tmp_path / "vae.safetensors", tmp_path / "vae")
    assert not list((tmp_path / "vae").iterdir())
    convert(tmp_path / "vae.safetensors", tmp_path / "vae")
    assert read_component(tmp_path / "vae", "vae").config.scaling_factor == 0.18215


def test_the_command_itself(tmp_path: Path):
    source = original(tmp_path / "first.safetensors", "sd1", "float16")
    command = [sys.executable, "-m", "sdjax.convert", str(source), str(tmp_path / "folder")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "Stable Diffusion 1; predicts epsilon (the file's metadata say so)" in done.stdout
    failed = subprocess.run([*command[:3], "nowhere", "x"], capture_output=True, text=True, cwd=root)
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
    assert failed.stderr.startswith("error: there is no file or folder 'nowhere'")
