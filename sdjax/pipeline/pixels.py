"""Models that diffuse pictures themselves (DDPM, iDDPM, ADM), of one kind or of classes, with a classifier beside."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from sdjax.convert.components import Checkpoint, Component
from sdjax.core.errors import UserError
from sdjax.core.precision import dtype_named
from sdjax.core.prng import image_keys
from sdjax.diffusion.samplers import SamplerOptions, make_table, schedule_of
from sdjax.models.adm_classifier import classifier_of
from sdjax.models.unet2d import UNet2D
from sdjax.pipeline.devices import Devices
from sdjax.tasks.pixels import Guide, draw

STEPS, SAMPLER = 250, "ddpm"


class PixelPipeline:
    """A model, its parameters on the devices, ready to be called.

    Attributes:
        name: what a user would call it.
        task: "pixels".
        settings: nothing; models of this kind do not say how they are best sampled.
    """

    task = "pixels"

    def __init__(
        self,
        name: str,
        checkpoint: Checkpoint,
        dtype: str = "float32",
        classifier: Component | None = None,
        mesh: Mesh | None = None,
    ):
        """Takes a model of pixels, and a classifier for guidance, both on the devices of `mesh`, if any.

        Raises:
            UserError: the classifier is of pictures of another size.
        """
        self.name, self.settings = name, dict[str, Any]()
        component = checkpoint.components["unet"]
        config = component.config
        self._unet = UNet2D(config, dtype=dtype_named(dtype))
        self._params = cast(Any, component.params)
        self._scheduler, self._classes = checkpoint.scheduler, config.classes
        side = component.extra.get("sample_size")
        self._pixels = side if isinstance(side, int) else 0
        if self._pixels < 1:
            raise UserError(f"{name} does not say the size of its pictures (sample_size)")
        self._classifier, self._devices = classifier, Devices(mesh)
        if classifier is not None and classifier.config.size != self._pixels:
            known = classifier.config.size
            raise UserError(f"{name} makes pictures of {self._pixels} pixels; its classifier knows those of {known}")

    def __call__(
        self,
        prompt: str | None = None,
        *,
        class_label: str | int | None = None,
        classifier_scale: float | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        schedule: str | None = None,
        eta: float | None = None,
        seed: int = 0,
        first_index: int = 0,
        num_images: int = 1,
    ) -> Float[np.ndarray, "b H W 3"]:
        """Pictures in [0, 1].

        Args:
            prompt: not for these models.
            class_label: a class's number, of a model of classes or with a classifier.
            classifier_scale: s of classifier guidance (Dhariwal & Nichol 2021: algorithm 1 for ddpm, 2 for the others);
                1 where there is a classifier.
            steps, sampler, schedule, eta: None for 250 steps of ancestral sampling, spaced as its scheduler says.
                ADM's "ddim25" is sampler="ddim", steps=25, schedule="leading".
            seed: with the number of the picture, `first_index` for the first, decides its noise.
            num_images: how many.

        Raises:
            UserError: something is missing or is not for this model, or has a wrong value.
        """
        if prompt is not None:
            raise UserError(f"{self.name} is not told prompt: a model of {self.task} is told class_label, or nothing")
        label = self._label(class_label)
        if classifier_scale is not None and self._classifier is None:
            raise UserError(f"classifier_scale {classifier_scale}: {self.name} has no classifier beside it; give one")
        sampler = sampler or SAMPLER
        options = SamplerOptions.from_scheduler_config(self._scheduler, sampler)
        if eta is not None:
            options = dataclasses.replace(options, eta=eta)
        guide, judge = None, self._classifier
        if judge is not None:
            scale = 1.0 if classifier_scale is None else classifier_scale
            guide = Guide(classifier_of(judge.config), cast(Any, judge.params), scale)
        count = STEPS if steps is None else steps
        table = make_table(sampler, schedule_of(self._scheduler), count, options, spacing=schedule)
        keys = image_keys(seed, jnp.arange(first_index, first_index + num_images))
        labels = None if label is None else np.full(num_images, label, np.int32)
        prediction = self._scheduler.get("prediction_type", "epsilon")
        table, (keys, labels) = self._devices.whole(table), self._devices.rows((keys, labels))
        with self._devices.working():
            return np.asarray(draw(self._unet, self._params, table, keys, self._pixels, prediction, labels, guide))

    def _label(self, given: str | int | None) -> int | None:
        counts = [self._classes, None if self._classifier is None else self._classifier.config.classes]
        known = [count for count in counts if count is not None]
        if given is None:
            if known:
                raise UserError(f"{self.name} needs class_label: a number from 0 to {min(known) - 1}")
            return None
        if not known:
            raise UserError(f"{self.name} is not told class_label: it knows no classes")
        if not str(given).isdecimal() or not int(given) < min(known):
            raise UserError(f"class_label {given}: {self.name} has the classes 0 to {min(known) - 1}")
        return int(given)
