"""One type for every model that can be sampled and trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from sdjax.checkpoints.checkpoint import TOKENIZERS, Checkpoint
from sdjax.checkpoints.layouts.diffusers import ZEROS
from sdjax.checkpoints.lora.names import blocks_of, layers_of
from sdjax.checkpoints.networks.unet import SIZE_WIDTH
from sdjax.core.errors import UserError, unknown
from sdjax.core.tree import Params
from sdjax.data.text.tokenizers import Tokenizer
from sdjax.diffusion.denoise import check_prediction
from sdjax.diffusion_model.conditioner import Combined, Conditioner, Network
from sdjax.diffusion_model.conditioners import CONDITIONERS, TEXT, t2i_adapter
from sdjax.diffusion_model.conditioners.control import CONTROLNET, ControlConditioner
from sdjax.diffusion_model.conditioners.guides import CLASSIFIER, ClassifierGuide, ImageGuide
from sdjax.diffusion_model.conditioners.inpaint import InpaintConditioner
from sdjax.diffusion_model.conditioners.ip_adapter import ADAPTER, ENCODER, ImagePromptConditioner
from sdjax.diffusion_model.conditioners.lora import LoraConditioner
from sdjax.diffusion_model.conditioners.maps import DepthConditioner
from sdjax.diffusion_model.conditioners.text import AESTHETICS, SIZES, TextConditioner
from sdjax.diffusion_model.conditioners.upscale import UpscaleConditioner
from sdjax.diffusion_model.text_encoders import CLIPEncoder, TextEncoder
from sdjax.models.added_kv_unet import AddedKVUNet, AddedKVUNetConfig
from sdjax.models.autoencoder import AnyAutoencoder, autoencoder_of
from sdjax.models.clip import TEXT_LAYERS, CLIPText
from sdjax.models.conditioning import Cond, apply
from sdjax.models.efficient_unet import EfficientUNet, EfficientUNetConfig
from sdjax.models.unet import UNet, UNetConfig
from sdjax.models.unet2d import UNet2D, UNet2DConfig

BACKBONE, AUTOENCODER = "unet", "vae"
"""Components of the parameters of the two."""
Backbone: TypeAlias = UNet | UNet2D | AddedKVUNet | EfficientUNet
BACKBONES: Mapping[type, type[Backbone]] = {
    UNetConfig: UNet,
    UNet2DConfig: UNet2D,
    AddedKVUNetConfig: AddedKVUNet,
    EfficientUNetConfig: EfficientUNet,
}
"""Modules by the type of their sizes."""


class BackboneConfig(Protocol):
    """Facts about a denoising network that the rest of the model needs.

    Attributes:
        in_channels: of the noisy latents and of what is joined to them.
        out_channels: of the prediction; twice the latents' where the variance is learned.
        context_dim: features of cross-attention tokens; None where there are none.
        vector_dim: features of the condition vector; None where there is none.
        guidance_dim: features of the guidance scale's embedding, for distilled models; None for others.
        classes: values of the label; None where there is none.
        divisor: sides of its input that are multiples of it are halved evenly at every level.
    """

    @property
    def in_channels(self) -> int: ...
    @property
    def out_channels(self) -> int: ...
    @property
    def context_dim(self) -> int | None: ...
    @property
    def vector_dim(self) -> int | None: ...
    @property
    def guidance_dim(self) -> int | None: ...
    @property
    def classes(self) -> int | None: ...
    @property
    def divisor(self) -> int: ...

    def example_inputs(self) -> tuple[Array, Array, Cond]:
        """Noisy latents, timesteps and a condition of the smallest size, for initialisation."""
        ...


class DiffusionModel(NamedTuple):
    """The networks of a diffusion model without their parameters; hashable, so it may be a static argument.

    Attributes:
        backbone: the denoising module; its parameters are "unet".
        autoencoder: its parameters are "vae"; None where images themselves are diffused.
        conditioner: of all that the backbone is conditioned on; its networks' parameters stand beside the others.
        parameterization: of the prediction, as diffusers names it: a key of `PARAMETERIZATIONS`.
    """

    backbone: Backbone
    autoencoder: AnyAutoencoder | None
    conditioner: Conditioner
    parameterization: str

    @property
    def config(self) -> BackboneConfig:
        """The backbone's."""
        return self.backbone.config

    @property
    def scale(self) -> float:
        """Factor that gives latents unit variance."""
        return 1.0 if self.autoencoder is None else self.autoencoder.config.scaling_factor

    @property
    def factor(self) -> int:
        """Pixels of a latent along each side; 1 where images themselves are diffused."""
        return 1 if self.autoencoder is None else self.autoencoder.config.factor

    @property
    def multiple(self) -> int:
        """Sides of images are multiples of it."""
        return self.config.divisor if self.autoencoder is None else self.factor

    @property
    def channels(self) -> int:
        """Channels of the latents, or of the image for models of pixels."""
        if self.autoencoder is None:
            return self.config.in_channels - self.conditioner.traits.concat_channels
        return self.autoencoder.config.latent_channels

    @property
    def has_null(self) -> bool:
        """True if the model has a null condition, so that guidance is possible."""
        return self.conditioner.traits.has_null

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Shape of the latents of one image of this height and width in pixels."""
        return size[0] // self.factor, size[1] // self.factor, self.channels

    def network(self, params: Params) -> Network:
        """The backbone with its parameters."""
        return lambda x, t, cond: apply(self.backbone, params[BACKBONE], x, t, cond)

    def encode(self, params: Params, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w z"]:
        """Scaled latents, the posterior's mean, of images in [-1, 1]."""
        return jnp.split(self.moments(params, images), 2, axis=-1)[0]

    def moments(self, params: Params, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w 2*z"]:
        """Mean and standard deviation of scaled latents of images in [-1, 1], the posterior's; pixels are certain."""
        if self.autoencoder is None:
            return jnp.concatenate([images, jnp.zeros_like(images)], axis=-1)
        found = apply(self.autoencoder, params[AUTOENCODER], images, method="encode")
        return jnp.concatenate([found.mean, found.std], axis=-1) * self.scale

    def decode(self, params: Params, latents: Float[Array, "b h w z"]) -> Float[Array, "b H W 3"]:
        """Images of scaled latents in float32, 0 black and 1 white, not clipped."""
        images = latents
        if self.autoencoder is not None:
            images = apply(self.autoencoder, params[AUTOENCODER], latents / self.scale, method="decode")
        return images.astype(jnp.float32) / 2.0 + 0.5

    def init(self, key: PRNGKeyArray) -> Params:
        """Fresh parameters of the backbone and of the conditioner's networks; traceable."""
        backbone_key, own_key = jax.random.split(key)
        made = self.backbone.init(backbone_key, *self.config.example_inputs())["params"]
        return {BACKBONE: dict(made), **self.conditioner.init(own_key)}

    def configs(self) -> dict[str, Any]:
        """Configs of all components by name."""
        own = {} if self.autoencoder is None else {AUTOENCODER: self.autoencoder.config}
        return {BACKBONE: self.config, **own, **self.conditioner.components}


def backbone_of(config: Any, dtype: DTypeLike, remat: str = "none") -> Backbone:
    """The module of a backbone's config."""
    return BACKBONES[type(config)](cast(Any, config), remat, dtype)


def build_model(
    checkpoint: Checkpoint, tokenizers: Mapping[str, Tokenizer], dtype: DTypeLike, place: object
) -> DiffusionModel:
    """The model of a checkpoint.

    Args:
        checkpoint: any that can be sampled; with a component "classifier", it guides; "controlnet", "controlnet_1",
            ... act in that order, and so do "t2i_adapter", ...; with an "ip_adapter" images are prompts.
        tokenizers: by text encoder.
        dtype: of the arithmetic of backbone and text encoders; the autoencoder's is float32.
        place: of the checkpoint, for messages.

    Raises:
        UserError: its conditioning is unknown, a component is missing, or components do not fit each other.
    """
    configs = {name: component.config for name, component in checkpoint.components.items()}
    kind, settings = checkpoint.conditioning, checkpoint.settings
    if BACKBONE not in configs:
        raise UserError(f"{place} lacks its {BACKBONE}")
    autoencoder = autoencoder_of(configs[AUTOENCODER]) if AUTOENCODER in configs else None
    parameterization = checkpoint.scheduler.get("prediction_type", "epsilon")
    check_prediction(parameterization)
    if kind == TEXT:
        if autoencoder is None:
            raise UserError(f"{place} lacks its {AUTOENCODER}")
        conditioner = _text_conditioner(checkpoint, tokenizers, dtype, autoencoder, place)
    elif kind in CONDITIONERS:
        try:
            conditioner = CONDITIONERS[kind](configs, settings, dtype)
        except (KeyError, AttributeError) as error:
            raise UserError(f"{place}: a model of {kind} needs a part that is not there: {error}") from error
    else:
        raise unknown("conditioning", kind, (TEXT, *CONDITIONERS), str(place))
    parts = [*(conditioner.parts if isinstance(conditioner, Combined) else (conditioner,)), ImageGuide()]
    if CLASSIFIER in configs:
        parts.append(ClassifierGuide(configs[CLASSIFIER]))
    if ADAPTER in configs:
        parts.append(ImagePromptConditioner(configs[ADAPTER], configs[ENCODER], dtype))
    if adapters := tuple(config for name, config in configs.items() if name.startswith(t2i_adapter.ADAPTER)):
        parts.append(t2i_adapter.T2IAdapterConditioner(adapters, dtype))
    if checkpoint.loras:
        names, blocks = blocks_of(layers_of(configs))
        parts.append(LoraConditioner(checkpoint.loras, tuple(blocks.items()), names))
    if nets := tuple(config for name, config in configs.items() if name.startswith(CONTROLNET)):
        parts.append(ControlConditioner(nets, dtype))
    backbone = backbone_of(configs[BACKBONE], dtype)
    model = DiffusionModel(backbone, autoencoder, Combined(tuple(parts)), parameterization)
    check_fit(model, place)
    return model


def _text_conditioner(
    checkpoint: Checkpoint,
    tokenizers: Mapping[str, Tokenizer],
    dtype: DTypeLike,
    autoencoder: AnyAutoencoder,
    place: object,
) -> Conditioner:
    configs = {name: component.config for name, component in checkpoint.components.items()}
    encoders = clip_encoders(configs, dtype)
    width = checkpoint.components[BACKBONE].extra.get(SIZE_WIDTH) or 256
    numbers = micro_conditioning(configs[BACKBONE], encoders, width, place)
    zeros = checkpoint.model_index.get(ZEROS, numbers == SIZES)
    text = TextConditioner(encoders, numbers, width, () if zeros else null_ids(encoders, tokenizers))
    channels = configs[BACKBONE].in_channels - autoencoder.config.latent_channels
    inpaint = InpaintConditioner(autoencoder.config.latent_channels, autoencoder.config.factor)
    joined = DepthConditioner(), UpscaleConditioner(configs[BACKBONE].classes or 1000), inpaint
    parts = {part.traits.concat_channels: part for part in joined}
    if channels and channels not in parts:
        names = {n: type(part).__name__.removesuffix("Conditioner").lower() for n, part in parts.items()}
        known = ", ".join(f"{name} (+{n})" for n, name in names.items())
        raise UserError(
            f"{place}: the UNet takes {configs[BACKBONE].in_channels} channels, the autoencoder's latents have "
            f"{autoencoder.config.latent_channels}; beside them a UNet may take: {known}"
        )
    return Combined((text, parts[channels])) if channels else text


def clip_encoders(configs: Mapping[str, Any], dtype: DTypeLike, words: int = 0) -> tuple[TextEncoder, ...]:
    """The text encoders of Stable Diffusion's family among some components; SDXL's read an earlier layer.

    Args:
        words: vectors of new words, which stand apart from the vocabulary (`sdjax.models.clip.TokenEmbedding`).
    """
    layer = TEXT_LAYERS["last" if configs[BACKBONE].vector_dim is None else "penultimate_raw"]
    return tuple(
        CLIPEncoder(name, CLIPText(configs[name], dtype, words), layer) for name in TOKENIZERS if name in configs
    )


def micro_conditioning(config: UNetConfig, encoders: Sequence[TextEncoder], width: int, place: object) -> int:
    """Numbers that a UNet is conditioned on beside the pooled prompt; a UserError for a vector that is not SDXL's."""
    if config.vector_dim is None:
        return 0
    pooled = encoders[-1].pooled_width
    numbers, rest = divmod(config.vector_dim - pooled, width)
    if rest or numbers not in (SIZES, AESTHETICS):
        raise UserError(
            f"{place}: the UNet takes a vector of {config.vector_dim} features, which is not the pooled prompt's "
            f"{pooled} and {AESTHETICS} or {SIZES} numbers of {width}"
        )
    return numbers


def null_ids(encoders: Sequence[TextEncoder], tokenizers: Mapping[str, Tokenizer]) -> tuple[tuple[int, ...], ...]:
    """Token ids of the empty prompt, one row an encoder."""
    return tuple(tuple(int(i) for i in tokenizers[encoder.name].encode([""])[0]) for encoder in encoders)


def check_fit(model: DiffusionModel, place: object) -> None:
    """Hold the backbone to its latents and its condition; a UserError names what does not fit."""
    config, conditioner = model.config, model.conditioner
    width, concat = conditioner.traits.context_width, conditioner.traits.concat_channels
    if width is not None and config.context_dim is None:
        raise UserError(f"{place}: the backbone has no cross-attention, which this condition needs")
    if config.context_dim not in (width, None):
        raise UserError(
            f"{place}: the UNet attends to {config.context_dim} features, the condition gives {width or 'none'}"
        )
    if model.autoencoder is None:
        if config.in_channels - concat != 3 or config.out_channels not in (3, 6):
            raise UserError(f"{place}: the backbone of a model of pixels takes 3 channels and gives 3 or 6")
        return
    latent = model.autoencoder.config.latent_channels
    for name, value in {"in_channels": latent + concat, "out_channels": latent}.items():
        if getattr(config, name) != value:
            raise UserError(
                f"{place}: the UNet's {name} are {getattr(config, name)}; the autoencoder and the condition ask for "
                f"{value}"
            )
