from __future__ import annotations

import jax
import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch_reference import GAINS, channels_first, channels_last, randomised, translated

from sdjax.convert import autoencoder as conversion
from sdjax.core.tree import size
from sdjax.models.autoencoder import VARIANTS, Autoencoder, posterior

# Exact sizes of the published first stages (CompVis/latent-diffusion, Stability-AI/stablediffusion).
TOTALS = {"sd": 83_653_863, "sdxl": 83_653_863, "x4_upscaler": 55_325_927, "kl_f4": 55_312_063}


def reference() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        latent_channels=3,
        norm_num_groups=8,
        scaling_factor=0.7,
    )


def test_parameter_totals_are_those_of_the_published_models():
    assert {name: size(conversion.shapes(config)) for name, config in VARIANTS.items()} == TOTALS


def test_moments_and_pictures_agree_with_diffusers_to_1e_4():
    torch_vae = reference()
    config = conversion.from_diffusers_config(torch_vae.config)
    assert (config.scaling_factor, config.latent_channels, config.factor) == (0.7, 3, 4)
    model, shapes = Autoencoder(config), conversion.shapes(config)
    encode = jax.jit(lambda params, x: model.apply({"params": params}, x, method="encode"))
    decode = jax.jit(lambda params, z: model.apply({"params": params}, z, method="decode"))
    rng = np.random.default_rng(0)
    pictures = rng.uniform(-1, 1, (2, 32, 48, 3)).astype(np.float32)
    latents = rng.standard_normal((2, 8, 12, 3), np.float32)
    for gain in GAINS:
        params = translated(randomised(torch_vae, gain), conversion.TABLE, shapes)
        with torch.no_grad():
            expected = torch_vae.encode(channels_first(pictures)).latent_dist
            decoded = channels_last(torch_vae.decode(channels_first(latents)).sample)
        found = encode(params, pictures)
        np.testing.assert_allclose(found.mean, channels_last(expected.mean), atol=1e-4, rtol=0)
        np.testing.assert_allclose(found.logvar, channels_last(expected.logvar), atol=1e-4, rtol=0)
        assert decoded.std() > 0.1
        np.testing.assert_allclose(decode(params, latents), decoded, atol=1e-4, rtol=0)


def test_posterior_agrees_with_diffusers_and_its_samples_have_its_moments():
    moments = np.random.default_rng(0).normal(0, 20, (3, 4, 5, 8)).astype(np.float32)  # many beyond the clamps
    found, expected = posterior(moments), DiagonalGaussianDistribution(channels_first(moments))
    np.testing.assert_array_equal(found.logvar, channels_last(expected.logvar))
    assert (found.logvar == 20).any()
    assert (found.logvar == -30).any()
    np.testing.assert_allclose(found.kl(), expected.kl().numpy(), rtol=1e-5)

    wide = posterior(np.broadcast_to(np.float32([2.0, 2 * np.log(3.0)]), (1, 200, 200, 2)))
    draw = np.asarray(wide.sample(jax.random.key(0)))
    np.testing.assert_allclose([draw.mean(), draw.std()], [2.0, 3.0], atol=0.05)  # 40,000 draws
