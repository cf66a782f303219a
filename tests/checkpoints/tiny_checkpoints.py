"""Small checkpoints of every family with random weights, as this library holds them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import zoo

from sdjax.checkpoints.checkpoint import TOKENIZERS, Checkpoint, Component
from sdjax.checkpoints.kinds import CAPTIONS
from sdjax.checkpoints.networks import added_kv_unet, autoencoder, clip, t5, unet
from sdjax.core.tree import flatten, unflatten

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


def tiny_checkpoint(
    family: str, tokenizer: Path, vocab_size: int, length: int = zoo.TOKENS, eos: int | None = None, layers: int = 1
) -> Checkpoint:
    """All networks of a family, `layers` residual blocks a level; `tokenizer` serves both encoders of SDXL."""
    sizes = dataclasses.replace(zoo.UNETS[family], layers_per_block=layers)
    upscaler = family == "x4_upscaler"
    vae = zoo.VAES["sdxl" if family.startswith("sdxl") else family if upscaler else "sd"]
    eos = vocab_size - 1 if eos is None else eos
    parts = {
        "unet": Component(sizes, random_params(unet.shapes(sizes), 0), {"sample_size": 8}),
        "vae": Component(vae, random_params(autoencoder.shapes(vae), 1), {"sample_size": 16}),
    }
    if family != "sdxl_refiner":
        text = zoo.clip_text(vocab_size, eos, length, open_clip=family.startswith("sd2") or upscaler)
        parts["text_encoder"] = Component(text, random_params(clip.shapes(text), 2))
    if family.startswith("sdxl"):
        text = zoo.clip_text(vocab_size, eos, length, projects=True, open_clip=True)
        parts["text_encoder_2"] = Component(text, random_params(clip.shapes(text), 3))
    return Checkpoint(
        components=parts,
        scheduler=EULER if family.startswith("sdxl") else DDIM,
        tokenizers={name: tokenizer for name in TOKENIZERS if name in parts},
        low_res_scheduler={"_class_name": "DDPMScheduler", **BETAS, "beta_end": 0.02} if upscaler else None,
    )


COSINE = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"}
# Of stage I's released folder; stage II's differs in the greatest value.
IF_SCHEDULER = COSINE | {
    **{"beta_start": 0.0001, "beta_end": 0.02, "num_train_timesteps": 1000, "variance_type": "learned_range"},
    **{"clip_sample": True, "thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5},
}


def tiny_if(stage: str, tokenizer: Path, length: int = zoo.TOKENS) -> Checkpoint:
    """DeepFloyd IF's "if_i" or "if_ii", whose captions have `length` tokens here; diffusers has 77 always."""
    upscales, params = stage == "if_ii", random_params(added_kv_unet.shapes(zoo.IF[stage]), 0)
    params["conv_out"]["kernel"] *= 0.1  # or guidance of 7 would double what rounding does in every step
    parts = {
        "unet": Component(zoo.IF[stage], params, {"sample_size": zoo.SIDE}),
        "text_encoder": Component(zoo.T5, random_params(t5.shapes(zoo.T5), 1)),
    }
    return Checkpoint(
        components=parts,
        scheduler=IF_SCHEDULER | ({"sample_max_value": 1.0} if upscales else {}),
        conditioning=CAPTIONS,
        settings={} if length == 77 else {"text_length": length},
        tokenizers={"text_encoder": tokenizer},
        low_res_scheduler=COSINE if upscales else None,
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
