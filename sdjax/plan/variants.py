"""Published models by name, as shapes alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from sdjax.checkpoints.checkpoint import FORMATS, TOKENIZERS, Checkpoint, Component, tokenizers_of
from sdjax.checkpoints.families import FAMILIES, scheduler_config
from sdjax.checkpoints.layouts.original import TOKENIZER_FOLDERS
from sdjax.core.errors import unknown
from sdjax.core.precision import dtype_named
from sdjax.diffusion_model.model import DiffusionModel, build_model
from sdjax.models import autoencoder, clip, unet


class Variant(NamedTuple):
    """A family of `FAMILIES`, and rows of the models' tables; None where the family has no such encoder."""

    family: str
    unet: str
    vae: str
    text_encoder: str | None = None
    text_encoder_2: str | None = None

    @property
    def configs(self) -> dict[str, Any]:
        """Configs of its components."""
        found = {"unet": unet.VARIANTS[self.unet], "vae": autoencoder.VARIANTS[self.vae]}
        return found | {name: clip.VARIANTS[getattr(self, name)] for name in TOKENIZERS if getattr(self, name)}

    @property
    def tokenizers(self) -> dict[str, Any]:
        """Folders of the published tokenizers, by text encoder."""
        folders = {"clip_l": "clip_l"}
        return {
            name: TOKENIZER_FOLDERS / folders.get(getattr(self, name), "open_clip")
            for name in TOKENIZERS
            if getattr(self, name)
        }


VARIANTS = {
    "sd1": Variant("sd1", "sd1", "sd", "clip_l"),
    "sd2": Variant("sd2", "sd2", "sd", "openclip_h_sd2"),
    "sdxl": Variant("sdxl", "sdxl", "sdxl", "clip_l", "openclip_bigg"),
    "sdxl_refiner": Variant("sdxl_refiner", "sdxl_refiner", "sdxl", text_encoder_2="openclip_bigg"),
}


class Shaped(NamedTuple):
    """A model without weights.

    Attributes:
        model: its networks.
        params: their shapes, by component.
        scheduler: its published scheduler config.
        size: side in pixels of the images it was trained on.
    """

    model: DiffusionModel
    params: dict[str, Any]
    scheduler: dict[str, Any]
    size: int


def shaped(name: str, dtype: str) -> Shaped:
    """The model of a row of `VARIANTS`, its autoencoder in float32 as `sdjax.load` has it.

    Raises:
        UserError: no such row or type.
    """
    if name not in VARIANTS:
        raise unknown("model", name, VARIANTS, "--model")
    variant, kind = VARIANTS[name], dtype_named(dtype, "--dtype")
    parts: dict[str, Any] = {}
    for part, config in variant.configs.items():
        shapes = FORMATS[part].shapes(config)
        own = shapes if part == "vae" else jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, kind), shapes)
        parts[part] = Component(config, own)
    scheduler = scheduler_config(variant.family, "epsilon", ())
    checkpoint = Checkpoint(components=parts, scheduler=scheduler, tokenizers=variant.tokenizers)
    tokenizers = dict(zip(variant.tokenizers, tokenizers_of(checkpoint), strict=True))
    model = build_model(checkpoint, tokenizers, kind, name)
    params = {part: component.params for part, component in parts.items()}
    return Shaped(model, params, dict(scheduler), FAMILIES[variant.family].size)
