"""Files of ControlNets, checked against the converter of PyTorch diffusers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from tiny_checkpoints import tiny_checkpoint
from torch_reference import drawn

from sdjax.checkpoints.checkpoint import Component
from sdjax.checkpoints.controlnets import read_controlnet, write_controlnet_file
from sdjax.checkpoints.layouts.diffusers import read_component, write_checkpoint, write_component
from sdjax.checkpoints.layouts.original import TOKENIZER_FOLDERS
from sdjax.checkpoints.mapping import export
from sdjax.checkpoints.networks import controlnet
from sdjax.checkpoints.networks.clip import VOCABULARY
from sdjax.core.errors import UserError
from sdjax.core.tree import flatten
from sdjax.models.controlnet import config_for

FAMILIES = ("sd1", "sd2", "sdxl")
FACTOR = 8  # as all published ones have it


def component(family: str, seed: int = 0, **changes: Any) -> Component:
    config = replace(config_for(zoo.UNETS[family], FACTOR), **changes)
    return Component(config, drawn(controlnet.shapes(config), seed))


def exported(net: Component) -> dict[str, np.ndarray]:
    return export(controlnet.table(net.config), net.params, controlnet.shapes(net.config), "net")


def assert_same(one: Component, other: Component) -> None:
    assert one.config == other.config
    found, wanted = flatten(one.params), flatten(other.params)
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_original_naming_is_that_of_diffusers_converter(family: str, tmp_path: Path):
    net = component(family)
    write_controlnet_file(tmp_path / "net.safetensors", net)
    file = load_torch(tmp_path / "net.safetensors")
    assert all(key.startswith("control_model.") for key in file)
    # The converter leaves out SDXL's vector.
    own = {f"control_model.label_emb.0.{i}": f"add_embedding.linear_{1 + i // 2}" for i in (0, 2) if family == "sdxl"}
    converted = convert_controlnet_checkpoint(dict(file), controlnet.to_diffusers_config(net.config))
    converted |= {f"{new}.{kind}": file[f"{old}.{kind}"] for old, new in own.items() for kind in ("weight", "bias")}
    wanted = exported(net)
    assert converted.keys() == wanted.keys()
    for key, array in wanted.items():
        np.testing.assert_array_equal(converted[key], array, err_msg=key)
    assert_same(read_controlnet(tmp_path / "net.safetensors"), net)


@pytest.mark.parametrize("family", FAMILIES)
def test_files_of_every_form_are_read(family: str, tmp_path: Path):
    """Without the prefix, beside the model that it was trained on, and in diffusers' naming without a config."""
    net = component(family)
    write_controlnet_file(tmp_path / "net.safetensors", net)
    file = load_file(tmp_path / "net.safetensors")
    others = {"model.diffusion_model.out.2.weight": np.zeros(2, np.float32), "cond_stage_model.x": np.zeros(1)}
    forms = {
        "bare": {key.removeprefix("control_model."): array for key, array in file.items()},
        "whole": file | others,
        "diffusers": {key: np.ascontiguousarray(array) for key, array in exported(net).items()},
    }
    for name, tensors in forms.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        assert_same(read_controlnet(tmp_path / f"{name}.safetensors"), net)


def test_a_file_named_shuffle_averages(tmp_path: Path):
    pooled = component("sd1", global_pool=True)
    write_controlnet_file(tmp_path / "control_v11e_sd15_shuffle.safetensors", pooled)
    assert_same(read_controlnet(tmp_path / "control_v11e_sd15_shuffle.safetensors"), pooled)
    with pytest.raises(UserError, match="cannot say a ControlNet's global_pool; write a folder"):
        write_controlnet_file(tmp_path / "other.safetensors", pooled)
    with pytest.raises(UserError, match="cannot say a ControlNet's bgr; write a folder"):
        write_controlnet_file(tmp_path / "other.safetensors", component("sd1", bgr=True))


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("lora_controlnet", "looks like a control-LoRA"),
        ("difference", "looks like the difference to a base model's weights"),
        ("control_add_embedding.linear_1.weight", "looks like a ControlNet-Union"),
        ("down_blocks.0.ctrl_to_base.0.weight", "looks like a ControlNet-XS"),
        ("lllite_unet_input_blocks_4_1.conditioning1.0.weight", "looks like a ControlNet-LLLite"),
        ("adapter.body.0.in_conv.weight", "looks like a T2I-Adapter"),
        ("controlnet_x_embedder.weight", "looks like one of Flux or of SD 3"),
        ("something.weight", "has none of controlnet_cond_embedding.conv_in.weight, input_hint_block.0.weight"),
    ],
)
def test_other_kinds_are_refused(key: str, said: str, tmp_path: Path):
    save_file({key: np.zeros((2, 2), np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError) as error:
        read_controlnet(tmp_path / "x.safetensors")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_round_trip_of_the_command_is_bit_identical(convert, tmp_path: Path, capsys):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    write_controlnet_file(first, component("sd2"), "float16")
    convert(first, tmp_path / "folder")
    convert(tmp_path / "folder", second)
    assert second.read_bytes() == first.read_bytes()
    assert capsys.readouterr().out.count("a ControlNet of Stable Diffusion 2") == 2
    with pytest.raises(UserError, match=r"--family sd1 is not for .*first.safetensors; what is: --dtype"):
        convert(first, tmp_path / "third", "--family=sd1")


def test_control_goes_to_another_base(convert, tmp_path: Path):
    """p + (new - old) where the encoder was copied, from a UNet of nine channels, too; the rest as it is."""
    bases = {}
    for name, family in {"old": "sd1", "new": "sd1_inpainting", "other": "sdxl"}.items():
        bases[name] = tiny_checkpoint(family, TOKENIZER_FOLDERS / "clip_l", VOCABULARY)
        write_checkpoint(tmp_path / name, bases[name])
    net = component("sd1")
    write_component(tmp_path / "net", "controlnet", net)
    convert(tmp_path / "net", tmp_path / "moved", f"--control_transfer={tmp_path / 'old'},{tmp_path / 'new'}")
    moved = flatten(read_component(tmp_path / "moved", "controlnet").params)
    old, new = (flatten(bases[name].components["unet"].params) for name in ("old", "new"))
    for name, leaf in flatten(net.params).items():
        if name.startswith("controlnet_"):
            np.testing.assert_array_equal(moved[name], leaf)
        else:
            cut = new[name][:, :, :4] if name == "conv_in/kernel" else new[name]
            np.testing.assert_allclose(moved[name], leaf + (np.asarray(cut) - old[name]), atol=1e-6)
    with pytest.raises(UserError, match=r"--control_transfer .*: the ControlNet's .* is"):
        convert(tmp_path / "net", tmp_path / "x", f"--control_transfer={tmp_path / 'old'},{tmp_path / 'other'}")
