"""Guidance and thresholds against PyTorch diffusers."""

from __future__ import annotations

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from sdjax.diffusion.denoise import make_denoise, per_image
from sdjax.diffusion.guidance import (
    classifier_free,
    classifier_guided,
    dynamic_threshold,
    guided,
    image_guided,
    rescale_guidance,
    static_threshold,
)
from sdjax.diffusion.samplers import make_table, sample
from sdjax.diffusion.schedule import make_schedule

RNG = np.random.default_rng(0)
COND, UNCOND, X = (RNG.standard_normal((3, 4, 5, 2)).astype(np.float32) for _ in range(3))


def to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescale(phi):
    combined = UNCOND + 7.5 * (COND - UNCOND)
    expected = rescale_noise_cfg(to_torch(combined), to_torch(COND), phi).permute(0, 2, 3, 1)
    mine = classifier_free(jnp.asarray(COND), jnp.asarray(UNCOND), 7.5)
    np.testing.assert_allclose(mine, combined, atol=1e-5)
    np.testing.assert_allclose(rescale_guidance(mine, jnp.asarray(COND), phi), expected, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_guidance_of_x0_equals_guidance_of_output(prediction):
    """Without rescaling, one linear combination whatever is predicted."""
    sigma, t, x = jnp.float32(1.7), jnp.float32(400.0), jnp.asarray(X)

    def pair(x, t):
        return jnp.asarray(COND), jnp.asarray(UNCOND)

    x0 = make_denoise(guided(pair, 3.0), prediction)(x, sigma, t)
    separate = [make_denoise(lambda x, t, i=i: pair(x, t)[i], prediction)(x, sigma, t) for i in range(2)]
    np.testing.assert_allclose(x0, separate[1] + 3.0 * (separate[0] - separate[1]), atol=2e-5)


def test_a_learned_variance_is_the_conditional_networks():
    def pair(x, t):
        return jnp.concatenate([COND, COND + 1], -1), jnp.concatenate([UNCOND, UNCOND - 1], -1)

    output = guided(pair, 4.0, 0.5)(jnp.asarray(X), jnp.zeros(3))
    np.testing.assert_array_equal(output[..., 2:], COND + 1)
    alone = guided(lambda x, t: (jnp.asarray(COND), jnp.asarray(UNCOND)), 4.0, 0.5)(jnp.asarray(X), jnp.zeros(3))
    np.testing.assert_allclose(output[..., :2], alone, atol=1e-6)


@pytest.mark.parametrize(("ratio", "greatest"), [(0.995, 1.0), (0.9, 3.0), (0.5, 10.0)])
def test_dynamic_threshold(ratio, greatest):
    scheduler = diffusers.DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=greatest)
    x0 = 2.0 * COND * np.array([0.2, 1.0, 3.0], np.float32)[:, None, None, None]
    expected = scheduler._threshold_sample(to_torch(x0)).permute(0, 2, 3, 1)
    np.testing.assert_allclose(dynamic_threshold(jnp.asarray(x0), ratio, greatest), expected, atol=2e-6)


def test_static_threshold():
    np.testing.assert_array_equal(static_threshold(jnp.asarray(3 * X), 1.5), np.clip(3 * X, -1.5, 1.5))


def test_a_classifier_leads_to_the_posterior():
    """x ~ N(0, 1) and y = x + N(0, 1/4), both scores known: DDIM with scale 1 samples N(y / 1.25, 0.2), to 0.02.

    Scale 0 leaves N(0, 1); with 4 the classifier is yet surer of what was asked for.
    """
    schedule, y = make_schedule("linear", 1000, 1e-4, 0.02), 1.5
    table = make_table("ddim", schedule, 1000, spacing="trailing", set_alpha_to_one=True)
    abar = jnp.asarray(schedule.alphas_cumprod, jnp.float32)

    def denoise(x, sigma, timestep):
        return x / (per_image(sigma, x) ** 2 + 1.0)

    def log_probability(x_vp, timestep):
        level = abar[timestep.astype(int)][:, None, None, None]
        return -(jnp.square(y - jnp.sqrt(level) * x_vp) / (2.0 * (1.25 - level))).sum((1, 2, 3))

    # Steps are affine in x, so a few numbers of mean 0 and variance 1 stand for as many as one likes.
    noise = np.random.default_rng(0).standard_normal((2, 8, 8, 1))
    noise = jnp.asarray((noise - noise.mean()) / noise.std(), jnp.float32)

    @jax.jit
    def run(scale):
        keys = jax.random.split(jax.random.key(0), 2)
        return sample(classifier_guided(denoise, log_probability, scale), table, noise * table.first_scale, keys)

    found = {scale: np.asarray(run(scale)) for scale in (0.0, 1.0, 4.0)}
    assert (found[0.0].mean(), found[0.0].var()) == pytest.approx((0.0, 1.0), abs=0.03)
    assert (found[1.0].mean(), found[1.0].var()) == pytest.approx((y / 1.25, 0.2), abs=0.02)
    errors = [float(np.square(x - y).mean()) for x in found.values()]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ancestral_steps_move_their_mean_as_adm_does(variance):
    """Algorithm 1 in float64, with a variance that depends on the pixel, clipping, and the same noise: to 1e-5."""
    schedule, steps, scale = make_schedule("linear", 1000, 1e-4, 0.02), 10, 0.4
    table = make_table("ddpm", schedule, steps, spacing="linspace", variance_type=variance, clip_sample=True)
    rng = np.random.default_rng(0)
    y = rng.standard_normal((2, 4, 4, 3))
    x = rng.standard_normal((2, 4, 4, 3))
    noise = rng.standard_normal((2, len(table.sigma), 4, 4, 3))

    def network(x_vp, sin=np.sin):
        return 0.5 * sin(x_vp) + 0.3 * x_vp, sin(x_vp)  # epsilon, v

    def denoise(x, sigma, timestep):
        sigma = per_image(sigma, x)
        epsilon, v = network(x / jnp.sqrt(sigma**2 + 1.0), jnp.sin)
        x0 = x - sigma * epsilon
        return (x0, v) if variance == "learned_range" else x0

    def log_probability(x_vp, timestep):
        return -0.5 * (jnp.square(y - x_vp) * (1.0 + timestep / 1000)[:, None, None, None]).sum((1, 2, 3))

    guided = classifier_guided(denoise, log_probability, scale)
    start = jnp.asarray(x * table.first_scale)
    keys = jax.random.split(jax.random.key(0), 2)
    made = sample(guided, table, start, keys, given=jnp.asarray(noise))

    timesteps = table.timestep[:steps].astype(int)
    abar = schedule.alphas_cumprod[timesteps]
    before = np.append(abar[1:], 1.0)
    betas = 1.0 - abar / before
    posterior = betas * (1.0 - before) / (1.0 - abar)
    clipped = np.append(posterior[:-1], posterior[-2])
    for i, t in enumerate(timesteps):
        epsilon, v = network(x)
        x0 = np.clip((x - np.sqrt(1.0 - abar[i]) * epsilon) / np.sqrt(abar[i]), -1.0, 1.0)
        mean = np.sqrt(before[i]) * betas[i] * x0 + np.sqrt(abar[i] / before[i]) * (1.0 - before[i]) * x
        mean = mean / (1.0 - abar[i])
        share = (v + 1.0) / 2.0
        learned = np.exp(share * np.log(betas[i]) + (1.0 - share) * np.log(clipped[i]))
        sigma = {"fixed_small": clipped[i], "fixed_large": betas[i], "learned_range": learned}[variance]
        mean = mean + sigma * scale * (y - x) * (1.0 + t / 1000)
        x = mean + (t > 0) * np.sqrt(sigma) * noise[:, i]
    np.testing.assert_allclose(made, x, atol=1e-5 * np.abs(x).max())


def test_guides_add_up():
    """Two classifiers, and an image over one: nothing of the inner one is lost."""
    x, sigma, t = jnp.asarray(X), jnp.float32(1.7), jnp.float32(9.0)
    denoise = lambda x, sigma, t: x / (1.0 + sigma**2)  # noqa: E731
    towards = lambda y: lambda x, t: -0.5 * jnp.square(y - x).sum((1, 2, 3))  # noqa: E731
    one = classifier_guided(denoise, towards(1.0), 2.0)
    x_vp = x / jnp.sqrt(sigma**2 + 1.0)
    both = classifier_guided(one, towards(-0.5), 1.0)(x, sigma, t)
    np.testing.assert_allclose(both.gradient, 2.0 * (1.0 - x_vp) + (-0.5 - x_vp), atol=1e-5)
    over = image_guided(one, lambda x0: -0.5 * jnp.square(x0).sum((1, 2, 3)), 1.0)(x, sigma, t)
    np.testing.assert_allclose(over.gradient, 2.0 * (1.0 - x_vp), atol=1e-5)
    assert (over.x0 != denoise(x, sigma, t)).all()


def test_a_picture_guides_through_the_network():
    """LDM's eq. 15 and 16; a learned variance stays the network's.

    Of standard normal data x0 = x / (1 + sigma^2), so the gradient of -|y - x0|^2 / 2 moves x0 by the share
    sigma^2 / (sigma^2 + 1) of what is missing.
    """
    x, sigma, y = jnp.asarray(X), jnp.float32(1.7), jnp.asarray(COND)

    def denoise(x, sigma, t):
        return x / (1.0 + sigma**2), x

    def likelihood(x0):
        return -0.5 * jnp.square(y - x0).sum((1, 2, 3))

    for scale in (0.0, 1.0, 2.5):
        found, variance = image_guided(denoise, likelihood, scale)(x, sigma, jnp.float32(9.0))
        x0 = x / (1.0 + sigma**2)
        np.testing.assert_allclose(found, x0 + scale * sigma**2 / (1.0 + sigma**2) * (y - x0), atol=1e-6)
        np.testing.assert_array_equal(variance, x)
