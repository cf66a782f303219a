"""A factor on the noise of ancestral samplers, beside k-diffusion's loop; refused where there is none."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.diffusion.samplers import make_table, network_calls, sample
from sdjax.diffusion.schedule import make_schedule
from sdjax.pipeline.options import OPTIONS

SCHEDULE = make_schedule()
SHAPE = (2, 4, 4, 3)


def denoise(x, sigma, timestep):
    """A Gaussian around 0.3 with variance 0.25: its posterior mean."""
    del timestep
    s = jnp.reshape(sigma, (-1, 1, 1, 1)) ** 2
    return (0.25 * x + s * 0.3) / (0.25 + s)


@pytest.mark.parametrize("s_noise", [0.0, 1.0, 1.1])
def test_euler_ancestral_is_k_diffusions_loop(s_noise):
    """To 1e-5 in float64 (k-diffusion, sampling.py, sample_euler_ancestral)."""
    table = make_table("euler_a", SCHEDULE, 6, s_noise=s_noise)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((SHAPE[0], len(table.sigma), *SHAPE[1:])).astype(np.float32)
    first = rng.standard_normal(SHAPE).astype(np.float32)
    x = first.astype(np.float64) * table.first_scale
    found = sample(
        denoise, table, jnp.asarray(x, jnp.float32), jax.random.split(jax.random.key(0), 2), given=jnp.asarray(noise)
    )
    for i in range(network_calls(table)):
        sigma, later = table.sigma[i], table.sigma_next[i]
        up = min(later, np.sqrt(later**2 * (sigma**2 - later**2) / sigma**2))
        down = np.sqrt(later**2 - up**2)
        x0 = (0.25 * x + sigma**2 * 0.3) / (0.25 + sigma**2)
        x = x + (x - x0) / sigma * (down - sigma) + noise[:, i] * s_noise * up
    np.testing.assert_allclose(found, x, atol=1e-5)


@pytest.mark.parametrize("sampler", ["dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_only_the_noise_changes(sampler):
    plain, louder = (make_table(sampler, SCHEDULE, 6, s_noise=factor) for factor in (1.0, 1.5))
    np.testing.assert_array_equal(louder.weights[..., :-1], plain.weights[..., :-1])
    np.testing.assert_allclose(louder.weights[..., -1], 1.5 * plain.weights[..., -1])
    assert (plain.weights[..., -1] != 0).any()


def test_a_sampler_without_noise_refuses_it():
    with pytest.raises(UserError, match=r"s_noise 1\.1 changes nothing for ddim; choose one of: euler_a, dpm2_a"):
        make_table("ddim", SCHEDULE, 6, s_noise=1.1)


def test_it_is_an_option_everywhere():
    option = OPTIONS["s_noise"]
    assert (option.is_axis, option.scope, option.label) == (True, "image", "Sigma noise")
