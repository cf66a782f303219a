"""Runs the UNet and the decoder of a diffusers FOLDER in diffusers, in a process of its own, whose memory then is free.

Inputs are arrays of INPUTS.npz, channels last; OUTPUTS.npz gets "unet" and "image", channels last too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

folder, inputs, outputs = map(Path, sys.argv[1:])
given = {name: torch.from_numpy(array) for name, array in np.load(inputs).items()}


@torch.inference_mode()
def unet() -> torch.Tensor:
    """The UNet's output; SDXL's is told a pooled prompt and six numbers besides."""
    network = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval()
    added = {"text_embeds": given["pooled"], "time_ids": given["numbers"]}
    return network(given["x"].movedim(-1, 1), given["t"], given["context"], added_cond_kwargs=added).sample


@torch.inference_mode()
def picture() -> torch.Tensor:
    """The decoded latents."""
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()
    return vae.decode(given["z"].movedim(-1, 1)).sample


np.savez(outputs, unet=unet().movedim(1, -1).numpy(), picture=picture().movedim(1, -1).numpy())
