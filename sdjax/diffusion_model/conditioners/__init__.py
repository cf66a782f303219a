"""Conditioners by the names under which checkpoints and configs know them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sdjax.diffusion_model.conditioner import Conditioner
from sdjax.diffusion_model.conditioners.class_label import EMBEDDER, BackboneClassConditioner, ClassConditioner
from sdjax.diffusion_model.conditioners.inpaint import InpaintConditioner
from sdjax.diffusion_model.conditioners.maps import RESCALER, LabelMapConditioner
from sdjax.diffusion_model.conditioners.neighbours import NeighbourConditioner
from sdjax.diffusion_model.conditioners.tokens import BERT, BertTextConditioner, LayoutConditioner
from sdjax.diffusion_model.conditioners.upscale import LowResolutionConditioner

TEXT = "text"
"""Prompts through text encoders, whose conditioner also needs tokenizers: see `sdjax.diffusion_model.model`."""

Build = Callable[[Mapping[str, Any], Mapping[str, Any]], Conditioner]
"""(configs of all components, settings of the checkpoint) -> the conditioner."""


def _class_conditional(configs: Mapping[str, Any], settings: Mapping[str, Any]) -> Conditioner:
    if EMBEDDER in configs:
        return ClassConditioner(configs[EMBEDDER], settings.get("none"))
    return BackboneClassConditioner(configs["unet"].classes)


def _layout(configs: Mapping[str, Any], settings: Mapping[str, Any]) -> Conditioner:
    bert = configs[BERT]
    classes = int(settings.get("object_classes", bert.vocab_size - 1))
    return LayoutConditioner(bert, tuple(settings.get("nothing", ())), classes)


CONDITIONERS: dict[str, Build] = {
    "unconditional": lambda configs, settings: Conditioner(),
    "class_conditional": _class_conditional,
    "text_bert": lambda configs, settings: BertTextConditioner(configs[BERT], tuple(settings.get("nothing", ()))),
    "layout": _layout,
    "semantic_synthesis": lambda configs, settings: LabelMapConditioner(configs[RESCALER]),
    "super_resolution": lambda configs, settings: LowResolutionConditioner(),
    "inpainting": lambda configs, settings: InpaintConditioner(
        configs["vae"].latent_channels, configs["vae"].factor, stable_diffusion=False
    ),
    "retrieval": lambda configs, settings: NeighbourConditioner(configs["unet"].context_dim),
}
