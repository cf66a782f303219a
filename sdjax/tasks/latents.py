"""Three ways to a batch's latents: encoded in every step, cached in memory, or prepared on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from sdjax.core.config import Config
from sdjax.core.errors import UserError, unknown
from sdjax.core.tree import Params
from sdjax.data.bucketed import bucketed
from sdjax.data.loader import Loader
from sdjax.data.prepared.dataset import PreparedSource
from sdjax.data.sources import open as sources
from sdjax.data.sources.base import CONDITIONING_IMAGE
from sdjax.data.transforms import crops
from sdjax.data.transforms import images as transforms
from sdjax.data.transforms.buckets import Size, ToBucket
from sdjax.data.transforms.conditions import DRAW_CAPTION, Draw, Tokenize
from sdjax.data.transforms.images import Select
from sdjax.diffusion_model.model import AUTOENCODER, DiffusionModel
from sdjax.models.autoencoder import posterior
from sdjax.models.conditioning import apply
from sdjax.tasks.base import batches, gathered, loader_options, open_images, process_shard, square_crops
from sdjax.tasks.conditions import TrainingCondition
from sdjax.tasks.precompute import STORED, check_identity, identity_of
from sdjax.tasks.prior import for_both, of_both, paired

IMAGE, MOMENTS, TOKENS, SIZES = "image", "moments", "tokens", "sizes"
PIXELS_AT_ONCE = 64 * 128**2  # of images that are encoded in one go, so that large ones fit into memory


class LatentSource(NamedTuple):
    """Clean latents of a run.

    Attributes:
        spec: columns of one row of a batch, the condition's among them.
        latents: (params, batch, key) -> scaled latents.
        batches: params -> the endless iterator over this process's rows.
    """

    spec: Mapping[str, jax.ShapeDtypeStruct]
    latents: Callable[[Params, Mapping[str, Any], PRNGKeyArray], Float[Array, "b *space z"]]
    batches: Callable[[Params], Loader]


def latent_source(config: Config, model: DiffusionModel, condition: TrainingCondition, mesh: Mesh) -> LatentSource:
    """The way that `config.task.latents` names.

    Raises:
        UserError: there is none of this name, or it does not keep what the condition needs.
    """
    if config.task.latents not in SOURCES:
        raise unknown("latents", config.task.latents, SOURCES, "config.task.latents")
    fits = ["encoded"]
    if condition.text is not None:
        fits = ["cached", "encoded", "prepared"] if TOKENS in condition.spec else ["prepared"]
        fits = [way for way in fits if way != "prepared" or CONDITIONING_IMAGE not in condition.spec]
    elif not condition.spec and model.autoencoder is not None:
        fits = ["encoded", "cached"]
    if config.task.latents not in fits:
        raise UserError(
            f"config.task.latents={config.task.latents!r} does not fit config.task.conditioning="
            f"{config.task.conditioning!r} here; choose {' or '.join(map(repr, fits))}"
        )
    return SOURCES[config.task.latents](config, model, condition, mesh)


def encoded(config: Config, model: DiffusionModel, condition: TrainingCondition, mesh: Mesh) -> LatentSource:
    """Images through the autoencoder in every step, as in the LDM paper; pixels are their own latents."""
    side = config.data.size
    image = jax.ShapeDtypeStruct((side, side, 3), jnp.uint8)
    spec = of_both(config, {IMAGE: image, **condition.spec})

    def load(params: Params) -> Loader:
        del params
        cuts: list[Any] = crops.random_cuts(side, config.data.crop, config.data.crop_sides)
        if SIZES in condition.spec:
            cuts = [ToBucket((Size(side, side),), config.data.crop)]
        flips = [transforms.Flip()] if config.data.flip else []
        changes = for_both(config, [*cuts, *flips, *example_transforms(condition)])
        return batches(config, paired(config, images), [*changes, transforms.Select(tuple(spec))], mesh)

    def images(config: Config) -> sources.Source:
        return sources.CachedSource(open_images(config)) if SIZES in condition.spec else square_crops(config)[0]

    def latents(params: Params, batch: Mapping[str, Any], key: PRNGKeyArray) -> Array:
        return jax.lax.stop_gradient(encode_sampled(model, params, batch[IMAGE], key))

    return LatentSource(spec, latents, load)


def example_transforms(condition: TrainingCondition) -> list[Any]:
    """Transforms that add the columns of a condition, tokens of captions among them, to a square image."""
    if TOKENS not in condition.spec or condition.text is None:
        return list(condition.transforms)
    tokenizers = tuple(condition.loaded[name] for name in condition.tokenizers)
    return [DRAW_CAPTION, Tokenize(tokenizers), *condition.transforms]


def encode_sampled(
    model: DiffusionModel, params: Params, images: UInt8[Array, "b H W 3"], key: PRNGKeyArray
) -> Float[Array, "b h w z"]:
    """Scaled latents of images, drawn from their posterior."""
    x = jnp.asarray(images, jnp.float32) / 127.5 - 1.0
    if model.autoencoder is None:
        return x
    return apply(model.autoencoder, params[AUTOENCODER], x, method="encode").sample(key) * model.scale


def cached(config: Config, model: DiffusionModel, condition: TrainingCondition, mesh: Mesh) -> LatentSource:
    """Moments of every image, computed at the start and kept in memory, with the tokens of its caption.

    Where the condition has SDXL's sizes, or a ControlNet's hints, they are kept, too.
    """

    def load(params: Params) -> Loader:
        draws = [Draw(TOKENS, TOKENS)] if condition.spec else []
        return batches(config, paired(config, lambda own: rows(own, params)), for_both(config, draws), mesh)

    def rows(config: Config, params: Params) -> sources.Source:
        images, side = grain.MapDataset.source(open_images(config)), config.data.size
        if SIZES in condition.spec:
            images = images.seed(config.train.seed).random_map(ToBucket((Size(side, side),), config.data.crop))
        else:
            images = images.map(transforms.Square(side, config.data.crop))
        if config.data.get("flip"):  # both sides of every image are kept
            mirrored = images.seed(config.train.seed).random_map(transforms.Flip(1.0))
            images = grain.MapDataset.concatenate([images, mirrored])
        for change in condition.transforms:
            images = images.map(change)
        return cache_latents(model, params, images, condition)

    spec = {MOMENTS: jax.ShapeDtypeStruct(_moments_shape(config, model), jnp.float32), **condition.spec}
    return LatentSource(of_both(config, spec), _from_moments(model), load)


def prepared(config: Config, model: DiffusionModel, condition: TrainingCondition, mesh: Mesh) -> LatentSource:
    """Moments and captions that `python -m sdjax.prepare` wrote, in buckets of aspect."""
    spec = {MOMENTS: jax.ShapeDtypeStruct(_moments_shape(config, model), STORED), **condition.spec}

    def load(params: Params) -> Loader:
        del params
        source, options = open_prepared(config, model), config.train
        shard, reading = process_shard(mesh), loader_options(config)
        chosen = [Select(tuple(spec))]
        return bucketed(source, source.buckets, options.batch_size, options.seed, chosen, shard, reading)

    return LatentSource(spec, _from_moments(model), load)


SOURCES = {"encoded": encoded, "cached": cached, "prepared": prepared}


def open_prepared(config: Config, model: DiffusionModel) -> PreparedSource:
    """The data of `config.data.prepared`.

    Raises:
        UserError: it was prepared with other networks.
    """
    source = PreparedSource(Path(config.data.prepared).expanduser())
    check_identity(source.identity, identity_of(config, model), config.data.prepared)
    return source


def cache_latents(
    model: DiffusionModel, params: Params, images: sources.Source, condition: TrainingCondition
) -> sources.ArraySource:
    """Moments of every image's latents, float32, and the tokens of each of its captions: a row an image."""

    @jax.jit
    def encode(params: Params, images: Array) -> Array:
        x = images.astype(jnp.float32) / 127.5 - 1.0
        latent = apply(model.autoencoder, params, x, method="encode")  # pyright: ignore[reportArgumentType]
        return gathered(jnp.concatenate([latent.mean, latent.logvar], axis=-1))

    moments, captions = [], []
    kept: dict[str, list[Any]] = {name: [] for name in (SIZES, CONDITIONING_IMAGE) if name in condition.spec}
    at_once = min(max(PIXELS_AT_ONCE // images[0][IMAGE][..., 0].size, 1), len(images))
    for start in range(0, len(images), at_once):
        rows: Any = [images[i] for i in range(start, min(start + at_once, len(images)))]
        stack = np.stack([row[IMAGE] for row in rows])
        padded = np.pad(stack, [(0, at_once - len(rows)), (0, 0), (0, 0), (0, 0)])
        moments.append(np.asarray(encode(params[AUTOENCODER], padded))[: len(rows)])
        captions += [row.get("captions", (row["caption"],)) for row in rows]
        for name, values in kept.items():
            values += [row[name] for row in rows]
    columns: dict[str, Any] = {MOMENTS: np.concatenate(moments), **{n: np.stack(values) for n, values in kept.items()}}
    if TOKENS in condition.spec:
        columns[TOKENS] = caption_tokens(condition, captions)
    return sources.ArraySource(columns)


def caption_tokens(
    condition: TrainingCondition, captions: Sequence[Sequence[str]]
) -> list[Int[np.ndarray, "captions encoders l"]]:
    """Tokens of all captions of each image."""
    texts = [text for several in captions for text in several]
    tokens = np.stack([condition.loaded[name].encode(texts) for name in condition.tokenizers], axis=1)
    return np.split(tokens, np.cumsum([len(several) for several in captions])[:-1])


def _moments_shape(config: Config, model: DiffusionModel) -> tuple[int, ...]:
    height, width, channels = model.latent_shape((config.data.size, config.data.size))
    return height, width, 2 * channels


def _from_moments(model: DiffusionModel) -> Callable[[Params, Mapping[str, Any], PRNGKeyArray], Array]:
    def latents(params: Params, batch: Mapping[str, Any], key: PRNGKeyArray) -> Array:
        del params
        return posterior(batch[MOMENTS]).sample(key) * model.scale

    return latents
