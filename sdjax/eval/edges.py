"""Agreement of images with the line drawings that they were generated from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from scipy.ndimage import distance_transform_edt

import sdjax
from sdjax.checkpoints.checkpoint import CONTROLNET
from sdjax.checkpoints.layouts.diffusers import INDEX
from sdjax.checkpoints.open import resolve
from sdjax.core.config import Config
from sdjax.data.image_inputs import LUMA
from sdjax.data.sources.base import CONDITIONING_IMAGE
from sdjax.data.transforms import crops
from sdjax.tasks.base import open_images
from sdjax.tasks.control import hint_makers
from sdjax.tasks.finetune import from_checkpoint

WHITE, DARK = 0.5, 0.45  # grey of a hint's line at least; grey of an image's dark pixel at most
RADIUS = 2.0  # pixels


class EdgeAgreement(NamedTuple):
    """Shares of a hint's lines that an image has, and of an image's dark pixels that the hint has; their F1 score."""

    recall: float
    precision: float
    f1: float


def edge_agreement(image: Float[np.ndarray, "h w 3"], hint: Float[np.ndarray, "h w 3"]) -> EdgeAgreement:
    """Agreement of dark pixels with a hint's white ones, within `RADIUS` pixels; both in [0, 1]."""
    dark, lines = image @ LUMA < DARK, hint.max(-1) >= WHITE
    recall, precision = _share_near(lines, dark), _share_near(dark, lines)
    return EdgeAgreement(recall, precision, 2.0 * recall * precision / max(recall + precision, 1e-9))


def evaluate_control(config: Config, controlnet: str) -> dict[str, Any]:
    """Mean F1 over drawings of `config.eval.split`, which training has not seen, with a ControlNet and without it.

    Prompts say nothing, or what another drawing is: without the hint there is nothing to know its lines from. Also
    that of the drawings themselves, which bounds what can be reached.

    Args:
        config: of the ControlNet's training, whose rows, crops and hints are those of the drawings.
        controlnet: its folder, or its run's workdir; where that is a whole model, its base learned, too.

    Raises:
        UserError: the data or a checkpoint cannot be read.
    """
    config = from_checkpoint(config)
    options = config.eval
    images = crops.still(open_images(config, options.split), config.data.size, config.data.crop)
    for maker in hint_makers(config):
        images = images.map(maker)
    count = min(options.images, len(images))
    rows: list[Any] = [images[i * len(images) // count] for i in range(count)]
    hints = [row[CONDITIONING_IMAGE] for row in rows]
    whole = (resolve(controlnet, component=CONTROLNET) / INDEX).is_file()
    pipe = sdjax.load(controlnet if whole else config.task.initial, controlnet=[controlnet])
    captions = [row["caption"] for row in rows]
    prompts = {"empty": [""] * len(rows), "another": captions[1:] + captions[:1]}
    figures: dict[str, Any] = {"drawings": len(rows), "f1_drawings": _mean([row["image"] for row in rows], hints)}
    for name, texts in prompts.items():
        for suffix, scale in {"": 1.0, "_uncontrolled": 0.0}.items():
            made = pipe(
                texts,
                control_image=[[hint] for hint in hints],
                control_scale=scale,
                syntax="plain",
                **{key: options[key] for key in ("steps", "seed", "batch_size")},
            )
            figures[f"f1_{name}{suffix}"] = _mean(made, hints)
    return figures


def _mean(images: Sequence[np.ndarray] | np.ndarray, hints: Sequence[UInt8[np.ndarray, "h w 3"]]) -> float:
    scores = [edge_agreement(_unit(image), _unit(hint)).f1 for image, hint in zip(images, hints, strict=True)]
    return round(float(np.mean(scores)), 4)


def _unit(image: np.ndarray) -> np.ndarray:
    return image / np.float32(255.0) if image.dtype == np.uint8 else image


def _share_near(pixels: np.ndarray, others: np.ndarray) -> float:
    """The share of pixels that have one of the others near; of none, all."""
    if not pixels.any() or not others.any():
        return float(not pixels.any())
    return float(np.mean(np.asarray(distance_transform_edt(~others))[pixels] <= RADIUS))
