"""Conditioners by the names under which checkpoints and configs know them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jax.typing import DTypeLike

from sdjax.checkpoints.kinds import CAPTIONS
from sdjax.diffusion_model.conditioner import Combined, Conditioner
from sdjax.diffusion_model.conditioners.captions import ENCODER, LENGTH, CaptionConditioner
from sdjax.diffusion_model.conditioners.class_label import EMBEDDER, BackboneClassConditioner, ClassConditioner
from sdjax.diffusion_model.conditioners.inpaint import InpaintConditioner
from sdjax.diffusion_model.conditioners.maps import RESCALER, LabelMapConditioner
from sdjax.diffusion_model.conditioners.neighbours import NeighbourConditioner
from sdjax.diffusion_model.conditioners.tokens import BERT, BertTextConditioner, LayoutConditioner
from sdjax.diffusion_model.conditioners.upscale import LowResolutionConditioner, PixelUpscaleConditioner
from sdjax.diffusion_model.text_encoders import T5TextEncoder
from sdjax.models.t5 import T5Encoder

TEXT = "text"
"""Prompts through text encoders, whose conditioner also needs tokenizers: see `sdjax.diffusion_model.model`."""

Build = Callable[[Mapping[str, Any], Mapping[str, Any], DTypeLike], Conditioner]
"""(configs of all components, settings of the checkpoint, type of text encoders) -> the conditioner."""


def _class_conditional(configs: Mapping[str, Any], settings: Mapping[str, Any], dtype: DTypeLike) -> Conditioner:
    if EMBEDDER in configs:
        return ClassConditioner(configs[EMBEDDER], settings.get("none"))
    return BackboneClassConditioner(configs["unet"].classes)


def _layout(configs: Mapping[str, Any], settings: Mapping[str, Any], dtype: DTypeLike) -> Conditioner:
    bert = configs[BERT]
    classes = int(settings.get("object_classes", bert.vocab_size - 1))
    return LayoutConditioner(bert, _null_tokens(settings), classes)


def _null_tokens(settings: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(settings.get("nothing", ()))


def _captions(configs: Mapping[str, Any], settings: Mapping[str, Any], dtype: DTypeLike) -> Conditioner:
    encoder = T5TextEncoder(ENCODER, T5Encoder(configs[ENCODER], dtype))
    captions, levels = CaptionConditioner(encoder, settings.get("text_length", LENGTH)), configs["unet"].classes
    return captions if levels is None else Combined((PixelUpscaleConditioner(levels), captions))


CONDITIONERS: dict[str, Build] = {
    "unconditional": lambda configs, settings, dtype: Conditioner(),
    "class_conditional": _class_conditional,
    CAPTIONS: _captions,
    "text_bert": lambda configs, settings, dtype: BertTextConditioner(
        configs[BERT], tuple(settings.get("nothing", ()))
    ),
    "layout": _layout,
    "semantic_synthesis": lambda configs, settings, dtype: LabelMapConditioner(configs[RESCALER]),
    "super_resolution": lambda configs, settings, dtype: LowResolutionConditioner(),
    "inpainting": lambda configs, settings, dtype: InpaintConditioner(
        configs["vae"].latent_channels, configs["vae"].factor, stable_diffusion=False
    ),
    "retrieval": lambda configs, settings, dtype: NeighbourConditioner(configs["unet"].context_dim),
}
