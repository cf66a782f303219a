"""Losses against independent float64 derivations, and against PyTorch diffusers where it has the formula."""

from __future__ import annotations

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_snr
from scipy.stats import norm

from sdjax.core.errors import UserError
from sdjax.diffusion.denoise import PREDICTIONS, make_denoise, q_sample, to_x0
from sdjax.diffusion.loss import (
    diffusion_loss,
    gather,
    hybrid_loss,
    min_snr_weight,
    offset_noise,
    posterior_tables,
    target,
    uniform_timesteps,
    vlb_term,
    vp_to_x0,
)
from sdjax.diffusion.schedule import make_schedule

SCHEDULE = make_schedule()
TIMESTEPS = jnp.array([0, 1, 146, 147, 500, 999])
RNG = np.random.default_rng(0)
X0 = jnp.asarray(np.round(RNG.uniform(-1, 1, (6, 4, 4, 3)) * 127.5) / 127.5, jnp.float32)
NOISE = jnp.asarray(RNG.standard_normal(X0.shape), jnp.float32)
OUTPUT = jnp.asarray(RNG.standard_normal(X0.shape), jnp.float32)


def theirs() -> diffusers.DDPMScheduler:
    return diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def to_torch(x) -> torch.Tensor:
    return torch.from_numpy(np.array(x))


def test_q_sample_and_velocity_are_diffusers_own():
    abar, t = gather(SCHEDULE.alphas_cumprod, TIMESTEPS), to_torch(TIMESTEPS).long()
    noisy = theirs().add_noise(to_torch(X0), to_torch(NOISE), t)
    velocity = theirs().get_velocity(to_torch(X0), to_torch(NOISE), t)
    # 1 - abar is off by 1e-4 of itself in diffusers' float32 table.
    np.testing.assert_allclose(q_sample(X0, NOISE, abar), noisy, atol=1e-5)
    np.testing.assert_allclose(target("v_prediction", X0, NOISE, abar), velocity, atol=1e-5)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_the_target_leads_back_to_the_clean_sample(kind):
    """Both coordinates, and the whole way through make_denoise; sigma up to 14.6, so x0 from noise loses a digit."""
    abar = gather(SCHEDULE.alphas_cumprod, TIMESTEPS)
    goal, x_vp = target(kind, X0, NOISE, abar), q_sample(X0, NOISE, abar)
    np.testing.assert_allclose(vp_to_x0(kind, goal, x_vp, abar), X0, atol=2e-5)
    sigma = jnp.sqrt((1.0 - abar) / abar)
    x = x_vp / jnp.sqrt(abar)[:, None, None, None]
    np.testing.assert_allclose(to_x0(kind, goal, x, sigma), X0, atol=2e-5)
    for i, t in enumerate(TIMESTEPS):
        seen = {}

        def network(x_vp, timestep, i=i, seen=seen):
            seen.update(x=x_vp, t=timestep)
            return goal[i : i + 1]

        x0 = make_denoise(network, kind)(x[i : i + 1], sigma[i], t.astype(jnp.float32))
        np.testing.assert_allclose(x0, X0[i : i + 1], atol=2e-5)
        np.testing.assert_allclose(seen["x"], x_vp[i : i + 1], atol=2e-6)
        assert seen["t"].tolist() == [int(t)]


def test_velocity_stays_exact_at_zero_terminal_snr():
    v, x_vp = -X0, NOISE  # abar = 0: v = -x0, x_vp = noise
    sigma = jnp.float32(2.0**20)
    np.testing.assert_allclose(to_x0("v_prediction", v, x_vp * jnp.sqrt(sigma**2 + 1), sigma), X0, atol=5e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights(prediction):
    """min(snr, 5) over snr, 1 and snr + 1 (Hang et al. 2023), snr from diffusers' training utilities."""
    snr = compute_snr(theirs(), to_torch(TIMESTEPS).long()).numpy().astype(np.float64)
    divisor = {"epsilon": snr, "sample": 1.0, "v_prediction": snr + 1.0}[prediction]
    got = min_snr_weight(prediction, gather(SCHEDULE.alphas_cumprod, TIMESTEPS))
    np.testing.assert_allclose(got, np.minimum(snr, 5.0) / divisor, rtol=2e-4)
    loss = diffusion_loss(OUTPUT, X0, NOISE, gather(SCHEDULE.alphas_cumprod, TIMESTEPS), prediction)
    weighted = diffusion_loss(OUTPUT, X0, NOISE, gather(SCHEDULE.alphas_cumprod, TIMESTEPS), prediction, "min_snr")
    np.testing.assert_allclose(weighted, loss * got, rtol=1e-6)


def test_min_snr_weighs_x0_errors_equally():
    """What the division is for: the three weighted losses are one loss."""
    abar = gather(SCHEDULE.alphas_cumprod, jnp.array([300, 600, 900]))
    x0, noise = X0[:3], NOISE[:3]
    wrong = x0 + 0.1 * OUTPUT[:3]
    x_vp = q_sample(x0, noise, abar)
    root = jnp.sqrt(1.0 - abar)[:, None, None, None]
    implied_noise = (x_vp - jnp.sqrt(abar)[:, None, None, None] * wrong) / root
    outputs = {
        "sample": wrong,
        "epsilon": implied_noise,
        "v_prediction": target("v_prediction", wrong, implied_noise, abar),
    }
    losses = [diffusion_loss(o, x0, noise, abar, kind, "min_snr") for kind, o in outputs.items()]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-4)


def test_min_snr_is_finite_at_zero_terminal_snr():
    abar = jnp.zeros((1,))
    assert [float(min_snr_weight(kind, abar)[0]) for kind in PREDICTIONS] == [1.0, 0.0, 0.0]


def test_norms_and_dtype():
    abar = gather(SCHEDULE.alphas_cumprod, TIMESTEPS)
    error = np.asarray(OUTPUT, np.float64) - np.asarray(NOISE, np.float64)
    l1 = diffusion_loss(OUTPUT, X0, NOISE, abar, "epsilon", norm="l1")
    np.testing.assert_allclose(l1, np.abs(error).mean((1, 2, 3)), rtol=1e-6)
    l2 = diffusion_loss(OUTPUT.astype(jnp.bfloat16), X0, NOISE, abar, "epsilon")
    assert l2.dtype == jnp.float32
    rounded = np.asarray(OUTPUT.astype(jnp.bfloat16), np.float64) - np.asarray(NOISE, np.float64)
    np.testing.assert_allclose(l2, (rounded**2).mean((1, 2, 3)), rtol=1e-6)


def bound_in_float64(v: np.ndarray, epsilon: np.ndarray) -> np.ndarray:
    """One term of the bound in bits per dimension, from Bayes' rule for three jointly normal variables and scipy."""
    x0, noise = np.asarray(X0, np.float64), np.asarray(NOISE, np.float64)
    bits = []
    for i, t in enumerate(TIMESTEPS.tolist()):
        beta, now = SCHEDULE.betas[t], SCHEDULE.alphas_cumprod[t]
        before = SCHEDULE.alphas_cumprod[t - 1] if t else 1.0
        x = np.sqrt(now) * x0[i] + np.sqrt(1 - now) * noise[i]
        guess = (x - np.sqrt(1 - now) * epsilon[i]) / np.sqrt(now)

        def posterior(clean, x=x, beta=beta, before=before):
            # Precisions add: y = x_{t-1} is N(sqrt(before) clean, 1 - before), and x given y N(sqrt(1 - beta) y, beta).
            if before == 1.0:
                return clean, 0.0
            precision = 1.0 / (1.0 - before) + (1.0 - beta) / beta
            return (
                np.sqrt(before) * clean / (1.0 - before) + np.sqrt(1 - beta) * x / beta
            ) / precision, 1.0 / precision

        mean, (true_mean, true_variance) = posterior(guess)[0], posterior(x0[i])
        second = SCHEDULE.betas[1] * (1 - SCHEDULE.alphas_cumprod[0]) / (1 - SCHEDULE.alphas_cumprod[1])
        lower = np.log(true_variance) if t else np.log(second)
        share = (v[i] + 1) / 2
        scale = np.exp(0.5 * (share * np.log(beta) + (1 - share) * lower))
        if t:
            nats = np.log(scale) - lower / 2 + (true_variance + (true_mean - mean) ** 2) / (2 * scale**2) - 0.5
        else:
            upper_edge = np.where(x0[i] > 0.999, np.inf, x0[i] + 1 / 255)
            lower_edge = np.where(x0[i] < -0.999, -np.inf, x0[i] - 1 / 255)
            d = norm(mean, scale)
            far = np.where(x0[i] > mean, d.sf(lower_edge) - d.sf(upper_edge), d.cdf(upper_edge) - d.cdf(lower_edge))
            nats = -np.log(np.maximum(far, 1e-12))
        bits.append(nats.mean() / np.log(2))
    return np.array(bits)


def test_variational_bound():
    """float32 tables and inputs: 1 - abar at timesteps 0 and 1 costs a relative 1e-3, elsewhere 1e-4."""
    v = np.tanh(RNG.standard_normal(X0.shape))
    epsilon = np.asarray(NOISE, np.float64) + 0.1 * RNG.standard_normal(X0.shape)
    expected = bound_in_float64(v, epsilon)
    got = vlb_term(jnp.asarray(epsilon, jnp.float32), jnp.asarray(v, jnp.float32), X0, NOISE, TIMESTEPS, TABLES)
    np.testing.assert_allclose(got[:2], expected[:2], rtol=1e-3)
    np.testing.assert_allclose(got[2:], expected[2:], rtol=1e-4)
    both = jnp.concatenate([jnp.asarray(epsilon, jnp.float32), jnp.asarray(v, jnp.float32)], -1)
    simple = ((epsilon - np.asarray(NOISE)) ** 2).mean((1, 2, 3))
    hybrid = hybrid_loss(both, X0, NOISE, TIMESTEPS, TABLES)
    np.testing.assert_allclose(hybrid, simple + expected, rtol=1e-3)  # 0.001 T = 1


TABLES = posterior_tables(SCHEDULE)


def test_the_bound_trains_the_variance_alone():
    output = jnp.concatenate([OUTPUT, 0.1 * NOISE], -1)

    def total(output):
        return hybrid_loss(output, X0, NOISE, TIMESTEPS, TABLES).sum()

    gradient = jax.grad(total)(output)
    simple = jax.grad(lambda o: diffusion_loss(o, X0, NOISE, TABLES.abar[TIMESTEPS], "epsilon").sum())(OUTPUT)
    np.testing.assert_allclose(gradient[..., :3], simple, rtol=1e-6)
    assert float(jnp.abs(gradient[..., 3:]).min()) > 0.0


def test_offset_noise():
    key = jax.random.key(0)
    offset = offset_noise(key, NOISE, 0.05) - NOISE
    np.testing.assert_allclose(offset, jnp.broadcast_to(offset[:, :1, :1], offset.shape), atol=1e-6)
    wide = offset_noise(key, jnp.zeros((2000, 1, 1, 4)), 0.05)
    assert float(wide.std()) == pytest.approx(0.05, rel=0.03)


def test_timesteps_are_uniform():
    counts = np.bincount(uniform_timesteps(jax.random.key(1), 20000, 10), minlength=10)
    assert len(counts) == 10
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9  # chi-squared, 9 degrees, one in a thousand


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: diffusion_loss(OUTPUT, X0, NOISE, X0[:, 0, 0, 0], "score"), "prediction type 'score'"),
        (lambda: diffusion_loss(OUTPUT, X0, NOISE, X0[:, 0, 0, 0], "epsilon", "p2"), "loss weighting 'p2'"),
        (lambda: diffusion_loss(OUTPUT, X0, NOISE, X0[:, 0, 0, 0], "epsilon", norm="l3"), "loss norm 'l3'"),
        (lambda: hybrid_loss(OUTPUT, X0, NOISE, TIMESTEPS, TABLES), "must have 6 channels"),
        (lambda: posterior_tables(make_schedule(zero_terminal_snr=True)), "terminal SNR above zero"),
    ],
)
def test_mistakes_are_named(call, says):
    with pytest.raises(UserError, match=says):
        call()
