"""LoRAs in whole pipelines against PyTorch diffusers and peft: |difference| of images below 1e-3."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zoo
from safetensors.torch import save_file

import sdjax

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")

TOLERANCE = 1e-3
PROMPTS = ["red heart", "a painting of a dog"]
HOW = {"guidance_scale": 5.0}
STEPS = 3
PIPELINES = {"sd1": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def to_torch(noise: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())


def layers_of(pipe) -> dict[str, torch.nn.Module]:
    """The layers that kohya's default and convolutional targets name, by diffusers' names."""
    parts = {name: getattr(pipe, name, None) for name in ("unet", "text_encoder", "text_encoder_2")}
    targets = {"unet": TARGETS, "text_encoder": TEXT_TARGETS, "text_encoder_2": TEXT_TARGETS}
    return {
        f"{part}.{name}": module
        for part, network in parts.items()
        if network is not None
        for name, module in network.named_modules()
        if any(f".{name}".endswith(f".{target}") for target in targets[part])
        and isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }


def kohya(pipe, seed: int, rank: int = 2) -> dict[str, torch.Tensor]:
    """A file's tensors in kohya's naming, with alphas that are not the rank."""
    draw = torch.Generator().manual_seed(seed)
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
    if getattr(pipe, "text_encoder_2", None) is not None:
        prefixes["text_encoder"] = "lora_te1"
    tensors = {}
    for i, (name, module) in enumerate(layers_of(pipe).items()):
        part, _, path = name.partition(".")
        path = path if part == "unet" or path.startswith("text_model.") else f"text_model.{path}"
        stem, shape = f"{prefixes[part]}_{path.replace('.', '_')}", module.weight.shape
        own = rank + i % 2
        ones = [1] * (len(shape) - 2)
        tensors[f"{stem}.lora_down.weight"] = torch.randn(own, *shape[1:], generator=draw) / shape[1:].numel() ** 0.5
        tensors[f"{stem}.lora_up.weight"] = torch.randn(shape[0], own, *ones, generator=draw) * 0.3
        tensors[f"{stem}.alpha"] = torch.tensor(1.5)
    return tensors


@pytest.fixture(scope="session")
def lora_files(tmp_path_factory, in_diffusers):
    """lora_files(family, seed): a file in kohya's naming."""
    folder, made = tmp_path_factory.mktemp("loras"), {}

    def write(family: str, seed: int = 0):
        path = folder / f"{family}_{seed}.safetensors"
        if path not in made:
            save_file(kohya(in_diffusers(PIPELINES[family], family), seed), path)
            made[path] = True
        return path

    return write


@pytest.fixture
def with_loras(in_diffusers, monkeypatch):
    """with_loras(family, files, weights): diffusers' images with LoRAs, which are taken out again."""
    # The newest peft of PyPI is older than what transformers asks for, and does all the same.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda *a, **k: None)

    def images(family: str, files, weights, noise: np.ndarray) -> np.ndarray:
        pipe = in_diffusers(PIPELINES[family], family)
        names = [f"lora{i}" for i in range(len(files))]
        try:
            for name, file in zip(names, files, strict=True):
                pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
            pipe.set_adapters(names, weights)
            size = {"width": zoo.SIDE, "height": zoo.SIDE}
            given = {"num_inference_steps": STEPS, "latents": to_torch(noise), "output_type": "np", **size, **HOW}
            return pipe(PROMPTS, **given).images
        finally:
            pipe.unload_lora_weights()

    return images


def check(ours, theirs, base):
    assert np.abs(theirs - base).max() > 0.05, "the LoRA changes nothing"
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.parametrize("family", PIPELINES)
def test_strengths(family, folders, lora_files, with_loras, noise, compilations):
    """At 0.5, 1 and 1.3 and two stacked; strengths compile nothing, and 0 is the base to the bit."""
    files = [lora_files(family, 0), lora_files(family, 1)]
    pipe = sdjax.load(folders(family), lora=[f"{files[0]}:0.5", files[1]])
    how = {"steps": STEPS, "latents": noise, "width": zoo.SIDE, "height": zoo.SIDE, **HOW}
    base = pipe(PROMPTS, lora_scale=0, **how)
    np.testing.assert_array_equal(base, sdjax.load(folders(family))(PROMPTS, **how))
    compilations.clear()
    for scale in (0.5, 1.0, 1.3):
        check(pipe(PROMPTS, lora_scale=[scale, 0], **how), with_loras(family, files[:1], [scale], noise), base)
    both = with_loras(family, files, [0.5, 1.0], noise)
    check(pipe(PROMPTS, **how), both, base)
    assert not compilations
