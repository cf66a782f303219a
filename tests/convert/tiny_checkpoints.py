"""Small checkpoints of every family with random weights, as this library holds them.

Widths are multiples of 64 and groups are 32, as in the published models, so that files in the original naming, which
say neither, can be told apart and read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.convert import autoencoder, clip, unet
from sdjax.convert.components import TOKENIZERS, Checkpoint, Component
from sdjax.core.tree import flatten, unflatten
from sdjax.models.autoencoder import AutoencoderConfig
from sdjax.models.clip import CLIPTextConfig
from sdjax.models.unet import UNetConfig

WORDS = ["a", "photo", "of", "red", "heart", "cat"]
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **BETAS}
EULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "steps_offset": 1, **BETAS}
FAMILIES = ("sd1", "sd1_inpainting", "sd2", "sd2_depth", "sdxl", "sdxl_refiner", "x4_upscaler")


def write_tokenizer(folder: Path) -> int:
    """A CLIP tokenizer of single letters and a few words; returns the size of its vocabulary."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    merges = [(word[:i], word[i] + "</w>" * (i == len(word) - 1)) for word in WORDS for i in range(1, len(word))]
    units = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*units, "<|startoftext|>", "<|endoftext|>"]))}
    specials = {"bos_token": "<|startoftext|>", **{f"{n}_token": "<|endoftext|>" for n in ("eos", "unk", "pad")}}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 12, **specials}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(specials))
    return len(vocab)


def random_params(shapes: dict, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape, np.float32)
        if len(shape) == 1:
            return 0.2 * noise + name.endswith("scale")
        return noise / np.sqrt(np.prod(shape[:-1]), dtype=np.float32)

    return unflatten({name: value(name, leaf.shape) for name, leaf in flatten(shapes).items()})


def tiny_unet(family: str) -> UNetConfig:
    """Three levels in SDXL, so that its two kinds of upsampling keys are there, and in the upscaler; two elsewhere."""
    three = family.startswith("sdxl") or family == "x4_upscaler"
    wide_heads = family.startswith(("sd2", "sdxl"))
    return UNetConfig(
        channels=(64, 64, 128) if three else (64, 128),
        depths={"sdxl": (0, 1, 2), "sdxl_refiner": (0, 1, 0), "x4_upscaler": (0, 1, 1)}.get(family, (1, 0)),
        mid_depth=2 if family == "sdxl" else 1,
        heads=tuple([1, 1, 2] if three else [1, 2]) if wide_heads else (8,) * (3 if three else 2),
        context_dim=128 if family == "sdxl" else 64,
        vector_dim={"sdxl": 64 + 6 * 256, "sdxl_refiner": 64 + 5 * 256}.get(family),
        classes=10 if family == "x4_upscaler" else None,
        cross_only=(1,) if family == "x4_upscaler" else (),
        linear_projection=not family.startswith("sd1"),
        in_channels={"sd1_inpainting": 9, "sd2_depth": 5, "x4_upscaler": 7}.get(family, 4),
    )


def tiny_text(vocab_size: int, eos: int, length: int, second: bool, open_clip: bool) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocab_size,
        width=64,
        layers=2,
        heads=1,
        feed_forward=256,
        activation="gelu" if open_clip else "quick_gelu",
        max_length=length,
        projection_dim=64 if second else None,
        eos_token_id=eos,
    )


def tiny_checkpoint(
    family: str, tokenizer: Path, vocab_size: int, length: int = 12, eos: int | None = None
) -> Checkpoint:
    """All networks of a family; `tokenizer` serves both encoders of SDXL."""
    sizes = tiny_unet(family)
    upscaler = family == "x4_upscaler"
    scale = 0.13025 if family.startswith("sdxl") else 0.08333 if upscaler else 0.18215
    vae = AutoencoderConfig(channels=(32, 64), layers_per_block=1, scaling_factor=scale)
    eos = vocab_size - 1 if eos is None else eos
    parts = {
        "unet": Component(sizes, random_params(unet.shapes(sizes), 0), {"sample_size": 8}),
        "vae": Component(vae, random_params(autoencoder.shapes(vae), 1), {"sample_size": 16}),
    }
    if family != "sdxl_refiner":
        text = tiny_text(vocab_size, eos, length, False, family.startswith("sd2") or upscaler)
        parts["text_encoder"] = Component(text, random_params(clip.shapes(text), 2))
    if family.startswith("sdxl"):
        text = tiny_text(vocab_size, eos, length, True, True)
        parts["text_encoder_2"] = Component(text, random_params(clip.shapes(text), 3))
    return Checkpoint(
        components=parts,
        scheduler=EULER if family.startswith("sdxl") else DDIM,
        tokenizers={name: tokenizer for name in TOKENIZERS if name in parts},
        low_res_scheduler={"_class_name": "DDPMScheduler", **BETAS, "beta_end": 0.02} if upscaler else None,
    )


def assert_same(ours: Checkpoint, theirs: Checkpoint) -> None:
    """Configs and parameters, bit for bit."""
    assert theirs.components.keys() == ours.components.keys()
    for name, component in ours.components.items():
        other = theirs.components[name]
        assert other.config == component.config
        expected, found = flatten(component.params), flatten(other.params)
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_array_equal(found[key], array, err_msg=f"{name}/{key}", strict=True)
