"""Folders of models that diffuse pictures: a UNet and its scheduler (diffusers' DDPMPipeline, DDIMPipeline)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sdjax.convert import unet2d
from sdjax.convert.components import Component
from sdjax.convert.files import read_json, write_json
from sdjax.convert.folder import INDEX, read_component, write_component
from sdjax.convert.rules import Placer
from sdjax.core.errors import UserError
from sdjax.models.unet2d import UNet2DConfig

PIPELINES, OURS = ("DDPMPipeline", "DDIMPipeline"), "PixelDiffusion"
UNET = "unet"


class PixelCheckpoint(NamedTuple):
    """A whole model.

    Attributes:
        unet: its `extra` says the pictures' side, "sample_size".
        scheduler: scheduler_config.json.
    """

    unet: Component
    scheduler: Mapping[str, Any]


def write_ddpm(folder: Path, checkpoint: PixelCheckpoint, dtype: str | None = "float32") -> None:
    """Writes a model into an empty folder; diffusers loads it, where its class has words for the UNet's sizes.

    Raises:
        UserError: parameters do not fit their sizes, or are not finite in `dtype`.
    """
    theirs = unet2d.is_diffusers(checkpoint.unet.config)
    write_component(folder / UNET, UNET, checkpoint.unet, dtype)
    (folder / "scheduler").mkdir(parents=True)
    write_json(folder / "scheduler" / "scheduler_config.json", checkpoint.scheduler)
    write_json(
        folder / INDEX,
        {
            "_class_name": PIPELINES[0] if theirs else OURS,
            "scheduler": ["diffusers", checkpoint.scheduler["_class_name"]],
            "unet": ["diffusers", unet2d.CLASS_NAME] if theirs else [OURS, unet2d.OWN_CLASS_NAME],
        },
    )


def check_pixels(config: Any, place: object) -> None:
    """Refuses a UNet that does not make pictures of pictures.

    Raises:
        UserError: it has cross-attention, or other channels than 3 in, and 3 or 6 out.
    """
    if not isinstance(config, UNet2DConfig) or config.in_channels != 3 or config.out_channels not in (3, 6):
        raise UserError(f"{place} is no UNet of pictures without cross-attention, of 3 channels in and 3 or 6 out")


def is_ddpm(folder: Path) -> bool:
    """Whether a folder holds such a model."""
    path = folder / INDEX
    return path.is_file() and read_json(path).get("_class_name") in {OURS, *PIPELINES}


def read_ddpm(folder: Path, dtype: str = "float32", place: Placer | None = None) -> PixelCheckpoint:
    """Reads a model that `write_ddpm` or diffusers wrote.

    Raises:
        UserError: a file is missing or corrupt, or the weights do not fit their sizes.
    """
    unet = read_component(folder / UNET, UNET, dtype, place=place)
    check_pixels(unet.config, folder / UNET)
    return PixelCheckpoint(unet, read_json(folder / "scheduler" / "scheduler_config.json"))
