from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution, VectorQuantizer
from torch_reference import GAINS, channels_first, channels_last, randomised, translated

from sdjax.checkpoints.layouts.original import Network
from sdjax.checkpoints.networks import autoencoder as conversion
from sdjax.core.tree import size
from sdjax.models import autoencoder, quantize
from sdjax.models.autoencoder import BETA, VARIANTS, Autoencoder, VQConfig, autoencoder_of, posterior

# Exact sizes of the published first stages (CompVis/latent-diffusion, Stability-AI/stablediffusion).
TOTALS = {
    "sd": 83_653_863,
    "sdxl": 83_653_863,
    "x4_upscaler": 55_325_927,
    "kl_f4": 55_312_063,
    "kl_f8": 83_653_863,
    "kl_f16": 69_610_963,
    "kl_f32": 103_880_131,
    "vq_f4": 55_322_782,
    "vq_f4_noattn": 53_219_486,
    "vq_f8": 67_717_295,
    "vq_f8_n256": 67_652_783,
    "vq_f16": 69_593_371,
}


RNG = np.random.default_rng(0)
IMAGE_SUFFIXES = RNG.uniform(-1, 1, (2, 32, 48, 3)).astype(np.float32)
LATENTS = RNG.standard_normal((2, 8, 12, 3), np.float32)
SIZES = {"block_out_channels": (16, 32, 32), "layers_per_block": 2, "latent_channels": 3, "norm_num_groups": 8}
PLAIN = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
ATTENDING = {
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
}
KL = {
    "as in Stable Diffusion": PLAIN,
    "attention beside the middle": ATTENDING,
    "no attention": {**PLAIN, "mid_block_add_attention": False},
}


def test_parameter_totals():
    assert {name: size(conversion.shapes(VARIANTS[name])) for name in TOTALS} == TOTALS
    # Not published as weights: LDM's table 8 gives their codes and channels.
    assert VARIANTS.keys() - TOTALS.keys() == {"kl_f2", "vq_f2"}


@pytest.mark.parametrize("structure", KL.values(), ids=KL)
def test_autoencoder_matches_diffusers(structure):
    torch_vae = AutoencoderKL(**SIZES, **structure, scaling_factor=0.7)
    config = conversion.from_diffusers_config(torch_vae.config)
    assert (config.scaling_factor, config.latent_channels, config.factor) == (0.7, 3, 4)
    model, shapes = Autoencoder(config), conversion.shapes(config)
    encode = jax.jit(lambda params, x: model.apply({"params": params}, x, method="encode"))
    decode = jax.jit(lambda params, z: model.apply({"params": params}, z, method="decode"))
    for gain in GAINS:
        params = translated(randomised(torch_vae, gain), conversion.TABLE, shapes)
        with torch.no_grad():
            expected = torch_vae.encode(channels_first(IMAGE_SUFFIXES)).latent_dist
            decoded = channels_last(torch_vae.decode(channels_first(LATENTS)).sample)
        found = encode(params, IMAGE_SUFFIXES)
        np.testing.assert_allclose(found.mean, channels_last(expected.mean), atol=1e-4, rtol=0)
        np.testing.assert_allclose(found.logvar, channels_last(expected.logvar), atol=1e-4, rtol=0)
        assert decoded.std() > 0.1
        np.testing.assert_allclose(decode(params, LATENTS), decoded, atol=1e-4, rtol=0)
    assert conversion.from_diffusers_config(conversion.to_diffusers_config(config)) == config


@pytest.mark.parametrize("structure", [ATTENDING, KL["no attention"]], ids=["attention", "no attention"])
def test_rounded_latents_agree_with_diffusers_to_1e_4(structure):
    torch_vae = VQModel(**SIZES, **structure, num_vq_embeddings=40)
    config = conversion.from_diffusers_config({"_class_name": "VQModel", **torch_vae.config})
    assert config.codes == 40
    params = translated(randomised(torch_vae), conversion.TABLE, conversion.shapes(config))
    model = autoencoder_of(config)
    found = jax.jit(lambda x: model.apply({"params": params}, x, method="encode"))(IMAGE_SUFFIXES)
    pictures = jax.jit(lambda z: model.apply({"params": params}, z, method="decode"))(LATENTS)
    with torch.no_grad():
        expected = torch_vae.encode(channels_first(IMAGE_SUFFIXES)).latents
        decoded = torch_vae.decode(channels_first(LATENTS)).sample
        unrounded = torch_vae.decode(channels_first(LATENTS), force_not_quantize=True).sample
    np.testing.assert_allclose(found.mean, channels_last(expected), atol=1e-4, rtol=0)
    np.testing.assert_allclose(pictures, channels_last(decoded), atol=1e-4, rtol=0)
    assert (decoded - unrounded).abs().max() > 0.1
    assert conversion.from_diffusers_config(conversion.to_diffusers_config(config)) == config


def test_codebook_loss_matches_diffusers():
    """Loss to 1e-6 of itself, gradients to 1e-5 of their largest; through rounding the gradient passes unchanged."""
    torch_quantizer = VectorQuantizer(40, 3, beta=BETA, sane_index_shape=True)  # legacy, as LDM trained
    with torch.no_grad():
        torch_quantizer.embedding.weight.copy_(torch.randn(40, 3, generator=torch.Generator().manual_seed(0)))
    z, weights = channels_first(LATENTS).requires_grad_(), np.random.default_rng(1).standard_normal(LATENTS.shape)
    rounded, loss, (_, _, codes) = torch_quantizer(z)
    (3.0 * loss + (rounded * channels_first(weights.astype("f"))).sum()).backward()
    model = autoencoder.VectorQuantizer(40, 3)
    params = {"embedding": {"embedding": torch_quantizer.embedding.weight.detach().numpy()}}

    def total(params, z):
        found = model.apply({"params": params}, z)
        return 3.0 * found.loss + (found.z * weights).sum(), found

    (_, found), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(params, jnp.asarray(LATENTS))
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_allclose(found.z, channels_last(rounded), atol=1e-6)
    np.testing.assert_allclose(found.loss, loss.item(), rtol=1e-6)
    expected = torch_quantizer.embedding.weight.grad.numpy(), channels_last(z.grad)
    for ours, theirs in zip((grads[0]["embedding"]["embedding"], grads[1]), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_original_keys_of_attention_and_codebooks():
    """LDM's names (ldm/modules/diffusionmodules/model.py): levels of the decoder count from the finest."""
    config = VQConfig((32, 32, 64), 3, 2, 32, codes=40, attention_levels=(1, 2), mid_attention=False)
    network = Network("vae", "first_stage_model.", config, {}, conversion.pieces(config))
    keys = {key: piece.key for key, piece in network.pieces.items()}
    assert keys["encoder.down_blocks.1.attentions.0.to_q.weight"] == "encoder.down.1.attn.0.q.weight"
    assert keys["decoder.up_blocks.0.attentions.2.to_out.0.bias"] == "decoder.up.2.attn.2.proj_out.bias"
    assert keys["quantize.embedding.weight"] == "quantize.embedding.weight"
    shapes = {key.removeprefix(network.prefix): shape for key, shape in network.original_shapes().items()}
    assert shapes["encoder.down.1.attn.0.q.weight"] == (32, 32, 1, 1)
    assert not any(key.startswith("encoder.mid.attn") for key in shapes)
    assert conversion.original_config(shapes, 1.0, "a file") == config


def test_usage_counts_what_is_used():
    found = quantize.counts(jnp.array([[[0, 0], [3, 3]], [[1, 1], [2, 2]]]), 8)
    np.testing.assert_array_equal(found, [2, 2, 2, 2, 0, 0, 0, 0])
    share, perplexity = quantize.usage(found)
    assert (float(share), float(perplexity)) == (0.5, pytest.approx(4.0))
    assert float(quantize.usage(jnp.array([7.0, 0.0])).perplexity) == pytest.approx(1.0)


def test_posterior_matches_diffusers():
    moments = np.random.default_rng(0).normal(0, 20, (3, 4, 5, 8)).astype(np.float32)  # many beyond the clamps
    found, expected = posterior(moments), DiagonalGaussianDistribution(channels_first(moments))
    np.testing.assert_array_equal(found.logvar, channels_last(expected.logvar))
    assert (found.logvar == 20).any()
    assert (found.logvar == -30).any()
    np.testing.assert_allclose(found.kl(), expected.kl().numpy(), rtol=1e-5)

    wide = posterior(np.broadcast_to(np.float32([2.0, 2 * np.log(3.0)]), (1, 200, 200, 2)))
    draw = np.asarray(wide.sample(jax.random.key(0)))
    np.testing.assert_allclose([draw.mean(), draw.std()], [2.0, 3.0], atol=0.05)  # 40,000 draws
