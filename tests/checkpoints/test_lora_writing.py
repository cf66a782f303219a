"""Written files of LoRA: peft builds the same layers from them, and both namings are read back as they were."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import zoo
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from sdjax.checkpoints.checkpoint import Checkpoint, Component
from sdjax.checkpoints.lora.names import layers_of
from sdjax.checkpoints.lora.reading import entry_of, hash_of, read_lora
from sdjax.checkpoints.lora.writing import write_lora
from sdjax.checkpoints.networks import unet
from sdjax.checkpoints.storage.safetensors import data_section
from sdjax.checkpoints.storage.weights import read_file
from sdjax.core.errors import UserError
from sdjax.models.weight_changes import differences, to_torch

PATHS = (
    "unet/down_blocks_0_attentions_0/transformer_blocks_0/attn1/to_q",
    "unet/down_blocks_0_attentions_0/proj_in",
    "unet/down_blocks_0_resnets_0/conv1",
    "unet/up_blocks_1_resnets_0/conv_shortcut",
    "text_encoder/layers_0/fc1",
)


@pytest.fixture(scope="module")
def checkpoint():
    parts = {"unet": zoo.UNETS["sd1"], "text_encoder": zoo.clip_text(500, 499)}
    return Checkpoint(components={name: Component(config, {}) for name, config in parts.items()}, scheduler={})


@pytest.fixture(scope="module")
def layers(checkpoint):
    return layers_of({name: part.config for name, part in checkpoint.components.items()})


def factors_of(layers, *, dora: bool = False, core: bool = False, alpha: float | None = None):
    """Random ones, of a rank and, unless they share it, an alpha for each layer."""
    rng, found = np.random.default_rng(0), {}
    for rank, path in enumerate(PATHS, 2):
        *taps, inputs, outputs = layers[path].kernel.shape
        shapes = {"down": (*taps, inputs, rank), "up": (rank, outputs)}
        if core and taps == [3, 3]:
            shapes |= {"down": (1, 1, inputs, rank), "mid": (3, 3, rank, rank)}
        found[path] = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        found[path]["scale"] = np.float32(alpha / rank if alpha else 0.5 if rank % 2 else 0.7)
        if dora:
            found[path]["magnitude"] = rng.standard_normal(outputs, np.float32) ** 2
    return found


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
@pytest.mark.parametrize("dora", [False, True])
def test_read_back(naming, dora, checkpoint, layers, tmp_path):
    factors, path = factors_of(layers, dora=dora), tmp_path / "a.safetensors"
    write_lora(path, checkpoint, factors, naming)
    file = read_lora(path, layers)
    assert set(file.layers) == set(factors)
    assert not file.unmatched
    for name, entry in factors.items():
        found = entry_of(file, layers[name])
        if "dora_scale" in found:  # kohya's name and shape
            found["magnitude"] = found.pop("dora_scale")[:, 0]
        assert set(found) == set(entry)
        for leaf, array in entry.items():
            np.testing.assert_allclose(found[leaf], array, rtol=1e-6)


def test_a_convolutions_core(checkpoint, layers, tmp_path):
    """Kept by kohya's naming, and in the first factor by diffusers', which has none."""
    factors, made = factors_of(layers, core=True), {}
    kernel = {"kernel": np.zeros(layers[PATHS[2]].kernel.shape, np.float32)}
    for naming in ("kohya", "diffusers"):
        path = tmp_path / f"{naming}.safetensors"
        write_lora(path, checkpoint, factors, naming)
        entry = entry_of(read_lora(path, layers), layers[PATHS[2]])
        assert ("mid" in entry) == (naming == "kohya")
        made[naming] = differences(kernel, entry, 1.0)["kernel"]
    np.testing.assert_allclose(made["kohya"], made["diffusers"], atol=1e-4)


@pytest.mark.parametrize(("naming", "dora"), [("kohya", False), ("diffusers", False), ("diffusers", True)])
def test_diffusers_reads(naming, dora, checkpoint, layers, tmp_path):
    """The difference that peft makes of each layer's factors, alphas included; of kohya's DoRA it drops the lengths.

    Of kohya's files diffusers 0.42 reads one alpha for all layers of attention.
    """
    path, alpha = tmp_path / "a.safetensors", 1.5 if naming == "kohya" else None
    factors = factors_of(layers, dora=dora, alpha=alpha)
    write_lora(path, checkpoint, factors, naming)
    network = UNet2DConditionModel(**unet.to_diffusers_config(zoo.UNETS["sd1"]))
    tensors, alphas, metadata = StableDiffusionPipeline.lora_state_dict(path, return_lora_metadata=True)
    StableDiffusionPipeline.load_lora_into_unet(tensors, alphas, network, metadata=metadata)
    (adapter,) = network.peft_config
    modules = dict(network.named_modules())
    for name in PATHS[:-1]:
        module, entry = modules[layers[name].theirs], {n: v for n, v in factors[name].items() if n != "magnitude"}
        made = module.get_delta_weight(adapter).detach().numpy()
        expected = differences({"kernel": np.zeros(layers[name].kernel.shape, np.float32)}, entry, 1.0)["kernel"]
        np.testing.assert_allclose(made, np.reshape(to_torch(expected), made.shape), atol=1e-5)
        if dora:
            lengths = module.lora_magnitude_vector[adapter].weight.detach().numpy()
            np.testing.assert_allclose(lengths.reshape(-1), factors[name]["magnitude"])


def test_metadata(checkpoint, layers, tmp_path):
    """That by which kohya's tools and A1111 tell the base and the rank, and the hash of A1111."""
    path = tmp_path / "a.safetensors"
    write_lora(path, checkpoint, factors_of(layers), "kohya", {"ss_output_name": "style"}, np.float16)
    facts = read_file(path).facts
    assert {name: facts[name] for name in ("ss_v2", "ss_base_model_version", "ss_network_dim", "ss_output_name")} == {
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_network_dim": "2",
        "ss_output_name": "style",
    }
    # Of the one 3x3 convolution, whose rank is 4.
    assert json.loads(facts["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "2.8"}
    assert (
        hash_of(path) == hashlib.sha256(b"".join(data_section(path))).hexdigest()[:12] == facts["sshs_model_hash"][:12]
    )
    assert {tensor.dtype for tensor in read_file(path).tensors.values()} == {np.dtype(np.float16)}


def test_unknown_naming(checkpoint, layers, tmp_path):
    with pytest.raises(UserError, match="unknown naming 'peft'; choose one of: diffusers, kohya"):
        write_lora(tmp_path / "a.safetensors", checkpoint, factors_of(layers), "peft")
