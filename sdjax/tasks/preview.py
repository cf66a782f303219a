"""Images of a model while it is in training: always of the same conditions, from the same noise."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from sdjax.core.config import Config
from sdjax.core.prng import image_keys
from sdjax.core.tree import Params
from sdjax.data.image_inputs import paste_back
from sdjax.data.images import tile, to_uint8
from sdjax.data.sources.base import CONDITIONING_IMAGE
from sdjax.data.transforms import crops
from sdjax.data.transforms import images as transforms
from sdjax.diffusion.samplers import SamplerTable, batched, first_noise, table_for
from sdjax.diffusion_model import sampling
from sdjax.diffusion_model.conditioner import Columns, Host
from sdjax.diffusion_model.model import DiffusionModel
from sdjax.diffusion_model.sampling import Guidance, SamplingBatch, Start
from sdjax.tasks.base import gathered, open_images
from sdjax.tasks.conditions import TrainingCondition
from sdjax.tasks.latents import IMAGE, TOKENS, example_transforms

logger = logging.getLogger("sdjax")


def preview_prompts(config: Config) -> tuple[str, ...]:
    """`config.sample.prompts`, or where it names none, different captions of the data; the log says which."""
    if config.sample.prompts:
        return tuple(config.sample.prompts)
    images, count = open_images(config), config.sample.columns
    captions = [images[i]["caption"] for i in evenly(range(len(images)), 4 * count)]
    chosen = tuple(evenly(list(dict.fromkeys(captions)), count))
    logger.info("samples while training: %s; --config.sample.prompts changes them", ", ".join(map(repr, chosen)))
    return chosen


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, in even steps from the first one."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def preview(
    config: Config, model: DiffusionModel, condition: TrainingCondition, params: Params, prompts: tuple[str, ...]
) -> np.ndarray:
    """A sheet of prompts, or without any, of conditions of the data below their own images, uint8 [h w 3].

    Under hints of the data both are shown, captions and hints below the images, or the prompts with hints.

    Raises:
        UserError: the sampler or a prompt does not fit.
    """
    options, size = config.sample, (config.data.size, config.data.size)
    if CONDITIONING_IMAGE in condition.spec:
        batch = preview_batch(config, condition, len(prompts) or options.count)
        if prompts:
            batch[TOKENS] = np.stack([condition.loaded[n].encode(list(prompts)) for n in condition.tokenizers], axis=1)
        columns, rows = condition.columns(batch), [batch[IMAGE], batch[CONDITIONING_IMAGE]]
    elif prompts:
        columns, rows = prompt_columns(config, model, condition, prompts), [np.zeros((0, *size, 3), np.uint8)]
    else:
        batch = preview_batch(config, condition, options.count)
        columns, rows = condition.columns(batch), [batch[IMAGE]]
    images = sample_columns(config, model, params, columns, size)
    return tile(np.concatenate([*rows, to_uint8(images)]), options.columns)


def sample_columns(
    config: Config, model: DiffusionModel, params: Params, columns: Columns, size: tuple[int, int], first: int = 0
) -> np.ndarray:
    """Images in [0, 1] of a batch of columns, with the sampler of `config.sample`, numbered from `first` on."""
    options = config.sample
    count = len(next(iter(columns.values())))
    table = table_for(
        config.task.scheduler.to_dict(), options.sampler, options.steps, latents=model.autoencoder is not None
    )
    scale = options.get("guidance_scale", 1.0)
    guidance = Guidance(np.full(count, scale, np.float32), np.zeros(count, np.float32))
    keys = image_keys(config.train.seed, first + jnp.arange(count))
    images = generate(model, params, columns, batched([table] * count), guidance, keys, size)
    known = model.conditioner.known(columns)
    if known is None:
        return images
    pairs = zip(images, *map(np.asarray, known), strict=True)
    return np.stack([paste_back(made, given, mask, model.conditioner.traits.feather) for made, given, mask in pairs])


def prompt_columns(
    config: Config, model: DiffusionModel, condition: TrainingCondition, prompts: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Columns of prompts, unweighted."""
    size = (config.data.size, config.data.size)
    host = Host("the model", {}, condition.loaded, size, model.latent_shape(size)[:2])
    inputs = [{"prompt": prompt, "negative_prompt": None, "syntax": "plain"} for prompt in prompts]
    rows = [model.conditioner.encode(one, host) for one in inputs]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def preview_batch(
    config: Config, condition: TrainingCondition, count: int, split: str = "train"
) -> dict[str, UInt8[np.ndarray, "..."]]:
    """Images, evenly chosen, with their conditions, as a batch has them; always the same ones."""
    images = crops.still(open_images(config, split), config.data.size, config.data.crop)
    chosen: Any = images.slice(slice(None, None, max(len(images) // count, 1))).seed(config.train.seed)
    for change in [*example_transforms(condition), transforms.Select((IMAGE, *condition.spec))]:
        chosen = chosen.random_map(change) if isinstance(change, grain.transforms.RandomMap) else chosen.map(change)
    rows = [chosen[i] for i in range(count)]
    return {name: np.stack([row[name] for row in rows]) for name in (IMAGE, *condition.spec)}


def generate(
    model: DiffusionModel,
    params: Params,
    columns: Columns,
    tables: SamplerTable,
    guidance: Guidance,
    keys: Key[Array, " b"],
    size: tuple[int, int],
) -> Float[np.ndarray, "b H W 3"]:
    """Images in [0, 1] of some conditions, in one go: for previews while a model is in training.

    Args:
        model, params: of all components.
        columns: of the conditioner.
        tables: of `batched`.
        guidance: see `Guidance`; it acts where the conditioner has a null condition.
        keys: one an image.
        size: height and width in pixels.
    """
    encoded = {
        name: jnp.split(sampling.encode(model, params, x)[0], 2, axis=-1)[0]
        for name, x in model.conditioner.images_to_encode(columns).items()
    }
    columns = {**columns, **encoded}
    null = model.config.guidance_dim is None and model.has_null and bool(np.any(np.asarray(guidance.scale) > 1.0))
    cond, shown, _ = sampling.condition(model, params, columns, keys, guidance, guided=null)
    noise = first_noise(keys, model.latent_shape(size))
    zeros = jnp.zeros_like(noise)
    state = sampling.start_state(tables, noise, zeros, np.ones(len(keys), bool))
    start = Start(zeros, noise, jnp.ones_like(noise[..., :1]))
    batch = SamplingBatch(tables, cond, shown, guidance, keys, start)
    state, _ = sampling.sample(model, params, batch, state, 0, int(np.max(np.sum(tables.active, axis=1))))
    images, _ = sampling.decode(model, params, state.x)
    return np.asarray(jax.jit(gathered)(images))
