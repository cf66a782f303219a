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
from jaxtyping import Array, Int, PRNGKeyArray, UInt8

from sdjax.convert.components import FORMATS, Checkpoint, Component
from sdjax.convert.folder import read_component, read_config, write_checkpoint
from sdjax.core.config import Config
from sdjax.core.errors import UserError
from sdjax.core.partition import gathered
from sdjax.core.precision import dtype_named
from sdjax.core.tree import Params
from sdjax.data import loader, sources, transforms
from sdjax.data.tokenizers import Tokenizer, load_tokenizer
from sdjax.models.apply import apply
from sdjax.models.autoencoder import AnyAutoencoder, autoencoder_of, posterior
from sdjax.models.clip import CLIPText, CLIPTextConfig
from sdjax.models.conditioning import Cond
from sdjax.models.unet import UNet, UNetConfig
from sdjax.tasks.base import batches, tile, to_uint8
from sdjax.tasks.latent import System, Text, TextEncoder, cond, encode_text
from sdjax.tasks.latent.objective import objective_of
from sdjax.tasks.latent.rehearsal import sample_prompts
from sdjax.training.task import Metrics, Place, Task


def make(config: Config, mesh: Mesh) -> Task:
    """The task of a config whose `task.name` is "text_to_image".

    Raises:
        UserError: the first stage, the tokenizer or a name in the config is not what it should be.
    """
    vae = Path(config.task.first_stage) / "vae"
    first_stage = read_config(vae, "vae")
    tokenizer = load_tokenizer(config.model.tokenizer)
    system = make_system(config, first_stage, tokenizer)
    objective = objective_of(config.task)
    empty = tokenizer.encode([""])
    side = config.data.size // first_stage.factor

    def init(key: PRNGKeyArray) -> Params:
        unet_key, text_key = jax.random.split(key)
        text = _text_encoder(system).init(text_key, empty)["params"]
        context = Cond(context=jnp.zeros((1, tokenizer.length, system.context_width)))
        x = jnp.zeros((1, side, side, first_stage.latent_channels))
        unet = system.unet.init(unet_key, x, jnp.zeros(1), context)["params"]
        return {"unet": unet, "text_encoder": text}

    def loss(params: Params, batch: Any, key: PRNGKeyArray, step: Int[Array, ""]) -> tuple[Array, Metrics]:
        del step
        latent_key, noise_key, drop_key = jax.random.split(key, 3)
        x0 = posterior(batch["moments"]).sample(latent_key) * system.scale
        dropped = jax.random.bernoulli(drop_key, config.task.caption_dropout, (len(x0), 1))
        told = cond(system, encode_text(system, params, _one_chunk(jnp.where(dropped, empty, batch["tokens"]))), None)
        value = objective.loss(lambda x, t: apply(system.unet, params["unet"], x, t, told), x0, noise_key)
        return value, {"latent_std": x0.std()}

    def batch(params: Params) -> loader.Loader:
        pictures = grain.MapDataset.source(sources.source(config.data.source, "train"))
        pictures = pictures.map(transforms.Square(config.data.size, config.data.crop))
        rows = cache_latents(system.autoencoder, params["vae"], pictures, tokenizer)
        return batches(config, rows, (), mesh)

    def sample(params: Params) -> UInt8[np.ndarray, "h w 3"]:
        images = sample_prompts(config, system, params, (tokenizer,))
        return tile(to_uint8(np.asarray(images)), config.sample.columns)

    def export(params: Params, folder: Path) -> None:
        text = Component(_text_encoder(system).config, params["text_encoder"], _token_ids(tokenizer))
        checkpoint = Checkpoint(
            components={
                "unet": Component(system.unet.config, params["unet"], {"sample_size": side}),
                "vae": Component(first_stage, params["vae"], {"sample_size": config.data.size}),
                "text_encoder": text,
            },
            scheduler=config.task.scheduler.to_dict(),
            tokenizers={"text_encoder": Path(config.model.tokenizer)},
            settings={name: config.sample[name] for name in ("steps", "guidance_scale")},
        )
        write_checkpoint(folder, checkpoint, config.task.export_dtype)

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
        autoencoder=autoencoder_of(first_stage),
        text_encoders=(TextEncoder("text_encoder", CLIPText(text, dtype)),),
        prediction=config.task.scheduler.prediction_type,
    )


def _text_encoder(system: System) -> CLIPText:
    return system.text_encoders[0].module


def _one_chunk(tokens: Int[Array | np.ndarray, "b l"]) -> Text:
    return Text((jnp.asarray(tokens)[:, None],))


def _token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    return {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}


def cache_latents(
    autoencoder: AnyAutoencoder, params: Params, pictures: sources.Source, tokenizer: Tokenizer
) -> sources.ArraySource:
    """The moments of every picture's latents, float32, and the tokens of its caption: what an epoch reads."""

    @jax.jit
    def encode(params: Params, images: Array) -> Array:
        x = images.astype(jnp.float32) / 127.5 - 1.0
        latent = apply(autoencoder, params, x, method="encode")
        return gathered(jnp.concatenate([latent.mean, latent.logvar], axis=-1))

    moments, captions, size = [], [], 64
    for start in range(0, len(pictures), size):
        rows = [pictures[i] for i in range(start, min(start + size, len(pictures)))]
        images = np.stack([row["image"] for row in rows])
        padded = np.pad(images, [(0, size - len(rows)), (0, 0), (0, 0), (0, 0)])
        moments.append(np.asarray(encode(params, padded))[: len(rows)])
        captions += [row["caption"] for row in rows]
    return sources.ArraySource({"moments": np.concatenate(moments), "tokens": tokenizer.encode(captions)})
