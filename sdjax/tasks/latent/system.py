"""Which networks a latent diffusion model is made of, and what its UNet is told besides the prompt."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from sdjax.models.autoencoder import AnyAutoencoder
from sdjax.models.clip import TEXT_LAYERS, CLIPText, TextLayer
from sdjax.models.unet import UNet

SIZES, AESTHETICS = 6, 5
"""How many numbers SDXL's base (original size, crop, target size) and its refiner (an aesthetic score for the target
size) are told of a picture (SDXL, section 2.2; Stability-AI/generative-models, configs/inference)."""


class TextEncoder(NamedTuple):
    """A text encoder of a system.

    Attributes:
        name: where its parameters are: "text_encoder" or "text_encoder_2".
        module: the network.
        layer: which of its layers the UNet attends to.
    """

    name: str
    module: CLIPText
    layer: TextLayer = TEXT_LAYERS["last"]


class Diffuser(Protocol):
    """What sampling and decoding ask of a model: a UNet over an autoencoder's latents, whatever it is told."""

    @property
    def unet(self) -> Any:
        """The module; its parameters are "unet"."""
        ...

    @property
    def autoencoder(self) -> AnyAutoencoder:
        """The module; its parameters are "vae"."""
        ...

    @property
    def prediction(self) -> str:
        """What the UNet predicts, as diffusers names it."""
        ...

    @property
    def scale(self) -> float:
        """Latents are multiplied by it before they are diffused."""
        ...


class System(NamedTuple):
    """The networks of a latent diffusion model, without their parameters; hashable, so it may be a static argument.

    Attributes:
        unet, autoencoder: the modules; their parameters are "unet" and "vae".
        text_encoders: in the order in which their features are joined.
        prediction: what the UNet predicts, as diffusers names it.
        number_width: features of each number of SDXL's micro-conditioning.
    """

    unet: UNet
    autoencoder: AnyAutoencoder
    text_encoders: tuple[TextEncoder, ...]
    prediction: str
    number_width: int = 256

    @property
    def scale(self) -> float:
        """Latents are multiplied by it before they are diffused, to have unit variance."""
        return self.autoencoder.config.scaling_factor

    @property
    def pooled_width(self) -> int:
        """Features of the pooled prompt that the UNet is told."""
        config = self.text_encoders[-1].module.config
        return config.projection_dim or config.width

    @property
    def numbers(self) -> int:
        """How many numbers the UNet is told of a picture: `SIZES`, `AESTHETICS`, or 0."""
        width = self.unet.config.vector_dim
        return 0 if width is None else (width - self.pooled_width) // self.number_width

    @property
    def context_width(self) -> int:
        """Features of the tokens that the UNet attends to."""
        return sum(encoder.module.config.width for encoder in self.text_encoders)

    @property
    def extra(self) -> str:
        """What is joined to the noisy latents: a key of `extra_channels`.

        Raises:
            KeyError: the UNet takes a number of channels that no published model takes.
        """
        surplus = self.unet.config.in_channels - self.autoencoder.config.latent_channels
        return {channels: name for name, channels in extra_channels(self.autoencoder).items()}[surplus]


def extra_channels(autoencoder: AnyAutoencoder) -> dict[str, int]:
    """Channels that the UNets of depth, upscaling and inpainting models take beside the noisy latents."""
    return {"nothing": 0, "depth": 1, "picture": 3, "masked": 1 + autoencoder.config.latent_channels}
