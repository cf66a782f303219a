"""Diffusion of pictures themselves, without a first stage: DDPM, iDDPM, ADM, of one kind or of classes.

Reads config.model.unet (a variant of `unet2d`, and what differs from it), config.data, config.sample (count, columns,
sampler, steps), and of config.task: scheduler, weighting, timesteps, offset_noise and export_dtype. With twice as many
output channels as input channels the variance is learned, by the hybrid loss (iDDPM, eq. 16). A UNet with classes is
told those of the data, which then needs `label`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, UInt8

from sdjax.convert.components import Checkpoint, Component
from sdjax.convert.folder import write_checkpoint
from sdjax.convert.model_index import pixel_conditioning
from sdjax.core.config import Config
from sdjax.core.errors import UserError
from sdjax.core.partition import gathered
from sdjax.core.precision import dtype_named
from sdjax.core.prng import image_keys
from sdjax.core.tree import Params
from sdjax.data import transforms
from sdjax.data.loader import Loader
from sdjax.diffusion.denoise import make_denoise
from sdjax.diffusion.guidance import classifier_guided
from sdjax.diffusion.loss import hybrid_loss, posterior_tables
from sdjax.diffusion.samplers import SamplerOptions, Table, first_noise, make_table, schedule_of
from sdjax.diffusion.samplers import sample as run_sampler
from sdjax.models.adm_classifier import Classifier
from sdjax.models.apply import apply
from sdjax.models.conditioning import Cond
from sdjax.models.unet2d import VARIANTS, UNet2D, UNet2DConfig
from sdjax.tasks.base import batches, squares, tile, to_uint8
from sdjax.tasks.latent.networks import UNET, sizes_of
from sdjax.tasks.latent.objective import objective_of
from sdjax.training.task import Metrics, Task

CHANNELS, LABEL = 3, "label"


def make(config: Config, mesh: Mesh) -> Task:
    """The task of a config whose `task.name` is "pixels".

    Raises:
        UserError: a name in the config is not what it should be, or sizes do not fit each other.
    """
    sizes = sizes_of(config.model.unet, VARIANTS, "config.model.unet")
    factor, scheduler = 2 ** (len(sizes.channels) - 1), config.task.scheduler.to_dict()
    if config.data.size % factor:
        raise UserError(f"data.size={config.data.size} is not a multiple of {factor}, by which the UNet divides sides")
    if sizes.in_channels != CHANNELS or sizes.out_channels not in (CHANNELS, 2 * CHANNELS):
        raise UserError(
            f"config.model.unet has {sizes.in_channels} channels in and {sizes.out_channels} out; pictures have 3 in, "
            "and 3 or 6 out"
        )
    learns_variance = sizes.out_channels == 2 * CHANNELS
    if learns_variance != (scheduler.get("variance_type") == "learned_range"):
        raise UserError(
            f"config.model.unet.out_channels={sizes.out_channels} and config.task.scheduler.variance_type="
            f"{scheduler.get('variance_type')!r}: 6 channels go with 'learned_range', 3 with a fixed one"
        )
    unet = UNet2D(sizes, config.train.remat, dtype_named(config.train.dtype, "config.train.dtype"))
    objective = objective_of(config.task)
    bounds = posterior_tables(objective.schedule) if learns_variance else None

    def init(key: PRNGKeyArray) -> Params:
        x, label = jnp.zeros((1, factor, factor, CHANNELS)), jnp.zeros(1, jnp.int32)
        return {UNET: dict(unet.init(key, x, jnp.zeros(1), _told(sizes, label))["params"])}

    def loss(params: Params, batch: Any, key: PRNGKeyArray, step: Int[Array, ""]) -> tuple[Array, Metrics]:
        del step
        x0 = batch["image"].astype(jnp.float32) / 127.5 - 1.0

        def network(x: Array, t: Array) -> Array:
            return apply(unet, params[UNET], x, t, _told(sizes, batch.get(LABEL)))

        if bounds is None:
            return objective.loss(network, x0, key), {}
        noised = objective.noised(x0, key)
        output = network(noised.x, noised.timesteps)
        return hybrid_loss(output, x0, noised.noise, noised.timesteps, bounds, objective.prediction).mean(), {}

    def sample(params: Params) -> UInt8[np.ndarray, "h w 3"]:
        options = config.sample
        chosen = SamplerOptions.from_scheduler_config(scheduler, options.sampler)
        table = make_table(options.sampler, schedule_of(scheduler), options.steps, chosen)
        keys = image_keys(config.train.seed, jnp.arange(options.count))
        labels = None if sizes.classes is None else np.arange(options.count) % sizes.classes
        images = draw(unet, params[UNET], table, keys, config.data.size, objective.prediction, labels)
        return tile(to_uint8(np.asarray(images)), options.columns)

    def batch(params: Params) -> Loader:
        del params
        pictures, changes = squares(config)
        if config.data.flip:
            changes.append(transforms.Flip())
        if sizes.classes is not None:
            changes.append(transforms.InRange(LABEL, sizes.classes))
        changes.append(transforms.Select(("image",) if sizes.classes is None else ("image", LABEL)))
        return batches(config, pictures, changes, mesh)

    def export(params: Params, folder: Path) -> None:
        component = Component(sizes, params[UNET], {"sample_size": config.data.size})
        conditioning = pixel_conditioning(sizes, "config.model.unet")
        checkpoint = Checkpoint(components={UNET: component}, scheduler=scheduler, conditioning=conditioning)
        write_checkpoint(folder, checkpoint, config.task.export_dtype)

    def specimen(rows: int) -> dict[str, Any]:
        side = config.data.size
        labels = {} if sizes.classes is None else {LABEL: jax.ShapeDtypeStruct((rows,), jnp.int32)}
        return {"image": jax.ShapeDtypeStruct((rows, side, side, CHANNELS), jnp.uint8), **labels}

    return Task(init, loss, sample, batch, export, specimen)


def _told(sizes: UNet2DConfig, label: Array | None) -> Cond:
    return Cond(label=None if sizes.classes is None else label)


class Guide(NamedTuple):
    """What draws pictures to their classes.

    Attributes:
        classifier: of noisy pictures; its parameters.
        params: the classifier's.
        scale: s of ADM, 0 for none.
    """

    classifier: Classifier
    params: Params
    scale: Float[Array, ""] | float


def draw(
    unet: UNet2D,
    params: Params,
    table: Table,
    keys: Key[Array, " n"],
    side: int,
    prediction: str,
    labels: Int[Array | np.ndarray, " n"] | None = None,
    guide: Guide | None = None,
) -> Float[Array, "n s s 3"]:
    """Pictures in [0, 1].

    Args:
        unet: the module; `params` are its parameters.
        table: of `make_table`.
        keys: one an image.
        side: of the pictures.
        prediction: what the UNet predicts.
        labels: the classes, of a UNet that is told them or for a guide.
        guide: a classifier; another scale of it compiles nothing.
    """
    classifier, *rest = guide or (None, None, 0.0)
    return _draw((unet, side, prediction, classifier), params, table, keys, labels, *rest)


@jax.jit(static_argnums=0)
def _draw(
    fixed: tuple[UNet2D, int, str, Classifier | None],
    params: Params,
    table: Table,
    keys: Key[Array, " n"],
    labels: Array | None,
    judge: Params | None,
    scale: Array | float,
) -> Float[Array, "n s s 3"]:
    unet, side, prediction, classifier = fixed
    cond = _told(unet.config, labels)
    denoise = make_denoise(lambda x, t: apply(unet, params, x, t, cond), prediction)
    if classifier is not None:
        assert judge is not None, "a guide has parameters"
        assert labels is not None, "a guide needs classes"

        def log_probability(x: Array, t: Array) -> Array:
            logits = jax.nn.log_softmax(apply(classifier, judge, x, t))
            return jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]

        denoise = classifier_guided(denoise, log_probability, scale)
    noise = first_noise(keys, (side, side, CHANNELS))
    return gathered(jnp.clip(run_sampler(denoise, table, noise * table.first_scale, keys) / 2.0 + 0.5, 0.0, 1.0))
