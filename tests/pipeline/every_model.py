"""A tiny model of every kind that can be sampled, and the options that it is called with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zoo
from PIL import Image
from tiny_checkpoints import random_params, tiny_checkpoint, tiny_if, write_tokenizer

from sdjax.checkpoints.checkpoint import ALL_FORMATS, Checkpoint, Component
from sdjax.checkpoints.families import FAMILIES
from sdjax.checkpoints.layouts.diffusers import write_checkpoint, write_component
from sdjax.data.text.tokenizer_training import train_unigrams, train_word_pieces
from sdjax.data.text.word_pieces import load_word_pieces
from sdjax.models.controlnet import config_for
from sdjax.models.embedders import ClassEmbedderConfig, RescalerConfig

DDIM = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1}
V = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
SIDE, FACTOR = zoo.SIDE, 4
STEPS = 3


class Kind(NamedTuple):
    """A kind of model.

    Attributes:
        make: (folder, files) -> None; writes the checkpoint.
        prompt: of a call; None for models that take none.
        options: of a call, as flags have them.
        load: further sources that it is loaded with.
    """

    make: Any
    prompt: str | None
    options: dict[str, Any]
    load: dict[str, str] = {}  # noqa: RUF012


def _family(name: str, **scheduler: Any) -> Any:
    def make(folder: Path, files: dict[str, Path]) -> None:
        size = len(json.loads((files["tokenizer"] / "vocab.json").read_text()))
        made = tiny_checkpoint(name, files["tokenizer"], size)
        if scheduler:
            made = dataclasses.replace(made, scheduler={**made.scheduler, **scheduler})
        write_checkpoint(folder, made)

    return make


def _made(conditioning: str, unet: Any, others: Any = None, settings: Any = None, *, pixels: bool = False) -> Any:
    def make(folder: Path, files: dict[str, Path]) -> None:
        sizes = {"unet": unet, **({} if pixels else {"vae": zoo.VAES["vq_f4"]}), **(others or {})}
        side = SIDE if pixels else SIDE // FACTOR
        parts = {
            name: Component(
                size, random_params(ALL_FORMATS[name].shapes(size), i), {"sample_size": side} if name == "unet" else {}
            )
            for i, (name, size) in enumerate(sizes.items())
        }
        own = settings or {}
        tokenizers = {}
        if conditioning == "text_bert":
            tokenizers = {"bert": files["words"]}
            words = load_word_pieces(files["words"], zoo.BERT.max_length)
            own = {"nothing": words.encode([""])[0].tolist()}
        scheduler = FAMILIES["adm_256"].scheduler if pixels else DDIM
        write_checkpoint(
            folder,
            Checkpoint(
                components=parts, scheduler=scheduler, conditioning=conditioning, settings=own, tokenizers=tokenizers
            ),
        )

    return make


def _if(stage: str) -> Any:
    return lambda folder, files: write_checkpoint(folder, tiny_if(stage, files["unigrams"]))


def _concat(channels: int) -> Any:
    return dataclasses.replace(zoo.LDM, in_channels=3 + channels)


EMPTY_LAYOUT = [399] * 9 + [0, 399]
KINDS = {
    "sd1": Kind(_family("sd1"), "a red heart", {"guidance_scale": 3.0}),
    "controlled": Kind(
        _family("sd1"),
        "a red heart",
        {"control_image": "image", "control_mode": "guess", "guidance_scale": 3.0},
        {"controlnet": "controlnet"},
    ),
    "sd2_v": Kind(_family("sd2", **V), "a red heart", {"guidance_scale": 3.0}),
    "sdxl": Kind(_family("sdxl"), "a red heart", {"guidance_scale": 3.0, "crop": (2, 3)}),
    "sdxl_refiner": Kind(_family("sdxl_refiner"), "a cat", {"guidance_scale": 3.0, "aesthetic_score": 4.0}),
    "sd1_inpainting": Kind(_family("sd1_inpainting"), "a cat", {"init_image": "image", "mask": "mask"}),
    "x4_upscaler": Kind(_family("x4_upscaler"), "a cat", {"init_image": "half", "noise_level": 4}),
    "sd2_depth": Kind(_family("sd2_depth"), "a cat", {"depth": "image", "guidance_scale": 3.0}),
    "unconditional": Kind(_made("unconditional", zoo.LDM), None, {}),
    "class_conditional": Kind(
        _made(
            "class_conditional",
            zoo.ldm_unet(32),
            {"class_embedder": ClassEmbedderConfig(3, 32)},
            {"none": 2, "classes": ["cat", "dog"]},
        ),
        None,
        {"class_label": "dog", "guidance_scale": 3.0},
    ),
    "text_bert": Kind(_made("text_bert", zoo.ldm_unet(32), {"bert": zoo.BERT}), "a dog", {"guidance_scale": 3.0}),
    "if_i": Kind(_if("if_i"), "a red heart", {"guidance_scale": 3.0}),
    "if_ii": Kind(_if("if_ii"), "a cat", {"init_image": "half", "noise_level": 4}),
    "layout": Kind(
        _made("layout", zoo.ldm_unet(32), {"bert": zoo.BERT}, {"nothing": EMPTY_LAYOUT, "classes": ["cat", "dog"]}),
        None,
        {"layout": "layout", "guidance_scale": 3.0},
    ),
    "semantic_synthesis": Kind(
        _made("semantic_synthesis", _concat(3), {"rescaler": RescalerConfig(4)}), None, {"label_map": "labels"}
    ),
    "super_resolution": Kind(_made("super_resolution", _concat(3)), None, {"init_image": "quarter"}),
    "inpainting": Kind(_made("inpainting", _concat(4)), None, {"init_image": "image", "mask": "mask"}),
    "retrieval": Kind(_made("retrieval", zoo.ldm_unet(24)), None, {"neighbours": "neighbours", "guidance_scale": 3.0}),
    "adm": Kind(_made("class_conditional", zoo.ADM, pixels=True), None, {"class_label": 3}),
    "adm_classifier": Kind(
        _made("class_conditional", zoo.ADM, pixels=True),
        None,
        {"class_label": 3, "classifier_scale": 2.0},
        {"classifier": "classifier"},
    ),
}


def write_files(folder: Path) -> dict[str, Path]:
    """Files that options name, the tokenizers, a classifier, and a ControlNet."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    names = ("image", "half", "quarter", "mask", "labels")
    files = {name: folder / f"{name}.png" for name in names}
    for name, side in zip(names[:3], (SIDE, SIDE // 2, SIDE // 4), strict=True):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(files[name])
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[4:12, 4:12] = 255
    Image.fromarray(mask).save(files["mask"])
    Image.fromarray(rng.integers(0, 4, (SIDE, SIDE)).astype(np.uint8)).save(files["labels"])
    files |= {"layout": folder / "layout.json", "neighbours": folder / "neighbours.npy"}
    files["layout"].write_text(json.dumps([{"class": "dog", "box": [0.1, 0.2, 0.5, 0.5]}]))
    np.save(files["neighbours"], rng.standard_normal((5, 24)).astype(np.float32))
    files |= {"tokenizer": folder / "tokenizer", "words": folder / "words", "classifier": folder / "classifier"}
    write_tokenizer(files["tokenizer"])
    train_word_pieces(["a red heart", "a big blue dog"], files["words"], 80)
    files["unigrams"] = folder / "unigrams"
    files["unigrams"].mkdir()
    train_unigrams(["a red heart", "a big blue dog"], files["unigrams"], 80)
    guide = Component(zoo.CLASSIFIER, random_params(ALL_FORMATS["classifier"].shapes(zoo.CLASSIFIER), 5))
    write_component(files["classifier"] / "classifier", "classifier", guide)
    files["controlnet"] = folder / "controlnet"
    sizes = config_for(zoo.UNETS["sd1"], zoo.FACTOR)
    net = Component(sizes, random_params(ALL_FORMATS["controlnet"].shapes(sizes), 6))
    write_component(files["controlnet"], "controlnet", net)
    return files


def options_of(kind: Kind, files: dict[str, Path]) -> dict[str, Any]:
    """Options of a call, with the names of files in place of what stands for them."""
    return {
        name: str(files[value]) if isinstance(value, str) and value in files else value
        for name, value in kind.options.items()
    }


def sources_of(kind: Kind, files: dict[str, Path]) -> dict[str, str]:
    """Options of `sdjax.load`."""
    return {name: str(files[value]) for name, value in kind.load.items()}


def flags_of(kind: Kind, files: dict[str, Path], folder: Path) -> list[str]:
    """Flags of sample.py for this kind, without its prompt."""
    values = {"checkpoint": folder, **sources_of(kind, files), **options_of(kind, files)}
    flags = [f"--{n}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for n, v in values.items()]
    return [f"--config={Path(__file__).parent / 'plain_config.py'}", f"--steps={STEPS}", "--batch_size=2", *flags]
