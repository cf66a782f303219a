"""Pictures of a few fixed prompts while a model is in training, always from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sdjax.core.config import Config
from sdjax.core.partition import gathered
from sdjax.core.prng import image_keys
from sdjax.core.tree import Params
from sdjax.data.tokenizers import Tokenizer
from sdjax.diffusion.samplers import SamplerOptions, first_noise, make_table, schedule_of
from sdjax.tasks.latent.conditions import Asked, conditions
from sdjax.tasks.latent.sampling import Guidance, Start, decode, denoise_latents
from sdjax.tasks.latent.system import System
from sdjax.tasks.latent.text import Text


def sample_prompts(
    config: Config, system: System, params: Params, tokenizers: Sequence[Tokenizer]
) -> Float[Array, "n h w 3"]:
    """Pictures of `config.sample.prompts` in [0, 1], of `config.data.size` pixels, with the sampler of that section.

    Raises:
        UserError: the sampler or the schedule does not fit.
    """
    options, scheduler = config.sample, config.task.scheduler.to_dict()
    prompts = list(options.prompts)
    chosen = SamplerOptions.from_scheduler_config(scheduler, options.sampler)
    table = make_table(options.sampler, schedule_of(scheduler), options.steps, chosen)
    size, sizes = int(config.data.size), system.autoencoder.config
    side = size // sizes.factor
    told = np.array([size, size, 0, 0, size, size], np.float32)
    numbers = np.tile(told, (len(prompts), 1)) if system.numbers else None
    asked = Asked(
        text=_text(tokenizers, prompts),
        negative=_text(tokenizers, [""] * len(prompts)),
        negative_share=np.full(len(prompts), 0.0 if system.numbers else 1.0, np.float32),
        numbers=numbers,
        negative_numbers=numbers,
    )
    keys = image_keys(config.train.seed, jnp.arange(len(prompts)))
    return _sample(system, params, table, asked, options.guidance_scale, keys, (side, side, sizes.latent_channels))


def _text(tokenizers: Sequence[Tokenizer], prompts: Sequence[str]) -> Text:
    return Text(tuple(tokenizer.encode(prompts)[:, None] for tokenizer in tokenizers))


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
    return gathered(decode(system, params, latents))
