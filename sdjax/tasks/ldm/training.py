"""Training of a latent diffusion model over a finished first stage, whatever it is told (LDM, eq. 2 and 3).

Reads config.model.unet, config.data, config.sample (count, columns, sampler, steps, guidance_scale), and of
config.task: first_stage, scheduler, weighting, norm, timesteps, offset_noise, dropout and export_dtype. Pictures go
through the first stage's encoder in every step, as in the original.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray, UInt8

from sdjax.convert.components import FORMATS, Checkpoint, Component
from sdjax.convert.folder import read_component, read_config, write_checkpoint
from sdjax.core.config import Config
from sdjax.core.errors import UserError
from sdjax.core.prng import image_keys
from sdjax.core.tree import Params
from sdjax.data import crops, sources, transforms
from sdjax.data.loader import Loader
from sdjax.diffusion.denoise import per_image
from sdjax.diffusion.samplers import SamplerOptions, make_table, schedule_of
from sdjax.models.apply import apply
from sdjax.models.autoencoder import autoencoder_of
from sdjax.tasks.base import batches, squares, tile, to_uint8
from sdjax.tasks.latent.networks import UNET, VAE
from sdjax.tasks.latent.objective import objective_of
from sdjax.tasks.ldm.conditioner import Columns, Told
from sdjax.tasks.ldm.model import Model, draw, init, to_latents, unet_of
from sdjax.tasks.ldm.tokens import BERT
from sdjax.training.task import Metrics, Place, Task

IMAGE = "image"


def first_stage_of(config: Config) -> Any:
    """The sizes of the autoencoder in `config.task.first_stage`.

    Raises:
        UserError: it is not there.
    """
    return read_config(Path(config.task.first_stage) / VAE, VAE)


def make_latent_task(config: Config, mesh: Mesh, told: Told) -> Task:
    """The task of a model that is told something.

    Raises:
        UserError: the first stage or a name in the config is not what it should be, or sizes do not fit each other.
    """
    first = first_stage_of(config)
    side, conditioner = config.data.size, told.conditioner
    if side % first.factor:
        raise UserError(f"config.data.size={side} is not a multiple of the first stage's {first.factor}")
    model = Model(
        unet_of(config, first.latent_channels, conditioner),
        autoencoder_of(first),
        conditioner,
        config.task.scheduler.prediction_type,
    )
    objective = objective_of(config.task)
    scheduler = config.task.scheduler.to_dict()

    def loss(params: Params, batch: Any, key: PRNGKeyArray, step: Int[Array, ""]) -> tuple[Array, Metrics]:
        del step
        latent_key, noise_key, drop_key = jax.random.split(key, 3)
        x0 = jax.lax.stop_gradient(to_latents(model.autoencoder, params, batch[IMAGE], latent_key))
        cond = conditioner.cond(params, _dropped(told, batch, drop_key, config.task.dropout))
        value = objective.loss(lambda x, t: apply(model.unet, params[UNET], x, t, cond), x0, noise_key)
        return value, {"latent_std": x0.std()}

    def batch(params: Params) -> Loader:
        del params
        pictures, cuts = squares(config)
        return batches(config, pictures, [*cuts, *changes(config, told)], mesh)

    def sample(params: Params) -> UInt8[np.ndarray, "h w 3"]:
        options = config.sample
        columns = shown(config, told, options.count)
        chosen = SamplerOptions.from_scheduler_config(scheduler, options.sampler)
        table = make_table(options.sampler, schedule_of(scheduler), options.steps, chosen)
        keys = image_keys(config.train.seed, jnp.arange(options.count))
        images = draw(model, params, table, columns, options.guidance_scale, keys, (side, side))
        return tile(np.concatenate([columns[IMAGE], to_uint8(np.asarray(images))]), options.columns)

    def export(params: Params, folder: Path) -> None:
        sizes = {UNET: model.unet.config, VAE: first, **conditioner.components}
        extra = {UNET: {"sample_size": side // first.factor}, VAE: {"sample_size": side}}
        components = {name: Component(value, params[name], extra.get(name, {})) for name, value in sizes.items()}
        names = getattr(sources.source(config.data.source, "train"), "classes", ())
        settings = settings_of(config) | conditioner.settings | ({"classes": list(names)} if names else {})
        checkpoint = Checkpoint(
            components=components,
            scheduler=scheduler,
            conditioning=config.task.name,
            settings=settings,
            tokenizers={} if told.tokenizer is None else {BERT: told.tokenizer},
        )
        write_checkpoint(folder, checkpoint, config.task.export_dtype)

    def specimen(rows: int) -> dict[str, Any]:
        own = {name: jax.ShapeDtypeStruct((rows, *row.shape), row.dtype) for name, row in told.columns.items()}
        return {IMAGE: jax.ShapeDtypeStruct((rows, side, side, 3), jnp.uint8), **own}

    def stored(place: Place) -> Params:
        return {VAE: read_component(Path(config.task.first_stage) / VAE, VAE, place=place).params}

    frozen = {VAE: FORMATS[VAE].shapes(first)}
    return Task(lambda key: init(model, key), loss, sample, batch, export, specimen, frozen, stored)


def changes(config: Config, told: Told) -> list[Any]:
    """What turns an example with a square picture into a row of a batch."""
    flips = [transforms.Flip()] if config.data.flip else []
    return [*flips, *told.transforms, transforms.Select((IMAGE, *told.columns))]


def shown(config: Config, told: Told, count: int, split: str = "train") -> dict[str, np.ndarray]:
    """Pictures, evenly chosen, with their conditions, as a batch has them; always the same ones."""
    pictures = crops.still(sources.source(config.data.source, split), config.data.size, config.data.crop)
    chosen: Any = pictures.slice(slice(None, None, max(len(pictures) // count, 1))).seed(config.train.seed)
    for change in [*told.transforms, transforms.Select((IMAGE, *told.columns))]:
        chosen = chosen.random_map(change) if isinstance(change, grain.transforms.RandomMap) else chosen.map(change)
    rows = [chosen[i] for i in range(count)]
    return {name: np.stack([row[name] for row in rows]) for name in (IMAGE, *told.columns)}


def settings_of(config: Config) -> dict[str, Any]:
    """What a finished model remembers of its config: how it is best sampled, and what its condition means."""
    return {
        "size": config.data.size,
        "steps": config.sample.steps,
        "sampler": config.sample.sampler,
        "guidance_scale": config.sample.guidance_scale,
        **({"object_classes": config.task.classes} if "classes" in config.task else {}),
    }


def _dropped(told: Told, batch: Columns, key: PRNGKeyArray, probability: float) -> Columns:
    """Conditions that say nothing for a share of the pictures, so that guidance has something to depart from."""
    quiet = told.conditioner.silent(batch)
    if quiet is None or not probability:
        return batch
    drops = jax.random.bernoulli(key, probability, (len(batch[IMAGE]),))
    return {
        name: jnp.where(per_image(drops, jnp.asarray(quiet[name])), quiet[name], value) for name, value in batch.items()
    }
