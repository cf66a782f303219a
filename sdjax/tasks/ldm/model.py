"""A latent diffusion model with a condition of its own: its networks, and how it samples."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PRNGKeyArray, UInt8

from sdjax.convert.components import Checkpoint
from sdjax.core.config import Config
from sdjax.core.errors import UserError, unknown
from sdjax.core.partition import gathered
from sdjax.core.precision import dtype_named
from sdjax.core.tree import Params
from sdjax.diffusion.denoise import Denoise
from sdjax.diffusion.guidance import image_guided
from sdjax.diffusion.samplers import Table, first_noise
from sdjax.models import unet, unet2d
from sdjax.models.apply import apply
from sdjax.models.autoencoder import AnyAutoencoder, autoencoder_of
from sdjax.models.conditioning import Cond
from sdjax.models.unet import UNet
from sdjax.models.unet2d import UNet2D, UNet2DConfig
from sdjax.tasks.base import task_names
from sdjax.tasks.latent.networks import UNET, VAE, sizes_of
from sdjax.tasks.latent.sampling import Guidance, Start, decode, decode_unclipped, denoise_latents
from sdjax.tasks.ldm.conditioner import Columns, Conditioner


class ImageGuide(NamedTuple):
    """A picture that a model, which need not be told anything, is drawn to (LDM, appendix C).

    Attributes:
        target: in [0, 1], of any size up to that of the pictures, which are made as small to be compared with it.
        scale: of the squared distance, in pixels of [-1, 1]; 0 for none.
    """

    target: Float[Array | np.ndarray, "b h w 3"]
    scale: Float[Array, ""] | float


class Model(NamedTuple):
    """The networks of a latent diffusion model, without their parameters; hashable.

    Attributes:
        unet, autoencoder: the modules; their parameters are "unet" and "vae".
        conditioner: what the UNet is told; its networks' parameters stand beside the others.
        prediction: what the UNet predicts, as diffusers names it.
    """

    unet: UNet | UNet2D
    autoencoder: AnyAutoencoder
    conditioner: Conditioner
    prediction: str

    @property
    def scale(self) -> float:
        """Latents are multiplied by it before they are diffused."""
        return self.autoencoder.config.scaling_factor


def unet_of(config: Config, latent_channels: int, conditioner: Conditioner) -> UNet | UNet2D:
    """The UNet of `config.model.unet`, a variant of `models.unet` or of `models.unet2d`.

    Raises:
        UserError: there is no such variant, or it does not fit the latents or the condition.
    """
    section, place = config.model.unet, "config.model.unet"
    if section.variant not in {**unet.VARIANTS, **unet2d.VARIANTS}:
        raise unknown("variant", section.variant, {**unet.VARIANTS, **unet2d.VARIANTS}, f"{place}.variant")
    kind, module = (unet, UNet) if section.variant in unet.VARIANTS else (unet2d, UNet2D)
    sizes = sizes_of(section, kind.VARIANTS, place)
    if isinstance(sizes, UNet2DConfig) and conditioner.context_width is not None:
        raise UserError(f"{place}.variant={section.variant} has no cross-attention, which this task needs")
    _check_fit(sizes, latent_channels, conditioner, place)
    return module(cast(Any, sizes), config.train.remat, dtype_named(config.train.dtype, "config.train.dtype"))


def _check_fit(sizes: Any, latent_channels: int, conditioner: Conditioner, place: str) -> None:
    """Whether a UNet takes what the first stage and the condition give."""
    wanted = {"in_channels": latent_channels + conditioner.concat_channels, "out_channels": latent_channels}
    if not isinstance(sizes, UNet2DConfig):
        wanted["context_dim"] = conditioner.context_width or sizes.context_dim
    for name, value in wanted.items():
        if getattr(sizes, name) != value:
            raise UserError(
                f"{place}.{name}={getattr(sizes, name)}; the first stage and the condition of this task ask for {value}"
            )


def init(model: Model, key: PRNGKeyArray) -> Params:
    """Fresh parameters of the UNet and of the conditioner's networks; traceable."""
    unet_key, own_key = jax.random.split(key)
    config = model.unet.config
    side = 2 ** (len(config.channels) - 1)
    width = model.conditioner.context_width
    cond = Cond(context=None if width is None else jnp.zeros((1, 1, width)))
    x = jnp.zeros((1, side, side, config.in_channels))
    return {UNET: dict(model.unet.init(unet_key, x, jnp.zeros(1), cond)["params"]), **model.conditioner.init(own_key)}


def to_latents(
    autoencoder: AnyAutoencoder, params: Params, images: UInt8[Array, "b H W 3"], key: PRNGKeyArray
) -> Float[Array, "b h w z"]:
    """Scaled latents of pictures, drawn from their posterior."""
    x = jnp.asarray(images, jnp.float32) / 127.5 - 1.0
    return apply(autoencoder, params[VAE], x, method="encode").sample(key) * autoencoder.config.scaling_factor


@partial(jax.jit, static_argnums=(0, 6))
def draw(
    model: Model,
    params: Params,
    table: Table,
    columns: Columns,
    scale: Float[Array, ""] | float,
    keys: Key[Array, " b"],
    size: tuple[int, int],
    guide: ImageGuide | None = None,
) -> Float[Array, "b H W 3"]:
    """Pictures in [0, 1] of conditions.

    Args:
        model: static.
        params: of all networks.
        table: of `make_table`.
        columns: the conditions, one row a picture.
        scale: of classifier-free guidance, for conditions that have it; 1 for none.
        keys: one an image.
        size: height and width in pixels, multiples of what the networks divide sides by; static. The networks are
            convolutional, so they need not be those of training (LDM, section 4.3.2).
        guide: a picture to resemble; another one of the same size, or another scale, compiles nothing.
    """
    height, width = (side // model.autoencoder.config.factor for side in size)
    noise = first_noise(keys, (height, width, model.autoencoder.config.latent_channels))
    start = Start(noise * table.first_scale, jnp.zeros_like(noise), noise, jnp.ones_like(noise[..., :1]))
    conditioner = model.conditioner
    quiet = conditioner.silent(columns)
    conds = (conditioner.cond(params, columns),)
    if quiet is not None:
        conds += (conditioner.cond(params, quiet),)
    steer = None if guide is None else partial(_steered, model, params, guide)
    latents = denoise_latents(model, params, table, conds, Guidance(scale), start, keys, steer=steer)
    return gathered(conditioner.finished(decode(model, params, latents), columns))


def _steered(model: Model, params: Params, guide: ImageGuide, denoise: Denoise) -> Denoise:
    """Half the squared distance of the pictures, made as small as the target, is -log p (LDM, appendix C)."""
    target = jnp.asarray(guide.target) * 2.0 - 1.0

    def likelihood(x0: Float[Array, "b h w z"]) -> Float[Array, " b"]:
        made = decode_unclipped(model, params, x0) * 2.0 - 1.0
        small = jax.image.resize(made, target.shape, "cubic", antialias=True)
        return -0.5 * jnp.square(target - small).sum((1, 2, 3))

    return image_guided(denoise, likelihood, guide.scale)


def load_model(checkpoint: Checkpoint, dtype: str = "float32") -> tuple[Model, Params]:
    """A stored model, and all of its parameters.

    Raises:
        UserError: its task is none of ours, or a part of it is missing.
    """
    sizes = {name: component.config for name, component in checkpoint.components.items()}
    kind = checkpoint.conditioning
    if kind not in task_names():
        raise unknown("task", kind, task_names(), "the model's index")
    conditioner_of = importlib.import_module(f"sdjax.tasks.{kind}").conditioner_of
    arithmetic = dtype_named(dtype)
    missing = {UNET, VAE} - set(sizes)
    if missing:
        raise UserError(f"the model of {kind} lacks its {missing.pop()}")
    module = UNet2D if isinstance(sizes[UNET], UNet2DConfig) else UNet
    try:
        conditioner = conditioner_of(sizes, checkpoint.settings)
    except (KeyError, AttributeError) as error:
        raise UserError(f"a model of {kind} needs a part that is not there: {error}") from error
    if module is UNet2D and conditioner.context_width is not None:
        raise UserError(f"a model of {kind} needs a UNet with cross-attention, and this one has none")
    _check_fit(sizes[UNET], sizes[VAE].latent_channels, conditioner, "unet")
    model = Model(
        module(cast(Any, sizes[UNET]), dtype=arithmetic),
        autoencoder_of(sizes[VAE]),
        conditioner,
        checkpoint.scheduler.get("prediction_type", "epsilon"),
    )
    return model, {name: component.params for name, component in checkpoint.components.items()}
