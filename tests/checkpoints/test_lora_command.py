"""python -m sdjax.convert with LoRAs: merged into a model, and extracted from two."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_checkpoints import tiny_checkpoint

from sdjax.checkpoints.layouts.original import TOKENIZER_FOLDERS
from sdjax.checkpoints.layouts.original_writer import write_single_file
from sdjax.checkpoints.lora.extraction import factors_of
from sdjax.checkpoints.lora.writing import write_lora
from sdjax.checkpoints.networks.clip import VOCABULARY
from sdjax.core.errors import UserError

LINEAR = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
CONV = "model.diffusion_model.input_blocks.1.0.in_layers.2"
TEXT = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1"
PATHS = {
    LINEAR: "unet/down_blocks_0_attentions_0/transformer_blocks_0/attn1/to_q",
    CONV: "unet/down_blocks_0_resnets_0/conv1",
    TEXT: "text_encoder/layers_0/fc1",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, and two LoRAs of rank 2 for three of its layers."""
    folder, rng = tmp_path_factory.mktemp("models"), np.random.default_rng(0)
    checkpoint = tiny_checkpoint("sd1", TOKENIZER_FOLDERS / "clip_l", VOCABULARY)
    write_single_file(folder / "base.safetensors", checkpoint, "float32")
    shapes = {LINEAR: ((64, 2), (2, 64)), CONV: ((3, 3, 64, 2), (2, 64)), TEXT: ((64, 2), (2, 256))}
    for name in ("one", "two"):
        factors = {
            PATHS[key]: {
                "down": rng.standard_normal(down, np.float32) / 8,
                "up": rng.standard_normal(up, np.float32),
                "scale": np.float32(0.5),
            }
            for key, (down, up) in shapes.items()
        }
        write_lora(folder / f"{name}.safetensors", checkpoint, factors, "kohya")
    return folder


def products(file) -> dict[str, np.ndarray]:
    """What a file in kohya's naming adds to the three weights, by the formula of its readers."""
    stems = [
        f"lora_unet_{PATHS[LINEAR][5:]}",
        f"lora_unet_{PATHS[CONV][5:]}",
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
    ]
    tensors, found = load_file(file), {}
    for key, stem in zip(PATHS, stems, strict=True):
        stem = stem.replace("/", "_")
        down, up, alpha = (tensors[f"{stem}.{name}"] for name in ("lora_down.weight", "lora_up.weight", "alpha"))
        scale = float(alpha) / len(down)
        found[f"{key}.weight"] = scale * (up.reshape(len(up), -1) @ down.reshape(len(down), -1)).reshape(
            len(up), *down.shape[1:]
        )
    return found


def test_merging(files, convert, tmp_path):
    """Two files at strengths of their own; what they do not name stays bit for bit."""
    convert(
        files / "base.safetensors",
        f"{files}/one.safetensors:0.7",
        files / "two.safetensors",
        tmp_path / "m.safetensors",
    )
    base, merged = load_file(files / "base.safetensors"), load_file(tmp_path / "m.safetensors")
    one, two = (products(files / f"{name}.safetensors") for name in ("one", "two"))
    assert base.keys() == merged.keys()
    for name, array in base.items():
        if name in one:
            np.testing.assert_allclose(merged[name], array + 0.7 * one[name] + two[name], atol=1e-6)
        else:
            np.testing.assert_array_equal(merged[name], array)


@pytest.mark.parametrize("how", [("--rank=2",), ("--energy=0.9999", "--naming=diffusers")])
def test_extraction(how, files, convert, tmp_path, capsys):
    """A difference of rank 2 is found again, by its rank or as the one that holds its energy, and makes the model."""
    tuned, lora, again = (tmp_path / f"{name}.safetensors" for name in ("tuned", "lora", "again"))
    convert(files / "base.safetensors", files / "one.safetensors", tuned)
    convert(tuned, lora, "--extract_lora", files / "base.safetensors", *how)
    assert "a LoRA of 3 layers, rank 2 to 2" in capsys.readouterr().out
    convert(files / "base.safetensors", lora, again)
    found, expected = load_file(again), load_file(tuned)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=2e-6, err_msg=name)


def test_models_of_a_variant(files, convert, tmp_path):
    """Of both models the files that --variant names are read."""
    for name, loras in {"base": (), "tuned": (files / "one.safetensors",)}.items():
        convert(files / "base.safetensors", *loras, tmp_path / name)
        for file in list((tmp_path / name).rglob("*.safetensors")):
            file.rename(file.with_suffix(".fp16.safetensors"))
    convert(tmp_path / "tuned", tmp_path / "t.safetensors", f"--extract_lora={tmp_path}/base", "--variant=fp16")
    assert len(load_file(tmp_path / "t.safetensors")) == 9


def test_factors_are_the_best_of_their_rank():
    """Eckart & Young (1936): what they leave is the singular values beyond."""
    difference = np.random.default_rng(0).standard_normal((3, 3, 4, 10), np.float32)
    values = np.linalg.svd(difference.reshape(-1, 10), compute_uv=False)
    made = factors_of(difference, 4, None)
    left = np.linalg.norm(difference - made["down"] @ made["up"])
    np.testing.assert_allclose(left, np.linalg.norm(values[4:]), rtol=1e-5)
    for share in (0.3, 0.8, 1.0):
        rank = len(factors_of(difference, 100, share)["up"])
        kept = np.cumsum(values**2) / np.sum(values**2)
        assert kept[rank - 1] >= share - 1e-6
        assert rank == 1 or kept[rank - 2] < share
    assert factors_of(difference, 2, 0.99)["up"].shape == (2, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("base.safetensors", "missing.safetensors:0.5", "t.safetensors"), "missing.safetensors"),
        (("base.safetensors", "t.safetensors", "--rank=4"), "--rank changes nothing without --extract_lora BASE"),
        (("base.safetensors", "t.safetensors", "--extract_lora=base.safetensors"), "the same weights"),
        (("base.safetensors", "t", "--extract_lora=base.safetensors"), "a LoRA is written as .safetensors"),
        (
            ("base.safetensors", "t.safetensors", "--extract_lora=none", "--naming=peft"),
            "unknown naming 'peft' in --naming",
        ),
        (("base.safetensors", "one.safetensors", "t.safetensors", "--extract_lora=base.safetensors"), "without LoRAs"),
    ],
)
def test_faults(arguments, message, files, convert, tmp_path, monkeypatch):
    monkeypatch.chdir(files)
    with pytest.raises(UserError) as error:
        convert(*(str(tmp_path / part) if part in ("t", "t.safetensors") else part for part in arguments))
    assert message in str(error.value)
