"""A latent diffusion model of a few thousand parameters, as shapes."""

from __future__ import annotations

from sdjax.tasks.latent import System, TextEncoder

from sdjax.convert.components import FORMATS
from sdjax.convert.families import scheduler_config
from sdjax.models.autoencoder import Autoencoder, AutoencoderConfig
from sdjax.models.clip import CLIPText, CLIPTextConfig
from sdjax.models.unet import UNet, UNetConfig
from sdjax.plan.variants import Shaped


def tiny_model() -> Shaped:
    """One level with attention, one without; latents of 4 channels at half the size."""
    unet = UNetConfig(channels=(32, 64), depths=(1, 0), heads=(2, 2), context_dim=32, layers_per_block=1)
    vae = AutoencoderConfig(channels=(8, 16), layers_per_block=1, groups=4)
    text = CLIPTextConfig(vocab_size=64, width=32, layers=1, heads=2, feed_forward=64)
    system = System(UNet(unet), Autoencoder(vae), (TextEncoder("text_encoder", CLIPText(text)),), "epsilon")
    configs = {"unet": unet, "vae": vae, "text_encoder": text}
    params = {name: FORMATS[name].shapes(config) for name, config in configs.items()}
    return Shaped(system, params, scheduler_config("sdxl", "epsilon", ()), 16)
