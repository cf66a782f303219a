"""Training of diffusion models: every condition, latents or pixels, whole or in parts (LDM, eq. 2 and 3; DDPM; ADM).

Reads config.model (`unet`; `autoencoder` where no first stage is named; what the condition has), config.data,
config.sample, config.train.trainable, and of config.task (without a `unet`, see `sdjax.tasks.finetune`):

    conditioning   a key of `sdjax.tasks.conditions.CONDITIONS`
    latents        "encoded" in every step, "cached" in memory, "prepared" on disk; "encoded" for pixels, too
    first_stage    folder with the autoencoder, its run's workdir, or the config that trains it; "" for components',
                   "none" for pixels
    controlnet     `sdjax.tasks.control`, where config.model has one
    lora           `sdjax.tasks.lora`, where factors are learnt beside frozen networks
    components     source of frozen networks; "" for that of `initial`, and where there is none, they are drawn
    initial        source of networks that training begins from; "" for fresh ones
    dropout        probability of the null condition
    scheduler, weighting, norm, timesteps, offset_noise, export_dtype

With twice as many output channels as latents have the variance is learned, by the hybrid loss (iDDPM, eq. 16).
"""

from __future__ import annotations

import functools
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray, UInt8

from sdjax.checkpoints.checkpoint import CONTROLNET, Checkpoint, Component
from sdjax.checkpoints.layouts.diffusers import ZEROS, read_config
from sdjax.checkpoints.layouts.original import TOKENIZER_FOLDERS
from sdjax.checkpoints.open import within_workdir
from sdjax.core.config import Config
from sdjax.core.errors import UserError
from sdjax.core.precision import dtype_named
from sdjax.core.prng import stream_below
from sdjax.core.tree import Params, flatten, merge
from sdjax.data.loader import Loader
from sdjax.diffusion.denoise import per_image
from sdjax.diffusion_model.conditioner import Columns, Conditioner
from sdjax.diffusion_model.conditioners import CAPTIONS, TEXT
from sdjax.diffusion_model.conditioners.text import NULL
from sdjax.diffusion_model.model import AUTOENCODER, BACKBONE, DiffusionModel, backbone_of, check_fit
from sdjax.models import autoencoder
from sdjax.models.autoencoder import autoencoder_of
from sdjax.models.lora import DROPOUT, FIXED, LORA, with_dropout
from sdjax.tasks.base import data_identity, open_images
from sdjax.tasks.class_images import make_class_images
from sdjax.tasks.conditions import TrainingCondition, embedding_shapes, training_condition
from sdjax.tasks.control import first_weights, with_control
from sdjax.tasks.exports import Learnt, export_of
from sdjax.tasks.finetune import PIXELS, from_checkpoint, is_finetuning
from sdjax.tasks.latents import latent_source, open_prepared
from sdjax.tasks.lora import adapter_of
from sdjax.tasks.objective import objective_of
from sdjax.tasks.pretrained import frozen_source, init_component, read_components
from sdjax.tasks.preview import preview, preview_prompts
from sdjax.tasks.prior import has_prior, interleaved
from sdjax.tasks.variants import BACKBONES, sizes_of
from sdjax.tasks.words import first_vectors, learnt_words, without_words
from sdjax.training.task import DevicePut, Metrics, Task, select, split_like

CONDITION = "condition"  # stream of the noise of conditions


def make(config: Config, mesh: Mesh) -> Task:
    """The task of a config whose `task.name` is "diffusion"; of data and weights nothing is kept yet.

    Raises:
        UserError: a name in the config is not what it should be, or sizes do not fit each other.
    """
    config = from_checkpoint(config) if is_finetuning(config) else config
    model, condition = make_model(config)
    source = latent_source(config, model, condition, mesh)
    objective = objective_of(config.task, learned=model.config.out_channels == 2 * model.channels)
    prior = config.task.prior_weight if has_prior(config) else None
    adapter = adapter_of(config, model)
    shapes = jax.eval_shape(lambda key: adapter.added(init_all(model, key), key), jax.random.key(0))
    trainable, frozen = split_trainable(config, condition, shapes, adapter.trainable)
    frozen = in_frozen_dtype(config, frozen)
    entry = adapter.entry if adapter.patterns else None
    form = export_of(config.task, flatten(trainable), entry=entry, words=[new.word for new in condition.words])

    @functools.cache
    def prompts() -> tuple[str, ...]:
        return () if condition.text is None else preview_prompts(config)

    def init(key: PRNGKeyArray) -> Params:
        made = {name: init_component(model, name, jax.random.fold_in(key, i)) for i, name in enumerate(trainable)}
        return split_like(adapter.added(made, key), trainable)[0]

    def loss(params: Params, batch: Any, key: PRNGKeyArray, step: Int[Array, ""]) -> tuple[Array, Metrics]:
        del step
        batch = interleaved(batch)
        latent_key, noise_key, drop_key = jax.random.split(key, 3)
        params = with_dropout(params, stream_below(key, DROPOUT))
        x0 = source.latents(params, batch, latent_key)
        columns = drop_condition(model.conditioner, condition.columns(batch), drop_key, config.task.dropout)
        images = model.conditioner.images_to_encode(columns)
        encoded = {name: jax.lax.stop_gradient(model.encode(params, image)) for name, image in images.items()}
        columns = {**columns, **encoded}
        columns = {**columns, **model.conditioner.precompute(params, columns)}
        cond = model.conditioner.cond(params, columns, jax.random.split(stream_below(key, CONDITION), len(x0)))
        wrapped = model.conditioner.wrap(params, columns, model.network(params))

        def network(x: Array, t: Array) -> Array:
            return wrapped(x, t, cond)

        value = objective.loss(network, x0, noise_key, prior)
        metrics = {} if model.autoencoder is None else {"latent_std": x0.std()}
        if adapter.forgetting:
            metrics["forgetting"] = adapter.penalty(params)
            value += metrics["forgetting"]
        return value, metrics

    def pretrained(put: DevicePut) -> Params:
        dtypes = {path: leaf.dtype for path, leaf in flatten(frozen).items()}

        def typed_put(array: np.ndarray, path: str) -> Array:
            return put(array.astype(dtypes.get(path, np.float32)), path)

        read = read_pretrained(config, model, set(trainable), set(frozen), typed_put)
        words = first_vectors(condition.words, condition.loaded, read, mesh)
        return merge(merge(read, adapter.given(read, put, mesh)), words)

    def export(params: Params, folder: Path) -> None:
        checkpoint = checkpoint_of(config, model, condition, without_words(params))
        words = learnt_words(condition.words, params)
        form.write(
            folder, Learnt(config, checkpoint, words, flatten(trainable), adapter.entry), config.task.export_dtype
        )

    def batch(params: Params) -> Loader:
        make_class_images(config, model, condition, params)
        return source.batches(params)

    def show(params: Params) -> UInt8[np.ndarray, "h w 3"]:
        return preview(config, model, condition, params, prompts())

    def batch_spec(rows: int) -> dict[str, Any]:
        return {name: jax.ShapeDtypeStruct((rows, *row.shape), row.dtype) for name, row in source.spec.items()}

    inputs = "".join(f" --{name} ..." for name in model.conditioner.traits.required)
    use = f"python sample.py --config {{config}} {form.flags}{inputs}"
    return Task(init, loss, show, batch, export, batch_spec, frozen, pretrained, use, lambda: data_identity(config))


def make_model(config: Config) -> tuple[DiffusionModel, TrainingCondition]:
    """The networks of a config and their condition.

    Raises:
        UserError: a variant is unknown, or sizes do not fit each other.
    """
    sizes = sizes_of(config.model.unet, BACKBONES, "config.model.unet")
    first_stage = first_stage_of(config)
    condition = training_condition(config, first_stage, sizes)
    if CONTROLNET in config.model:
        condition = with_control(condition, config, first_stage.factor if first_stage else 1, sizes)
    backbone = backbone_of(sizes, dtype_named(config.train.dtype, "config.train.dtype"), config.train.remat)
    coder = None if first_stage is None else autoencoder_of(first_stage)
    model = DiffusionModel(backbone, coder, condition.conditioner, config.task.scheduler.prediction_type)
    if config.data.size % model.multiple:
        raise UserError(
            f"config.data.size={config.data.size} is not a multiple of {model.multiple}, which the networks need"
        )
    check_fit(model, "config.model")
    if coder is None:
        _check_variance(config, sizes.out_channels == 2 * model.channels)
    return model, condition


def first_stage_of(config: Config) -> Any:
    """Config of the autoencoder: that of the first stage's folder, else of `config.model.autoencoder`; None for pixels.

    Raises:
        UserError: it cannot be read.
    """
    folder = config.task.get("first_stage", "")
    if folder == PIXELS:
        return None
    if folder:
        return read_config(within_workdir(Path(folder)) / AUTOENCODER, AUTOENCODER)
    return sizes_of(config.model.autoencoder, autoencoder.VARIANTS, "config.model.autoencoder")


def _check_variance(config: Config, learned: bool) -> None:
    if learned != (config.task.scheduler.get("variance_type") == "learned_range"):
        raise UserError(
            f"config.model.unet.out_channels={6 if learned else 3} and config.task.scheduler.variance_type="
            f"{config.task.scheduler.get('variance_type')!r}: 6 channels go with 'learned_range', 3 with a fixed one"
        )


def init_all(model: DiffusionModel, key: PRNGKeyArray) -> Params:
    """Fresh parameters of every component; traceable."""
    return {name: init_component(model, name, key) for name in model.configs()}


def split_trainable(
    config: Config, condition: TrainingCondition, shapes: Params, usual: tuple[str, ...] = ()
) -> tuple[Params, Params]:
    """Shapes of the parameters that `config.train.trainable` names, and of all others.

    Args:
        usual: patterns where the config names none; () is all but the autoencoder's.

    Raises:
        UserError: a pattern matches nothing.
    """
    patterns = tuple(config.train.trainable) or usual or tuple(name for name in shapes if name != AUTOENCODER)
    trainable, frozen = select(shapes, patterns)
    fixed, trainable = select(trainable, FIXED)
    frozen = merge(frozen, fixed)
    for pattern in patterns:
        if not select(shapes, (pattern,))[0]:
            raise UserError(
                f"config.train.trainable: {pattern!r} matches no parameter; components are {', '.join(shapes)}"
            )
    if config.task.conditioning == TEXT and config.task.text == "prepared":
        encoders = set(condition.tokenizers)
        if encoders & set(trainable):
            raise UserError("config.train.trainable names a text encoder, but config.task.text='prepared' freezes them")
        # Precomputed embeddings take the encoders' place; those of the null condition stand beside the parameters.
        conditioner: Any = condition.conditioner
        frozen = {**frozen, NULL: embedding_shapes(conditioner)}
    return trainable, frozen


def in_frozen_dtype(config: Config, shapes: Params) -> Params:
    """Shapes of frozen networks in `config.train.frozen_dtype`; autoencoder and factors, which are small, stay as they
    are."""
    dtype = dtype_named(config.train.frozen_dtype, "config.train.frozen_dtype")
    _, cast = select(shapes, (AUTOENCODER, NULL, f"*/{LORA}/*"))
    return merge(shapes, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), cast))


def drop_condition(conditioner: Conditioner, columns: Columns, key: PRNGKeyArray, probability: float) -> Columns:
    """Columns with the null condition for a share of the rows, for classifier-free guidance (Ho & Salimans 2022)."""
    null = conditioner.null(columns)
    if null is None or not probability:
        return columns
    drops = jax.random.bernoulli(key, probability, (len(next(iter(columns.values()))),))
    return {
        name: value if null[name] is value else jnp.where(per_image(drops, jnp.asarray(value)), null[name], value)
        for name, value in columns.items()
    }


def read_pretrained(
    config: Config, model: DiffusionModel, trainable: set[str], frozen: set[str], put: DevicePut
) -> Params:
    """Every frozen component, and the trainable ones that do not begin from random numbers.

    Raises:
        UserError: a source cannot be read, or has other sizes than the config describes.
    """
    task, sources = config.task, defaultdict(list)
    for name in sorted((frozen | trainable) - {NULL, CONTROLNET}):
        if name == AUTOENCODER and task.get("first_stage"):
            sources["first_stage", task.first_stage].append(name)
        elif name in trainable and task.get("initial"):
            sources["initial", task.initial].append(name)
        elif name in frozen or (task.get("components") and name != BACKBONE):
            sources[frozen_source(task)].append(name)
    read: Params = {}
    for (key, source), names in sources.items():
        read |= read_components(source, model, names, put, f"config.task.{key}", config.train.seed)
    if CONTROLNET in trainable:
        read[CONTROLNET] = first_weights(config, model.configs()[CONTROLNET], read[BACKBONE], put)
    if NULL in frozen:
        constants = open_prepared(config, model).constants
        conditioner: Any = model.conditioner
        names = embedding_shapes(conditioner)
        read[NULL] = {name: put(np.asarray(constants[name], np.float32), f"{NULL}/{name}") for name in names}
    return read


def checkpoint_of(config: Config, model: DiffusionModel, condition: TrainingCondition, params: Params) -> Checkpoint:
    """A finished model as others read it."""
    side = config.sample.get("size", config.data.size)  # larger than the crops that some learn from
    extra = {BACKBONE: {"sample_size": side // model.factor}, AUTOENCODER: {"sample_size": side}}
    own = [name for name, folder in condition.tokenizers.items() if folder.parent != TOKENIZER_FOLDERS]
    for name in own if condition.text is not None else ():
        tokenizer = condition.loaded[name]
        extra[name] = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    components = {name: Component(sizes, params[name], extra.get(name, {})) for name, sizes in model.configs().items()}
    return Checkpoint(
        components=components,
        scheduler=config.task.scheduler.to_dict(),
        conditioning=config.task.conditioning,
        settings=settings_of(config, model, condition),
        tokenizers=dict(condition.tokenizers),
        low_res_scheduler=condition.low_res_scheduler,
        model_index={ZEROS: config.task[ZEROS]} if ZEROS in config.task else {},
    )


def settings_of(config: Config, model: DiffusionModel, condition: TrainingCondition) -> dict[str, Any]:
    """Settings for sampling a finished model, and facts of its condition."""
    if config.task.conditioning in (TEXT, CAPTIONS):
        return {name: config.sample[name] for name in ("steps", "guidance_scale")} | model.conditioner.settings
    if model.autoencoder is None:
        return {}
    names = open_images(config).classes
    return {
        "size": config.data.size,
        "steps": config.sample.steps,
        "sampler": config.sample.sampler,
        "guidance_scale": config.sample.guidance_scale,
        **condition.settings,
        **model.conditioner.settings,
        **({"classes": list(names)} if names else {}),
    }
