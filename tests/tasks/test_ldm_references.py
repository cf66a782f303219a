"""Models of the LDM paper beside independent assemblies in PyTorch, from the weights to the images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import ldm_torch
import numpy as np
import pytest
import torch
import zoo
from torch_reference import drawn

import sdjax
from sdjax.checkpoints.checkpoint import ALL_FORMATS, Checkpoint, Component
from sdjax.checkpoints.layouts.diffusers import write_checkpoint
from sdjax.core.prng import image_keys
from sdjax.diffusion.samplers import first_noise
from sdjax.models.bert import BertConfig
from sdjax.models.embedders import ClassEmbedderConfig, RescalerConfig

SIDE, STEPS, SEED, FIRST, COUNT = 16, 4, 5, 3, 2
FIRST_STAGE = zoo.VAES["vq_f4"]
CROSS = zoo.ldm_unet(32)
CONCAT = dataclasses.replace(zoo.LDM, in_channels=6)
# 20 x 20 points for the corners of boxes, and tokens above them; three objects, and the crop's corners.
BERT = BertConfig(vocab_size=410, width=32, layers=2, heads=2, max_length=11)

Condition = Mapping[str, Any]


class Case(NamedTuple):
    """A kind of model.

    Attributes:
        parts: sizes of the UNet and of what the condition goes through.
        beta_end: of the published model's schedule.
        conditions: two, as a call takes them.
        reference: (folder, condition, noise) -> images.
        settings: what the folder says besides.
        scaling_factor: of the latents. That of inpainting is 1: the original does not scale the encoded masked image.
    """

    parts: Mapping[str, Any]
    beta_end: float
    conditions: tuple[Condition, Condition]
    reference: Callable[[Path, Condition, np.ndarray], np.ndarray]
    settings: Mapping[str, Any] = {}
    scaling_factor: float = 0.5


def _label(condition: Condition, names: tuple[str, ...] = ("cat", "dog")) -> int:
    return names.index(condition["class_label"])


def _layout(condition: Condition) -> list[tuple[int, list[float]]]:
    return [(("cat", "dog").index(item["class"]), item["box"]) for item in condition["layout"]]


def _repeated(x: np.ndarray) -> np.ndarray:
    return np.repeat(x[None], COUNT, axis=0)


RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
MASKS = (RNG.random((2, SIDE, SIDE)) < 0.5).astype(np.uint8) * 255
LABEL_MAPS = RNG.integers(0, 4, (2, SIDE, SIDE), np.uint8)
NEIGHBOURS = RNG.standard_normal((2, 5, 32)).astype(np.float32)
LAYOUTS = (
    [{"class": "dog", "box": [0.1, 0.2, 0.5, 0.53]}],
    [{"class": "cat", "box": [0.0, 0.0, 1.0, 1.0]}, {"class": "dog", "box": [0.31, 0.7, 0.44, 0.25]}],
)
CASES = {
    "class_conditional": Case(
        {"unet": dataclasses.replace(CROSS, heads=(1, 1)), "class_embedder": ClassEmbedderConfig(3, 32)},
        0.0195,
        ({"class_label": "dog", "guidance_scale": 2.0}, {"class_label": "cat", "guidance_scale": 3.0}),
        lambda folder, condition, noise: ldm_torch.sample_class(
            folder, [_label(condition)] * COUNT, noise, STEPS, condition["guidance_scale"]
        ),
        {"none": 2, "classes": ["cat", "dog"]},
    ),
    "layout": Case(
        {"unet": CROSS, "bert": BERT},
        0.0205,
        ({"layout": LAYOUTS[0], "guidance_scale": 2.0}, {"layout": LAYOUTS[1], "guidance_scale": 3.0}),
        lambda folder, condition, noise: ldm_torch.sample_layout(
            folder, [_layout(condition)] * COUNT, noise, STEPS, condition["guidance_scale"]
        ),
        {"nothing": [409] * 9 + [0, 399], "classes": ["cat", "dog"]},
    ),
    "semantic_synthesis": Case(
        {"unet": CONCAT, "rescaler": RescalerConfig(4)},
        0.0205,
        ({"label_map": LABEL_MAPS[0]}, {"label_map": LABEL_MAPS[1]}),
        lambda folder, condition, noise: ldm_torch.sample_label_map(
            folder, _repeated(condition["label_map"]), noise, STEPS
        ),
    ),
    "inpainting": Case(
        {"unet": dataclasses.replace(CONCAT, in_channels=7, resblock_updown=True)},
        0.0205,
        ({"init_image": IMAGES[0], "mask": MASKS[0]}, {"init_image": IMAGES[1], "mask": MASKS[1]}),
        lambda folder, condition, noise: ldm_torch.sample_inpainting(
            folder, _repeated(condition["init_image"]), _repeated(condition["mask"]), noise, STEPS
        ),
        scaling_factor=1.0,
    ),
    "retrieval": Case(
        {"unet": CROSS},
        0.015,
        tuple({"neighbours": x, "guidance_scale": 2.0 + i} for i, x in enumerate(NEIGHBOURS)),
        lambda folder, condition, noise: ldm_torch.sample_retrieval(
            folder, _repeated(condition["neighbours"]), noise, STEPS, condition["guidance_scale"]
        ),
    ),
}


@pytest.fixture(scope="module")
def first_stage():
    """The parameters of the first stage that all models here have."""
    torch.set_num_threads(1)  # tiny networks gain nothing from more, and lose much where cores are shared
    return drawn(ALL_FORMATS["vae"].shapes(FIRST_STAGE))


def written(task: str, first_stage: Any, folder: Path) -> Path:
    """A model with every parameter random."""
    case = CASES[task]
    components = {name: Component(size, drawn(ALL_FORMATS[name].shapes(size))) for name, size in case.parts.items()}
    components["vae"] = Component(dataclasses.replace(FIRST_STAGE, scaling_factor=case.scaling_factor), first_stage)
    scheduler = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.0015}
    scheduler |= {"beta_end": case.beta_end, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    settings = {"size": SIDE, **case.settings}
    checkpoint = Checkpoint(components=components, scheduler=scheduler, conditioning=task, settings=settings)
    write_checkpoint(folder, checkpoint)
    return folder


def sampled(pipe: Any, condition: Condition) -> np.ndarray:
    return pipe(**condition, steps=STEPS, num_images=COUNT, seed=SEED, first_index=FIRST)


@pytest.mark.parametrize("task", CASES)
def test_conditional_models_match_pytorch(task, first_stage, tmp_path):
    """Two conditions of each kind, guided by 2 and 3 where there is a null condition: to 1e-3."""
    folder, case = written(task, first_stage, tmp_path), CASES[task]
    side = SIDE // FIRST_STAGE.factor
    keys = image_keys(SEED, FIRST + jnp.arange(COUNT))
    noise = np.asarray(first_noise(keys, (side, side, FIRST_STAGE.latent_channels)))
    pipe = sdjax.load(folder)
    wanted = [case.reference(folder, condition, noise) for condition in case.conditions]
    assert np.abs(wanted[0] - wanted[1]).max() > 0.1
    for condition, images in zip(case.conditions, wanted, strict=True):
        assert images.std() > 0.05
        np.testing.assert_allclose(sampled(pipe, condition), images, atol=1e-3)
