"""A latent diffusion model of a few thousand parameters, as shapes."""

from __future__ import annotations

import zoo

from sdjax.checkpoints.checkpoint import FORMATS
from sdjax.checkpoints.families import scheduler_config
from sdjax.diffusion_model.conditioners.text import TextConditioner
from sdjax.diffusion_model.model import DiffusionModel, clip_encoders
from sdjax.models.autoencoder import Autoencoder
from sdjax.models.unet import UNet
from sdjax.plan.variants import Shaped


def tiny_model() -> Shaped:
    """One level with attention, one without; latents of 4 channels at half the size."""
    configs = {"unet": zoo.UNETS["sd1"], "vae": zoo.VAES["sd"], "text_encoder": zoo.clip_text(64, 63, 77)}
    encoders = clip_encoders(configs, "float32")
    null = ((0,) * 77,)
    model = DiffusionModel(
        UNet(configs["unet"]), Autoencoder(configs["vae"]), TextConditioner(encoders, 0, 256, null), "epsilon"
    )
    params = {name: FORMATS[name].shapes(config) for name, config in configs.items()}
    return Shaped(model, params, scheduler_config("sdxl", "epsilon", ()), 16)
