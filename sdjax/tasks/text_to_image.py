"""Training of text-to-image latent diffusion: a UNet and its text encoder over a finished autoencoder's latents.

Reads config.model (unet, text_encoder, tokenizer), config.data, config.sample, and of config.task: first_stage,
initial, scheduler, weighting, timesteps, caption_dropout, offset_noise and export_dtype.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from sdjax.convert.components import FORMATS
from sdjax.convert.folder import Checkpoint, Component, read_component, read_config, write_folder
from sdjax.core.config import Config
from sdjax.core.errors import UserError, unknown
from sdjax.core.precision import dtype_named
from sdjax.core.prng import image_keys
from sdjax.data import loader, sources, transforms
from sdjax.data.tokenizers import Tokenizer, load_tokenizer
from sdjax.diffusion.loss import diffusion_loss, gather, offset_noise, q_sample
from sdjax.diffusion.samplers import SamplerOptions, first_noise, make_table, schedule_of
from sdjax.models.autoencoder import Autoencoder, posterior
from sdjax.models.clip import CLIPText, CLIPTextConfig
from sdjax.models.conditioning import Cond
from sdjax.models.unet import UNet, UNetConfig
from sdjax.tasks.base import apply, this_shard, tile, to_uint8
from sdjax.tasks.latent import (
    Asked,
    Guidance,
    Start,
    System,
    Text,
    TextEncoder,
    cond,
    conditions,
    decode,
    denoise_latents,
    encode_text,
)
from sdjax.training.task import Metrics, Params, Place, Task


def make(config: Config, mesh: Mesh) -> Task:
    """The task of a config whose `task.name` is "text_to_image".

    Raises:
        UserError: the first stage, the tokenizer or a name in the config is not what it should be.
    """
    del mesh
    vae = Path(config.task.first_stage) / "vae"
    first_stage = read_config(vae, "vae")
    tokenizer = load_tokenizer(config.model.tokenizer)
    system = make_system(config, first_stage, tokenizer)
    schedule = schedule_of(config.task.scheduler.to_dict())
    draw_timesteps = TIMESTEPS.get(config.task.timesteps)
    if draw_timesteps is None:
        raise unknown("timestep distribution", config.task.timesteps, TIMESTEPS, "config.task.timesteps")
    empty = tokenizer.encode([""])
    side = config.data.size // first_stage.factor

    def init(key: PRNGKeyArray) -> Params:
        unet_key, text_key = jax.random.split(key)
        text = _text_encoder(system).init(text_key, empty)["params"]
        context = Cond(context=jnp.zeros((1, tokenizer.length, system.context_width)))
        x = jnp.zeros((1, side, side, first_stage.latent_channels))
        unet = system.unet.init(unet_key, x, jnp.zeros(1), context)["params"]
        return {"unet": unet, "text_encoder": text}

    def loss(params: Params, batch: Any, key: PRNGKeyArray) -> tuple[Array, Metrics]:
        latent_key, noise_key, time_key, drop_key = jax.random.split(key, 4)
        x0 = posterior(batch["moments"]).sample(latent_key) * system.scale
        noise = jax.random.normal(noise_key, x0.shape)
        if config.task.offset_noise:
            noise = offset_noise(jax.random.fold_in(noise_key, 1), noise, config.task.offset_noise)
        t = draw_timesteps(time_key, len(x0), schedule.num_timesteps)
        abar = gather(schedule.alphas_cumprod, t)
        dropped = jax.random.bernoulli(drop_key, config.task.caption_dropout, (len(x0), 1))
        text = encode_text(system, params, _one_chunk(jnp.where(dropped, empty, batch["tokens"])))
        output = apply(system.unet, params["unet"], q_sample(x0, noise, abar), t, cond(system, text, None))
        losses = diffusion_loss(output, x0, noise, abar, system.prediction, config.task.weighting)
        return losses.mean(), {"latent_std": x0.std()}

    def batch(params: Params) -> loader.Loader:
        pictures = grain.MapDataset.source(sources.source(config.data.source, "train"))
        pictures = pictures.map(transforms.Square(config.data.size))
        rows = cache_latents(system.autoencoder, params["vae"], pictures, tokenizer)
        return loader.loader(rows, config.train.batch_size, config.train.seed, (), this_shard())

    def sample(params: Params) -> UInt8[np.ndarray, "h w 3"]:
        images = sample_prompts(config, system, params, tokenizer, (side, side, first_stage.latent_channels))
        return tile(to_uint8(np.asarray(images)), config.sample.columns)

    def export(params: Params, folder: Path) -> None:
        checkpoint = Checkpoint(
            unet=Component(system.unet.config, params["unet"], {"sample_size": side}),
            vae=Component(first_stage, params["vae"], {"sample_size": config.data.size}),
            text_encoder=Component(_text_encoder(system).config, params["text_encoder"], _token_ids(tokenizer)),
            scheduler_config=config.task.scheduler.to_dict(),
            tokenizer=Path(config.model.tokenizer),
            defaults={name: config.sample[name] for name in ("steps", "guidance_scale")},
        )
        write_folder(folder, checkpoint, config.task.export_dtype)

    def specimen(rows: int) -> dict[str, Any]:
        moments = jax.ShapeDtypeStruct((rows, side, side, 2 * first_stage.latent_channels), jnp.float32)
        return {"moments": moments, "tokens": jax.ShapeDtypeStruct((rows, tokenizer.length), jnp.int32)}

    def stored(place: Place) -> Params:
        initial = read_initial(config.task.initial, system, place) if config.task.initial else {}
        return {"vae": read_component(vae, "vae", place=place).params, **initial}

    frozen = {"vae": FORMATS["vae"].shapes(first_stage)}
    return Task(init, loss, sample, batch, export, specimen, frozen, stored)


def read_initial(folder: str, system: System, place: Place) -> Params:
    """The UNet and the text encoder of a diffusers folder, for a run that begins from them.

    Raises:
        UserError: they cannot be read, or their sizes are not the config's.
    """
    params = {}
    for name, wanted in (("unet", system.unet.config), ("text_encoder", _text_encoder(system).config)):
        stored = read_component(Path(folder) / name, name, place=place)
        if stored.config != wanted:
            raise UserError(f"config.task.initial: {folder}/{name} is {stored.config}, the config describes {wanted}")
        params[name] = stored.params
    return params


def make_system(config: Config, first_stage: Any, tokenizer: Tokenizer) -> System:
    """The networks that a config describes; the text encoder's vocabulary is the tokenizer's."""
    dtype = dtype_named(config.train.dtype, "config.train.dtype")
    text = CLIPTextConfig(
        **config.model.text_encoder,
        vocab_size=tokenizer.vocab_size,
        max_length=tokenizer.length,
        eos_token_id=tokenizer.eos,
    )
    latent = first_stage.latent_channels
    unet = UNetConfig(**config.model.unet, in_channels=latent, out_channels=latent, context_dim=text.width)
    return System(
        unet=UNet(unet, config.train.remat, dtype),
        autoencoder=Autoencoder(first_stage),
        text_encoders=(TextEncoder("text_encoder", CLIPText(text, dtype)),),
        prediction=config.task.scheduler.prediction_type,
    )


def _text_encoder(system: System) -> CLIPText:
    return system.text_encoders[0].module


def _one_chunk(tokens: Int[Array | np.ndarray, "b l"]) -> Text:
    return Text((jnp.asarray(tokens)[:, None],))


def _token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    return {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}


def uniform(key: PRNGKeyArray, batch: int, steps: int) -> Int[Array, " b"]:
    """Every timestep is as likely as every other (DDPM)."""
    return jax.random.randint(key, (batch,), 0, steps)


def late(key: PRNGKeyArray, batch: int, steps: int) -> Int[Array, " b"]:
    """The density rises with t^2: where the prompt decides what the picture is, there is most to learn."""
    return (jnp.cbrt(jax.random.uniform(key, (batch,))) * steps).astype(jnp.int32)


TIMESTEPS = {"uniform": uniform, "late": late}


def cache_latents(
    autoencoder: Autoencoder, params: Params, pictures: sources.Source, tokenizer: Tokenizer
) -> sources.ArraySource:
    """The moments of every picture's latents, float32, and the tokens of its caption: what an epoch reads."""

    @jax.jit
    def encode(params: Params, images: Array) -> Array:
        x = images.astype(jnp.float32) / 127.5 - 1.0
        latent = apply(autoencoder, params, x, method="encode")
        return jnp.concatenate([latent.mean, latent.logvar], axis=-1)

    moments, captions, size = [], [], 64
    for start in range(0, len(pictures), size):
        rows = [pictures[i] for i in range(start, min(start + size, len(pictures)))]
        images = np.stack([row["image"] for row in rows])
        padded = np.pad(images, [(0, size - len(rows)), (0, 0), (0, 0), (0, 0)])
        moments.append(np.asarray(encode(params, padded))[: len(rows)])
        captions += [row["caption"] for row in rows]
    return sources.ArraySource({"moments": np.concatenate(moments), "tokens": tokenizer.encode(captions)})


def sample_prompts(
    config: Config, system: System, params: Params, tokenizer: Tokenizer, shape: tuple[int, int, int]
) -> Float[Array, "n h w 3"]:
    """Pictures of `config.sample.prompts`, in [0, 1], always from the same noise."""
    prompts, scheduler = list(config.sample.prompts), config.task.scheduler.to_dict()
    options = SamplerOptions.from_scheduler_config(scheduler, config.sample.sampler)
    table = make_table(config.sample.sampler, schedule_of(scheduler), config.sample.steps, options)
    keys = image_keys(config.train.seed, jnp.arange(len(prompts)))
    tokens, empty = tokenizer.encode(prompts), tokenizer.encode([""] * len(prompts))
    asked = Asked(_one_chunk(tokens), _one_chunk(empty), jnp.ones(len(prompts)))
    return _sample(system, params, table, asked, config.sample.guidance_scale, keys, shape)


@jax.jit(static_argnums=(0, 6))
def _sample(
    system: System,
    params: Params,
    table: Any,
    asked: Asked,
    scale: Float[Array, ""],
    keys: PRNGKeyArray,
    shape: tuple[int, int, int],
) -> Float[Array, "b H W 3"]:
    noise = first_noise(keys, shape)
    start = Start(noise * table.first_scale, jnp.zeros_like(noise), noise, jnp.ones_like(noise[..., :1]))
    latents = denoise_latents(system, params, table, conditions(system, params, asked), Guidance(scale), start, keys)
    return decode(system, params, latents)
