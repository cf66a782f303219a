"""Noised image embeddings beside diffusers' StableUnCLIPPipeline, the same noise injected."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import DDPMScheduler, StableUnCLIPPipeline
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

from sdjax.diffusion.samplers import schedule_of
from sdjax.diffusion_model.noised_embedding import EmbeddingStatistics, noised_embedding

SCHEDULER = {"beta_schedule": "squaredcos_cap_v2"}
WIDTH, LEVELS = 24, (0, 250, 999)


def test_noised_embeddings_agree_with_diffusers_to_1e_4():
    """Every level in one call here, one call each there; at 999 a frequency one bit off moves a sine by 3e-5."""
    rng = np.random.default_rng(0)
    embedding, noise = rng.standard_normal((2, len(LEVELS), WIDTH)).astype("f")
    mean, std = rng.standard_normal(WIDTH).astype("f"), rng.uniform(0.5, 2.0, WIDTH).astype("f")
    normalizer = StableUnCLIPImageNormalizer(WIDTH)
    normalizer.load_state_dict({"mean": torch.from_numpy(mean)[None], "std": torch.from_numpy(std)[None]})
    pipeline: Any = SimpleNamespace(image_normalizer=normalizer, image_noising_scheduler=DDPMScheduler(**SCHEDULER))
    given = torch.from_numpy(embedding), torch.from_numpy(noise)
    with torch.no_grad():
        rows = [
            StableUnCLIPPipeline.noise_image_embeddings(pipeline, given[0][i : i + 1], level, given[1][i : i + 1])
            for i, level in enumerate(LEVELS)
        ]
    abar = schedule_of({"_class_name": "DDPMScheduler", **SCHEDULER}).alphas_cumprod[list(LEVELS)].astype("f")
    made = jax.jit(noised_embedding)(embedding, noise, jnp.array(LEVELS), abar, EmbeddingStatistics(mean, std))
    np.testing.assert_allclose(made, torch.cat(rows), atol=1e-4, rtol=0)
