"""Latent diffusion models of the Stable Diffusion family: their networks, what conditions them, and their sampling."""

from __future__ import annotations

from sdjax.tasks.latent.conditions import Asked, cond, conditions
from sdjax.tasks.latent.sampling import Guidance, Start, decode, decode_unclipped, denoise_latents, encode_image
from sdjax.tasks.latent.system import System, TextEncoder
from sdjax.tasks.latent.text import Encoded, Text, encode_text

__all__ = [
    "Asked",
    "Encoded",
    "Guidance",
    "Start",
    "System",
    "Text",
    "TextEncoder",
    "cond",
    "conditions",
    "decode",
    "decode_unclipped",
    "denoise_latents",
    "encode_image",
    "encode_text",
]
