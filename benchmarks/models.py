"""Pipelines to time: a checkpoint's, or one of random weights in a published configuration."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

import sdjax
from sdjax.convert.components import FORMATS, TOKENIZERS, Checkpoint, Component
from sdjax.convert.families import FAMILIES, scheduler_config
from sdjax.convert.single_file import TOKENIZER_FOLDERS
from sdjax.core.errors import UserError, unknown
from sdjax.core.precision import dtype_named
from sdjax.core.tree import Tree, flatten, unflatten
from sdjax.data.tokenizers import load_tokenizer
from sdjax.models import autoencoder, clip, unet
from sdjax.pipeline.loading import make_system
from sdjax.pipeline.pipeline import Pipeline

NOISE = np.random.default_rng(0).standard_normal(1_000_003).astype(np.float32)


class Variant(NamedTuple):
    """A family of `FAMILIES`, and rows of the models' tables; None where the family has no such encoder."""

    family: str
    unet: str
    vae: str
    text_encoder: str
    text_encoder_2: str | None = None


VARIANTS = {
    "sd15": Variant("sd1", "sd1", "sd", "clip_l"),
    "sd2": Variant("sd2", "sd2", "sd", "openclip_h_sd2"),
    "sdxl": Variant("sdxl", "sdxl", "sdxl", "clip_l", "openclip_bigg"),
}


def load(checkpoint: str | None, variant: str | None, dtype: str) -> Pipeline:
    """The pipeline that the flags ask for.

    Raises:
        UserError: not exactly one of both is given, or there is no such checkpoint, variant or dtype.
    """
    if (checkpoint is None) == (variant is None):
        raise UserError("give either --checkpoint or --variant")
    return sdjax.load(checkpoint, dtype) if checkpoint is not None else random_pipeline(variant or "", dtype)


def random_pipeline(name: str, dtype: str) -> Pipeline:
    """Random weights of unit gain in the real configuration; the autoencoder's in float32, as `sdjax.load` has it.

    Raises:
        UserError: there is no such variant or dtype.
    """
    if name not in VARIANTS:
        raise unknown("variant", name, VARIANTS, "--variant")
    variant = VARIANTS[name]
    size = FAMILIES[variant.family].size // autoencoder.VARIANTS[variant.vae].factor
    parts: dict[str, Any] = {
        "unet": _component("unet", unet.VARIANTS[variant.unet], dtype, {"sample_size": size}),
        "vae": _component("vae", autoencoder.VARIANTS[variant.vae], "float32"),
    }
    for encoder in TOKENIZERS:
        row = getattr(variant, encoder)
        if row is not None:
            parts[encoder] = _component(encoder, clip.VARIANTS[row], dtype)
            parts[TOKENIZERS[encoder]] = TOKENIZER_FOLDERS / ("clip_l" if row == "clip_l" else "open_clip")
    checkpoint = Checkpoint(**parts, scheduler_config=scheduler_config(variant.family, "epsilon", ()))
    system = make_system(checkpoint, dtype_named(dtype), name)
    tokenizers = [
        load_tokenizer(parts[TOKENIZERS[encoder]], parts[encoder].config.max_length)
        for encoder in TOKENIZERS
        if encoder in parts
    ]
    return Pipeline(name, checkpoint, system, tuple(tokenizers), dtype)


def _component(name: str, config: Any, dtype: str, extra: dict[str, Any] | None = None) -> Component:
    params = random_params(FORMATS[name].shapes(config), dtype)
    return Component(config, params, extra or {})


def random_params(shapes: Tree, dtype: str) -> dict[str, Any]:
    """On the first device: kernels whose outputs are about as large as their inputs, scales of 1, biases of 0."""

    def value(name: str, shape: tuple[int, ...]) -> jax.Array:
        if len(shape) == 1:
            array = np.full(shape, float(name.endswith("scale")), np.float32)
        else:
            array = np.resize(NOISE, shape) / np.sqrt(np.prod(shape[:-1]), dtype=np.float32)
        return jax.device_put(array.astype(dtype_named(dtype)))

    return unflatten({name: value(name, leaf.shape) for name, leaf in flatten(shapes).items()})
