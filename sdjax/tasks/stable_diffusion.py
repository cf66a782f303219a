"""Training of Stable Diffusion 1, 2 and XL, from scratch or from a checkpoint, over latents that were prepared once.

Reads config.model (unet, autoencoder, text_encoders), config.data (`prepared`, a folder that `python -m sdjax.prepare`
wrote; size), config.sample, and of config.task: components, initial, text, scheduler, weighting, timesteps,
caption_dropout, offset_noise and export_dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, PRNGKeyArray, UInt8

from sdjax.convert.components import Checkpoint, Component
from sdjax.convert.folder import write_checkpoint
from sdjax.core.config import Config
from sdjax.core.errors import UserError, unknown
from sdjax.core.tree import Params
from sdjax.data.bucketed import bucketed
from sdjax.data.loader import Loader
from sdjax.data.prepared import PreparedSource
from sdjax.data.transforms import Select
from sdjax.models.apply import apply
from sdjax.models.autoencoder import posterior
from sdjax.tasks.base import my_rows, reading_of, tile, to_uint8
from sdjax.tasks.latent import Encoded, System, Text, cond, encode_text
from sdjax.tasks.latent.networks import (
    UNET,
    VAE,
    Origin,
    configs_of,
    init_component,
    shapes_of,
    system_of,
    tokenizer_folders,
    tokenizers_of,
)
from sdjax.tasks.latent.objective import objective_of
from sdjax.tasks.latent.preparation import BLANK, blank_shapes, check_identity, fields_of, identity_of
from sdjax.tasks.latent.rehearsal import sample_prompts
from sdjax.training.task import Metrics, Place, Task


class Reading(NamedTuple):
    """How captions reach the UNet.

    Attributes:
        told: (system, params, batch, which rows have lost their caption) -> what the text encoders say.
        trained: whether the text encoders learn, too.
    """

    told: Callable[[System, Params, Any, Bool[Array, " b"]], Encoded]
    trained: bool = False


def _prepared(system: System, params: Params, batch: Any, dropped: Bool[Array, " b"]) -> Encoded:
    del system
    blank = params[BLANK]
    found = {name: batch[name].astype(jnp.float32) for name in blank}
    mixed = {name: jnp.where(_rows(dropped, found[name]), blank[name], found[name]) for name in blank}
    return Encoded(mixed["context"], mixed.get("pooled", jnp.zeros((len(dropped), 0))))


def _encoded(system: System, params: Params, batch: Any, dropped: Bool[Array, " b"]) -> Encoded:
    tokens = batch["tokens"]
    blank = params[BLANK]["tokens"]
    if not system.numbers:  # SD 1 and 2 are told the empty caption
        tokens = jnp.where(dropped[:, None, None], blank, tokens)
    encoded = encode_text(system, params, Text(tuple(jnp.swapaxes(tokens, 0, 1)[:, :, None])))
    if not system.numbers:
        return encoded
    return jax.tree.map(lambda x: jnp.where(_rows(dropped, x), 0.0, x), encoded)  # SDXL is told zeros


def _rows(chosen: Bool[Array, " b"], like: Array) -> Array:
    return chosen.reshape(-1, *[1] * (like.ndim - 1))


READINGS = {"prepared": Reading(_prepared), "frozen": Reading(_encoded), "trained": Reading(_encoded, trained=True)}
"""What `task.text` may be: embeddings that were prepared, or tokens through encoders that rest or learn."""


def make(config: Config, mesh: Mesh) -> Task:
    """The task of a config whose `task.name` is "stable_diffusion". Nothing is read from disk yet.

    Raises:
        UserError: a name in the config is not what it should be, or sizes do not fit each other.
    """
    if config.task.text not in READINGS:
        raise unknown("text", config.task.text, READINGS, "config.task.text")
    reading, system, objective = READINGS[config.task.text], system_of(config), objective_of(config.task)
    if config.data.size % system.autoencoder.config.factor:
        raise UserError(f"data.size={config.data.size} is not a multiple of {system.autoencoder.config.factor}")
    encoders = tuple(encoder.name for encoder in system.text_encoders)
    trained = (UNET, *encoders) if reading.trained else (UNET,)
    still = (VAE,) if reading.trained else (VAE, *encoders)

    def init(key: PRNGKeyArray) -> Params:
        return {name: init_component(system, name, jax.random.fold_in(key, i)) for i, name in enumerate(trained)}

    def loss(params: Params, batch: Any, key: PRNGKeyArray, step: Int[Array, ""]) -> tuple[Array, Metrics]:
        del step
        latent_key, drop_key, noise_key = jax.random.split(key, 3)
        x0 = posterior(batch["moments"]).sample(latent_key) * system.scale
        dropped = jax.random.bernoulli(drop_key, config.task.caption_dropout, (len(x0),))
        told = cond(system, reading.told(system, params, batch, dropped), batch.get("sizes"))
        value = objective.loss(lambda x, t: apply(system.unet, params[UNET], x, t, told), x0, noise_key)
        return value, {"latent_std": x0.std()}

    def stored(place: Place) -> Params:
        seed, source = config.train.seed, config.task.components
        blank = _blank(config, system, place)
        read = Origin(source, seed).read(system, still, place, "config.task.components")
        if reading.trained and source:
            read |= Origin(source, seed).read(system, encoders, place, "config.task.components")
        if config.task.initial:
            read |= Origin(config.task.initial, seed).read(system, (UNET,), place, "config.task.initial")
        return {**read, BLANK: blank}

    def specimen(rows: int) -> dict[str, Any]:
        side = config.data.size // system.autoencoder.config.factor
        fields = fields_of(system, config.task.text, (side, side))
        return {name: jax.ShapeDtypeStruct((rows, *leaf.shape), leaf.dtype) for name, leaf in fields.items()}

    def sample(params: Params) -> UInt8[np.ndarray, "h w 3"]:
        images = sample_prompts(config, system, params, tokenizers_of(system, config.task.components))
        return tile(to_uint8(np.asarray(images)), config.sample.columns)

    frozen = {**shapes_of(system, still), BLANK: blank_shapes(system, config.task.text)}
    batch, export = partial(_batches, config, system, mesh), partial(_export, config, system)
    return Task(init, loss, sample, batch, export, specimen, frozen, stored)


def _blank(config: Config, system: System, place: Place) -> dict[str, jax.Array]:
    """What a picture without a caption is told: prepared beside the embeddings, or the empty caption's tokens."""
    if config.task.text == "prepared":
        source = _source(config, system)
        return {
            n: place(np.asarray(source.constants[n], np.float32), f"{BLANK}/{n}")
            for n in blank_shapes(system, "prepared")
        }
    tokens = np.stack([t.encode([""])[0] for t in tokenizers_of(system, config.task.components)])
    return {"tokens": place(tokens, f"{BLANK}/tokens")}


def _source(config: Config, system: System) -> PreparedSource:
    source = PreparedSource(Path(config.data.prepared).expanduser())
    check_identity(source.identity, identity_of(config, system), config.data.prepared)
    return source


def _batches(config: Config, system: System, mesh: Mesh, params: Params) -> Loader:
    del params
    source = _source(config, system)
    names = tuple(fields_of(system, config.task.text, (1, 1)))
    options = config.train
    rows, how = my_rows(mesh), reading_of(config)
    return bucketed(source, source.buckets, options.batch_size, options.seed, [Select(names)], rows, how)


def _export(config: Config, system: System, params: Params, folder: Path) -> None:
    side = config.data.size // system.autoencoder.config.factor
    extra = {UNET: {"sample_size": side}, VAE: {"sample_size": config.data.size}}
    checkpoint = Checkpoint(
        components={
            name: Component(sizes, params[name], extra.get(name, {})) for name, sizes in configs_of(system).items()
        },
        scheduler=config.task.scheduler.to_dict(),
        tokenizers=tokenizer_folders(system, config.task.components),
        settings={name: config.sample[name] for name in ("steps", "guidance_scale")},
    )
    write_checkpoint(folder, checkpoint, config.task.export_dtype)
