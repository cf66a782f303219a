"""ADM's classifier of noisy images, whose gradient guides diffusion (Dhariwal & Nichol 2021, section 4).

Reads config.model.classifier (a variant of `adm_classifier`, and what differs from it: size, classes, and any size of
its encoder), config.data, config.sample (count, columns), and of config.task: scheduler and export_dtype. Timesteps are
uniform. The data needs `label`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray, UInt8

from sdjax.checkpoints.checkpoint import Component
from sdjax.checkpoints.layouts.diffusers import read_component, write_component
from sdjax.checkpoints.storage.safetensors import write_json
from sdjax.core.config import Config
from sdjax.core.errors import UserError
from sdjax.core.precision import dtype_named
from sdjax.core.tree import Params
from sdjax.data.images import tile
from sdjax.data.loader import Loader
from sdjax.data.transforms import crops
from sdjax.data.transforms import images as transforms
from sdjax.diffusion.denoise import q_sample
from sdjax.diffusion.loss import gather, uniform_timesteps
from sdjax.diffusion.samplers import schedule_of
from sdjax.models.adm_classifier import VARIANTS, Classifier, ClassifierConfig, classifier_of
from sdjax.models.conditioning import apply
from sdjax.tasks.base import batches, data_identity, open_images, square_crops
from sdjax.tasks.variants import sizes_of
from sdjax.training.task import Metrics, Task

NAME, LABEL, IMAGE = "classifier", "label", "image"


def make(config: Config, mesh: Mesh) -> Task:
    """The task of a config whose `task.name` is "classifier".

    Raises:
        UserError: a name in the config is not what it should be, or sizes do not fit each other.
    """
    sizes = sizes_of_classifier(config)
    model = classifier_of(sizes, dtype_named(config.train.dtype, "config.train.dtype"))
    side, schedule = config.data.size, schedule_of(config.task.scheduler.to_dict())
    if side != sizes.size:
        raise UserError(f"config.data.size={side}; the classifier is made for images of {sizes.size}")

    def init(key: PRNGKeyArray) -> Params:
        return {NAME: dict(model.init(key, jnp.zeros((1, side, side, 3)), jnp.zeros(1))["params"])}

    def loss(params: Params, batch: Any, key: PRNGKeyArray, step: Int[Array, ""]) -> tuple[Array, Metrics]:
        del step
        noise_key, time_key = jax.random.split(key)
        x0 = batch[IMAGE].astype(jnp.float32) / 127.5 - 1.0
        t = uniform_timesteps(time_key, len(x0), schedule.num_timesteps)
        x = q_sample(x0, jax.random.normal(noise_key, x0.shape), gather(schedule.alphas_cumprod, t))
        logits = apply(model, params[NAME], x, t)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, batch[LABEL]).mean()
        return value, {"accuracy": (logits.argmax(-1) == batch[LABEL]).mean()}

    known = transforms.InRange(LABEL, sizes.classes)

    def batch(params: Params) -> Loader:
        del params
        images, cuts = square_crops(config)
        flips = [transforms.Flip()] if config.data.flip else []
        return batches(config, images, [*cuts, *flips, known, transforms.Select((IMAGE, LABEL))], mesh)

    def preview(params: Params) -> UInt8[np.ndarray, "h w 3"]:
        """Images, evenly chosen; what is taken for another class is dark."""
        found = crops.still(open_images(config), side, config.data.crop).map(known)
        rows: Any = [found[i * len(found) // config.sample.count] for i in range(config.sample.count)]
        images = np.stack([row[IMAGE] for row in rows])
        right = classify(model, params[NAME], images).argmax(-1) == np.array([row[LABEL] for row in rows])
        return tile(np.where(right[:, None, None, None], images, images // 4), config.sample.columns)

    def export(params: Params, folder: Path) -> None:
        write_component(folder / NAME, NAME, Component(sizes, params[NAME]), config.task.export_dtype)
        (folder / "scheduler").mkdir()
        write_json(folder / "scheduler" / "scheduler_config.json", config.task.scheduler.to_dict())

    def batch_spec(rows: int) -> dict[str, Any]:
        image = jax.ShapeDtypeStruct((rows, side, side, 3), jnp.uint8)
        return {IMAGE: image, LABEL: jax.ShapeDtypeStruct((rows,), jnp.int32)}

    return Task(init, loss, preview, batch, export, batch_spec, identity=lambda: data_identity(config))


def sizes_of_classifier(config: Config) -> ClassifierConfig:
    """`config.model.classifier`: a variant, and in place of its own `size`, `classes` or sizes of the encoder.

    Raises:
        UserError: no such variant or field.
    """
    given = config.model.classifier.to_dict()
    own = {name: given.pop(name) for name in ("size", "classes") if name in given}
    encoders = {name: row.encoder for name, row in VARIANTS.items()}
    encoder = sizes_of(given, encoders, "config.model.classifier")
    return dataclasses.replace(VARIANTS[given["variant"]], encoder=encoder, **own)


def classify(model: Classifier, params: Params, images: UInt8[np.ndarray, "b h w 3"]) -> np.ndarray:
    """The logits of images without noise, float32 [b classes]."""
    return np.asarray(_classify(model, params, images))


@jax.jit(static_argnums=0)
def _classify(model: Classifier, params: Params, images: Array) -> Array:
    x = jnp.asarray(images, jnp.float32) / 127.5 - 1.0
    return apply(model, params, x, jnp.zeros(len(x)))


def read_classifier(folder: str | Path) -> tuple[Classifier, Params]:
    """A classifier from a finished run's export.

    Raises:
        UserError: it cannot be read.
    """
    component = read_component(Path(folder) / NAME, NAME)
    return classifier_of(component.config), dict(component.params)
