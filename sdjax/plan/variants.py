"""Published models by name, as shapes alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from sdjax.convert.components import FORMATS, TOKENIZERS, Checkpoint, Component
from sdjax.convert.families import FAMILIES, scheduler_config
from sdjax.core.errors import unknown
from sdjax.core.precision import dtype_named
from sdjax.models import autoencoder, clip, unet
from sdjax.pipeline.loading import make_system
from sdjax.tasks.latent import System


class Variant(NamedTuple):
    """A family of `FAMILIES`, and rows of the models' tables; None where the family has no such encoder."""

    family: str
    unet: str
    vae: str
    text_encoder: str | None = None
    text_encoder_2: str | None = None


VARIANTS = {
    "sd1": Variant("sd1", "sd1", "sd", "clip_l"),
    "sd2": Variant("sd2", "sd2", "sd", "openclip_h_sd2"),
    "sdxl": Variant("sdxl", "sdxl", "sdxl", "clip_l", "openclip_bigg"),
    "sdxl_refiner": Variant("sdxl_refiner", "sdxl_refiner", "sdxl", text_encoder_2="openclip_bigg"),
}


class Shaped(NamedTuple):
    """A model without weights.

    Attributes:
        system: its networks.
        params: their shapes, by component.
        scheduler: its published scheduler config.
        size: side in pixels of the pictures it was trained on.
    """

    system: System
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
    configs = {"unet": unet.VARIANTS[variant.unet], "vae": autoencoder.VARIANTS[variant.vae]}
    configs |= {e: clip.VARIANTS[getattr(variant, e)] for e in TOKENIZERS if getattr(variant, e)}
    parts: dict[str, Any] = {}
    for part, config in configs.items():
        shapes = FORMATS[part].shapes(config)
        own = shapes if part == "vae" else jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, kind), shapes)
        parts[part] = Component(config, own)
    scheduler = scheduler_config(variant.family, "epsilon", ())
    system = make_system(Checkpoint(components=parts, scheduler=scheduler), kind, name)
    params = {part: component.params for part, component in parts.items()}
    return Shaped(system, params, dict(scheduler), FAMILIES[variant.family].size)
