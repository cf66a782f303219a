"""Gradients that guide sampling: a classifier of noisy images (ADM), an image to be like (LDM, appendix C)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sdjax.core.errors import UserError
from sdjax.core.tree import Params
from sdjax.data.image_inputs import rgb
from sdjax.diffusion.denoise import Denoise
from sdjax.diffusion.guidance import classifier_guided, image_guided
from sdjax.diffusion_model.conditioner import Columns, Conditioner, Host, Traits, required
from sdjax.diffusion_model.conditioners.class_label import LABEL, class_number
from sdjax.models.adm_classifier import ClassifierConfig, classifier_of
from sdjax.models.conditioning import apply

CLASSIFIER, CLASSIFIER_SCALE = "classifier", "classifier_scale"
RESEMBLE, RESEMBLE_SCALE = "resemble", "resemble_scale"


@dataclass(frozen=True)
class ClassifierGuide(Conditioner):
    """Guidance to a class by the gradient of a classifier (Dhariwal & Nichol 2021, section 4).

    Attributes:
        config: of the classifier, whose parameters are the component "classifier".
    """

    config: ClassifierConfig

    @property
    def traits(self) -> Traits:
        return Traits(("class_label",), (CLASSIFIER_SCALE,), step_columns=(LABEL, CLASSIFIER_SCALE))

    def encode(self, inputs: Mapping[str, Any], host: Host) -> dict[str, Any]:
        label = class_number(required(inputs, "class_label", host.name), self.config.classes, host)
        scale = inputs.get(CLASSIFIER_SCALE)
        return {LABEL: np.int32(label), CLASSIFIER_SCALE: np.float32(1.0 if scale is None else scale)}

    def steer(self, params: Params, columns: Columns, denoise: Denoise, decode: Callable[..., Array]) -> Denoise:
        labels, classifier = jnp.asarray(columns[LABEL]), classifier_of(self.config)

        def log_probability(x: Array, t: Array) -> Float[Array, " b"]:
            logits = jax.nn.log_softmax(apply(classifier, params[CLASSIFIER], x, t))
            return jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]

        return classifier_guided(denoise, log_probability, jnp.asarray(columns[CLASSIFIER_SCALE]))


@dataclass(frozen=True)
class ImageGuide(Conditioner):
    """Guidance to an image that the result, made as small, shall be like; any model has it, where one is given."""

    @property
    def traits(self) -> Traits:
        return Traits(optional=(RESEMBLE, RESEMBLE_SCALE), step_columns=(RESEMBLE, RESEMBLE_SCALE))

    def encode(self, inputs: Mapping[str, Any], host: Host) -> dict[str, Any]:
        given, scale = inputs.get(RESEMBLE), inputs.get(RESEMBLE_SCALE)
        if given is None:
            if scale is not None:
                raise UserError(f"resemble_scale {scale:g} changes nothing without resemble; leave it out")
            return {}
        target = rgb(given, RESEMBLE)
        (height, width), size = target.shape[:2], host.size
        if height > size[0] or width > size[1] or height * size[1] != width * size[0]:
            raise UserError(
                f"resemble has {width}x{height} pixels, and {host.name} makes {size[1]}x{size[0]}: it must have the "
                "same proportions, and at most the same size"
            )
        return {RESEMBLE: target.astype(np.float32), RESEMBLE_SCALE: np.float32(1.0 if scale is None else scale)}

    def steer(self, params: Params, columns: Columns, denoise: Denoise, decode: Callable[..., Array]) -> Denoise:
        if RESEMBLE not in columns:
            return denoise
        target = jnp.asarray(columns[RESEMBLE]) * 2.0 - 1.0

        def likelihood(x0: Array) -> Float[Array, " b"]:
            """Half the squared distance of the images, made as small as the target, is -log p."""
            small = jax.image.resize(decode(params, x0) * 2.0 - 1.0, target.shape, "cubic", antialias=True)
            return -0.5 * jnp.square(target - small).sum((1, 2, 3))

        return image_guided(denoise, likelihood, jnp.asarray(columns[RESEMBLE_SCALE]))
