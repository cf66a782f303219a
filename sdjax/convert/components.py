"""What a checkpoint is made of: its networks, and how each is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from sdjax.convert import adm_classifier, autoencoder, bert, clip, embedders, unet, unet2d
from sdjax.convert.rules import Placer, Stored, Table, read
from sdjax.core.precision import dtype_named
from sdjax.core.tree import Tree
from sdjax.models.unet2d import UNet2DConfig


@dataclass(frozen=True)
class Component:
    """A network of a checkpoint.

    Attributes:
        config: its sizes, e.g. a `UNetConfig`.
        params: nested dictionary of arrays.
        extra: what else its config.json says or shall say, e.g. {"sample_size": 64}; the sizes win over it.
    """

    config: Any
    params: Tree
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole model: what a folder or a single file holds.

    Attributes:
        components: its networks: "unet", "vae" (not in models that diffuse pixels), "text_encoder", "text_encoder_2",
            then "bert", "class_embedder" or "rescaler".
        scheduler: scheduler_config.json; `_class_name` names the sampler.
        conditioning: "text" for Stable Diffusion, whose refiner and upscaler included; for other latent models the
            file of `sdjax.tasks` that trains such; "unconditional" or "class_conditional" for models of pixels.
        settings: how it is best sampled, e.g. {"steps": 25, "guidance_scale": 2.5}, and what its condition means, e.g.
            {"classes": ["cat", "dog"]}; diffusers passes over it.
        tokenizers: the folder with a tokenizer's files, by the text encoder that reads its tokens.
        low_res_scheduler: how an upscaler's low-resolution image is noised; None for other models.
        model_index: what model_index.json says beside its components, e.g. {"_class_name":
            "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}.
        placeholders: words of textual inversions, and the number of vectors of each. Their ids are the last of every
            text encoder, in this order.
    """

    components: Mapping[str, Component]
    scheduler: Mapping[str, Any]
    conditioning: str = "text"
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokenizers: Mapping[str, Path] = field(default_factory=dict)
    low_res_scheduler: Mapping[str, Any] | None = None
    model_index: Mapping[str, Any] = field(default_factory=dict)
    placeholders: Mapping[str, int] = field(default_factory=dict)

    def replace_component(self, name: str, component: Component) -> Checkpoint:
        """The checkpoint with another network in place of the one called `name`."""
        return replace(self, components={**self.components, name: component})


Patch: TypeAlias = Callable[[Checkpoint], Checkpoint]
"""A change of a checkpoint, e.g. another autoencoder."""


class Format(NamedTuple):
    """How a network is stored: where, and how its config and parameters are translated."""

    weights: str
    from_config: Callable[[Mapping[str, Any], str], Any]
    to_config: Callable[[Any], dict[str, Any]]
    table: Callable[[Any], Table]
    shapes: Callable[[Any], Tree]


_TEXT = Format("model", clip.from_diffusers_config, clip.to_diffusers_config, lambda config: clip.TABLE, clip.shapes)


def _unet_config(config: Mapping[str, Any], place: str) -> Any:
    if config.get("_class_name") in (unet2d.CLASS_NAME, unet2d.OWN_CLASS_NAME):
        return unet2d.from_config(config, place)
    return unet.from_diffusers_config(config, place)


def _to_unet_config(config: Any) -> dict[str, Any]:
    return unet2d.to_config(config) if isinstance(config, UNet2DConfig) else unet.to_diffusers_config(config)


def _unet(config: Any) -> Any:
    """The module that stores a UNet of these sizes."""
    return unet2d if isinstance(config, UNet2DConfig) else unet


FORMATS: dict[str, Format] = {
    "unet": Format(
        "diffusion_pytorch_model",
        _unet_config,
        _to_unet_config,
        lambda config: _unet(config).table(config),
        lambda config: _unet(config).shapes(config),
    ),
    "vae": Format(
        "diffusion_pytorch_model",
        autoencoder.from_diffusers_config,
        autoencoder.to_diffusers_config,
        lambda config: autoencoder.TABLE,
        autoencoder.shapes,
    ),
    "text_encoder": _TEXT,
    "text_encoder_2": _TEXT,
}
"""The networks of Stable Diffusion's family."""

CONDITIONERS: dict[str, Format] = {
    "bert": Format(
        "model", bert.from_diffusers_config, bert.to_diffusers_config, lambda config: bert.TABLE, bert.shapes
    ),
    "class_embedder": Format(
        "model",
        embedders.class_config,
        embedders.to_class_config,
        lambda config: embedders.CLASSES,
        embedders.class_shapes,
    ),
    "rescaler": Format(
        "model",
        embedders.rescaler_config,
        embedders.to_rescaler_config,
        lambda config: embedders.RESCALER,
        embedders.rescaler_shapes,
    ),
}
"""What the conditions of LDM's other models go through."""

CLASSIFIERS: dict[str, Format] = {
    "classifier": Format(
        "model",
        adm_classifier.from_config,
        adm_classifier.to_config,
        lambda config: adm_classifier.TABLE,
        adm_classifier.shapes,
    )
}

ALL_FORMATS = FORMATS | CONDITIONERS | CLASSIFIERS
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""The folder of the tokenizer of each of CLIP's text encoders."""


Dtypes: TypeAlias = str | Mapping[str, str | None] | None


class Reading(NamedTuple):
    """How parameters are read.

    Attributes:
        dtype: "float32", "bfloat16", "float16", or None for the type that each is stored in; or such a value a network.
        place: called with each array, as soon as it is converted, and its path, e.g. "unet/conv_in/kernel"; what it
            returns takes the array's place in the tree. None keeps NumPy arrays.
    """

    dtype: Dtypes = "float32"
    place: Placer | None = None


def read_params(name: str, config: Any, tensors: Mapping[str, Stored], source: object, how: Reading) -> dict[str, Any]:
    """The parameters of the network `name` from tensors under diffusers' keys, one at a time.

    Raises:
        UserError: the tensors do not fit `config` or are not finite in the type asked for, or that type is unknown.
    """
    form = ALL_FORMATS[name]
    kind = how.dtype if how.dtype is None or isinstance(how.dtype, str) else how.dtype.get(name)
    dtype = None if kind is None else dtype_named(kind)
    place = how.place
    below = None if place is None else lambda array, path: place(array, f"{name}/{path}")
    return read(form.table(config), tensors, form.shapes(config), dtype, source, below)
