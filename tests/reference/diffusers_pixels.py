"""Three pipelines of diffusers called as users call them, with a seeded CPU generator, on tiny random models.

What each draws, in this order, with diffusers 0.42:

DDPMPipeline: one randn of [batch, C, side, side] (C and side are the UNet's `in_channels` and `sample_size`; its type
is the UNet's), then one of the same shape in every step of DDPMScheduler whose timestep is above 0, after the network's
call. Leading spacing (the class's default) without an offset ends at 0, so that n steps draw n times, the initial
noise included; trailing spacing or a steps_offset ends above 0, and the last step draws, too (its weight is 1e-10 with
`fixed_small`, and not small with `fixed_large`). With DDIMScheduler in its place nothing is drawn after the initial
noise. The default is 1000 steps. x0 is clipped where the scheduler says so (its default), the image always.

LDMPipeline: one float32 randn of [batch, C, side, side], C being the UNet's `in_channels`; 50 steps; eta 0, and the
latents are divided by the first stage's scaling_factor. The step is told eta but not the generator: with eta above 0 it
draws from torch's global generator, which the seed does not reach.

LDMSuperResolutionPipeline: one randn of [batch, C // 2, h, w], C being the UNet's `in_channels`, and h x w the size of
the low-resolution image, which is scaled down to multiples of 32 (Lanczos) where it is a PIL image and taken as it is
where it is a tensor in [-1, 1]; a PIL image is a batch of one, whatever batch_size says. 100 steps; eta as in
LDMPipeline. The latents are NOT divided by scaling_factor before they are decoded.

A generator draws for the batch together, so that image i of a batch of two is not image 0 of another call; a list of
generators, one an image, draws [1, C, h, w] from each in turn.
"""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import torch
from torch_reference import randomised

SIDE, LATENT_SIDE = 16, 8  # of DDPM's images, and of LDM's latents, which stand for four pixels a side


def write_ddpm(folder: Path, **scheduler: object) -> None:
    """A DDPMPipeline of images of 16 pixels.

    Args:
        scheduler: what differs from DDPMScheduler's defaults.
    """
    unet = diffusers.UNet2DModel(sample_size=SIDE, **_unet_sizes(3, 3))
    diffusers.DDPMPipeline(randomised(unet), diffusers.DDPMScheduler(**scheduler)).save_pretrained(folder)


def ddpm_images(folder: Path, seed: int, steps: int = 8, batch: int = 2) -> np.ndarray:
    """Images [batch 16 16 3] in [0, 1]."""
    pipe = _quiet(diffusers.DDPMPipeline.from_pretrained(folder))
    generator = torch.Generator().manual_seed(seed)
    return pipe(batch_size=batch, generator=generator, num_inference_steps=steps, output_type="np").images


def write_ldm(folder: Path, scaling_factor: float = 0.5, side: int = LATENT_SIDE) -> None:
    """An LDMPipeline with the schedule of CompVis/ldm-celebahq-256.

    Args:
        scaling_factor: of its first stage.
        side: of the latents, which alone decides the images' size; the first stage's sample_size is 32 in any case.
    """
    unet = diffusers.UNet2DModel(sample_size=side, **_unet_sizes(3, 3))
    vqvae = randomised(_first_stage(scaling_factor))
    diffusers.LDMPipeline(vqvae, randomised(unet), _ddim()).save_pretrained(folder)


def ldm_images(folder: Path, seed: int, steps: int = 8, batch: int = 2) -> np.ndarray:
    """Images [batch s s 3] in [0, 1], where s is four times the latents' side."""
    pipe = _quiet(diffusers.LDMPipeline.from_pretrained(folder))
    generator = torch.Generator().manual_seed(seed)
    return pipe(batch_size=batch, generator=generator, num_inference_steps=steps, output_type="np").images


def write_super_resolution(folder: Path, scaling_factor: float = 1.0) -> None:
    """An LDMSuperResolutionPipeline that enlarges four times.

    Args:
        scaling_factor: of its first stage, which this pipeline ignores.
    """
    unet = diffusers.UNet2DModel(sample_size=LATENT_SIDE, **_unet_sizes(6, 3))
    vqvae = randomised(_first_stage(scaling_factor))
    diffusers.LDMSuperResolutionPipeline(vqvae, randomised(unet), _ddim()).save_pretrained(folder)


def super_resolution_images(folder: Path, images: np.ndarray, seed: int, steps: int = 8) -> np.ndarray:
    """Images [b 4h 4w 3] in [0, 1] of low-resolution ones, uint8 [b h w 3], given as a tensor."""
    pipe = _quiet(diffusers.LDMSuperResolutionPipeline.from_pretrained(folder))
    low = torch.from_numpy(images.astype(np.float32) / 127.5 - 1.0).permute(0, 3, 1, 2)
    generator = torch.Generator().manual_seed(seed)
    return pipe(low, num_inference_steps=steps, generator=generator, output_type="np").images


def _unet_sizes(in_channels: int, out_channels: int) -> dict[str, object]:
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 32,
    }


def _first_stage(scaling_factor: float) -> diffusers.VQModel:
    return diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        num_vq_embeddings=64,
        scaling_factor=scaling_factor,
    )


def _ddim() -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False)


def _quiet(pipe: diffusers.DiffusionPipeline) -> diffusers.DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe
