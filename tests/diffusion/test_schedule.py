"""Golden values of the schedules in use, and Algorithm 1 of Lin et al. 2024."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.diffusion.samplers import SamplerOptions, make_table
from sdjax.diffusion.samplers.noise_levels import SIGMA_SCHEDULES
from sdjax.diffusion.samplers.spacing import sigma_levels, solver_levels, spaced_timesteps
from sdjax.diffusion.schedule import make_schedule, sigma_to_timestep, timestep_to_sigma

# name, beta_start, beta_end: beta_0, beta_999, abar_0, abar_500, abar_999, sigma_min, sigma_max, in float64 from the
# definitions in CompVis/latent-diffusion (make_beta_schedule) and openai/improved-diffusion (betas_for_alpha_bar).
GOLDEN = {
    ("scaled_linear", 0.00085, 0.012): (0.00085, 0.012, 0.99915, 0.27633268, 0.00466009851, 0.0291672, 14.614641),
    ("scaled_linear", 0.0015, 0.0195): (0.0015, 0.0195, 0.9985, 0.114922, 1.42303975e-4, 0.0387589, 83.822494),
    ("scaled_linear", 0.0015, 0.0155): (0.0015, 0.0155, 0.9985, 0.15007005, 6.68665174e-4, 0.0387589, 38.658981),
    ("scaled_linear", 0.0015, 0.0205): (0.0015, 0.0205, 0.9985, 0.10767675, 9.69108668e-5, 0.0387589, 101.576376),
    ("scaled_linear", 0.0015, 0.015): (0.0015, 0.015, 0.9985, 0.15529056, 8.12518471e-4, 0.0387589, 35.067667),
    ("scaled_linear", 0.0001, 0.02): (0.0001, 0.02, 0.9999, 0.33127458, 7.3341246e-4, 0.0100005, 36.911912),
    ("linear", 0.0001, 0.02): (0.0001, 0.02, 0.9999, 0.07779666, 4.03582977e-5, 0.0100005, 157.407281),
    ("cosine", 0.0001, 0.02): (4.12842e-5, 0.999, 0.99995872, 0.49228517, 2.42876691e-9, 0.0064254, 20291.17),
}


@pytest.mark.parametrize(("key", "golden"), GOLDEN.items(), ids=lambda v: str(v[0]))
def test_golden_values(key, golden):
    s = make_schedule(key[0], 1000, key[1], key[2])
    got = (s.betas[0], s.betas[-1], *s.alphas_cumprod[[0, 500, 999]], s.sigmas[0], s.sigmas[-1])
    np.testing.assert_allclose(got, golden, rtol=5e-6)
    np.testing.assert_allclose(s.snr, 1.0 / s.sigmas**2, rtol=1e-12)
    np.testing.assert_allclose(1.0 / (1.0 + s.sigmas**2), s.alphas_cumprod, rtol=1e-12)


def test_zero_terminal_snr():
    plain, s = make_schedule(), make_schedule(zero_terminal_snr=True)
    np.testing.assert_allclose(s.alphas_cumprod[[500, 998]], [0.2410188, 1.9679e-7], rtol=2e-5)
    assert s.alphas_cumprod[-1] == 0.0
    assert s.alphas_cumprod[0] == pytest.approx(plain.alphas_cumprod[0], rel=1e-12)
    np.testing.assert_allclose(np.cumprod(1.0 - s.betas), s.alphas_cumprod, rtol=1e-9)
    assert s.sigmas[-1] == pytest.approx(4096.0, rel=1e-6)  # sqrt(2^24 - 1)


def test_min_snr_clips_147_timesteps():
    assert int((make_schedule().snr > 5).sum()) == 147


def test_timestep_and_sigma_are_inverse():
    s = make_schedule()
    theirs = diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    levels = np.array([0.01, 0.03, 0.5, 1.7, 9.0, 14.6, 20.0])
    expected = [theirs._sigma_to_t(level, np.log(s.sigmas)) for level in levels]
    np.testing.assert_allclose(sigma_to_timestep(levels, s.sigmas), expected, atol=1e-9)
    np.testing.assert_allclose(sigma_to_timestep(s.sigmas, s.sigmas), np.arange(1000), atol=1e-9)
    np.testing.assert_allclose(timestep_to_sigma(np.array([3.25]), s.sigmas), 0.75 * s.sigmas[3] + 0.25 * s.sigmas[4])


def test_spacings_of_fifty_steps():
    # Lin et al. 2024, table 2, and Stable Diffusion's scheduler (leading, offset 1).
    assert np.round(spaced_timesteps("linspace", 50, 1000))[:5].tolist() == [999, 979, 958, 938, 917]
    assert spaced_timesteps("leading", 50, 1000, 1)[[0, 1, 48, 49]].tolist() == [981, 961, 21, 1]
    assert spaced_timesteps("trailing", 50, 1000)[[0, 1, 48, 49]].tolist() == [999, 979, 39, 19]


def test_levels_of_stable_diffusion():
    # k-diffusion's get_sigmas and get_sigmas_karras on CompVis/stable-diffusion's schedule.
    whole = np.round(spaced_timesteps("linspace", 5, 1000))
    sigmas = timestep_to_sigma(whole, make_schedule().sigmas)
    np.testing.assert_allclose(sigmas, [14.61464, 4.08173, 1.61828, 0.6958, 0.02917], atol=6e-6)
    karras = sigma_levels(make_schedule(), 10, SamplerOptions(sigma_schedule="karras"))
    expected = [14.61464, 9.10293, 5.47839, 3.1686, 1.74942, 0.91407, 0.44692, 0.2014, 0.08191, 0.02917, 0.0]
    np.testing.assert_allclose(karras.sigmas, expected, atol=6e-6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("quadratic",), "unknown noise schedule 'quadratic'; choose one of: cosine, linear"),
        (("linear", 1000, 0.02, 0.01), "beta_start <= beta_end"),
    ],
)
def test_mistakes_are_named(arguments, says):
    with pytest.raises(UserError, match=says):
        make_schedule(*arguments)


def levels_of(name: str, steps: int) -> np.ndarray:
    return sigma_levels(make_schedule(), steps, SamplerOptions(sigma_schedule=name)).sigmas


def test_simple_takes_every_nth_level():
    """ComfyUI, comfy/samplers.py, simple_scheduler: sigmas[-(1 + int(x * T / n))], here counted out for n = 7."""
    whole = make_schedule().sigmas
    assert levels_of("simple", 7).tolist() == [*whole[[999, 857, 714, 571, 428, 285, 142]], 0.0]
    told = sigma_levels(make_schedule(), 7, SamplerOptions(sigma_schedule="simple")).timesteps
    np.testing.assert_allclose(told, [999, 857, 714, 571, 428, 285, 142], atol=1e-9)


def test_sgm_uniform_leaves_out_the_last_of_one_more():
    """ComfyUI's normal_scheduler(sgm=True), A1111's sgm_uniform: linspace(999, 0, n + 1), log sigma interpolated."""
    whole = np.log(make_schedule().sigmas)
    # n = 4: 999, 749.25, 499.5, 249.75
    expected = [whole[999], 0.75 * whole[749] + 0.25 * whole[750], (whole[499] + whole[500]) / 2]
    expected.append(0.25 * whole[249] + 0.75 * whole[250])
    np.testing.assert_allclose(levels_of("sgm_uniform", 4), [*np.exp(expected), 0.0], rtol=1e-12)


def test_kl_optimal_is_even_in_arctangent():
    """ComfyUI's kl_optimal_scheduler, after Sabour et al. 2024, theorem 3.1."""
    levels = levels_of("kl_optimal", 9)
    angles = np.arctan(levels[:-1])
    np.testing.assert_allclose(np.diff(angles), (angles[-1] - angles[0]) / 8, rtol=1e-9)
    np.testing.assert_allclose(levels[[0, 8, 9]], [14.614641, 0.0291672, 0.0], rtol=5e-6)


def test_align_your_steps_are_the_published_ten():
    published = diffusers.schedulers.AysSchedules
    assert levels_of("ays", 10) == pytest.approx(published["StableDiffusionSigmas"], rel=1e-12)
    assert levels_of("ays_sdxl", 10) == pytest.approx(published["StableDiffusionXLSigmas"], rel=1e-12)
    timesteps = sigma_levels(make_schedule(), 10, SamplerOptions(sigma_schedule="ays")).timesteps
    np.testing.assert_allclose(timesteps, published["StableDiffusionTimesteps"], atol=1.0)


def test_align_your_steps_interpolates_in_log():
    """Twice the steps: every other level is a published one, those between are geometric means; 0.029 is the last."""
    twenty, ten = levels_of("ays", 20), levels_of("ays", 10)
    np.testing.assert_allclose(twenty[:20:2], ten[:10], rtol=1e-12)
    np.testing.assert_allclose(twenty[1:19:2], np.sqrt(ten[:9] * ten[1:10]), rtol=1e-12)
    np.testing.assert_allclose(twenty[[19, 20]], [np.sqrt(0.152 * 0.029), 0.0], rtol=1e-12)


def test_align_your_steps_is_for_stable_diffusion():
    with pytest.raises(
        UserError, match=r"schedule 'ays' is made for noise levels of 0\.029 to 14\.615, this checkpoint's"
    ):
        sigma_levels(make_schedule("linear", 1000, 1e-4, 0.02), 10, SamplerOptions(sigma_schedule="ays"))


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_3m_sde"])
@pytest.mark.parametrize("name", ["lu", "exponential"])
def test_a_last_step_of_no_length_changes_nothing(sampler, name):
    """Schedules that end at the least level, where the sampler shall end at it, too."""
    table = make_table(sampler, make_schedule(), 20, spacing=name, final_sigmas_type="sigma_min", solver_order=3)
    sigma = table.sigma[19]
    np.testing.assert_allclose(table.weights[19, 0], [1 / np.sqrt(1 + sigma**2), *[0.0] * 6], atol=1e-12)


@pytest.mark.parametrize("name", SIGMA_SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 10, 37])
def test_levels_fall_from_the_greatest(name, steps):
    # One step of linspace is at timestep 0, as in diffusers: Euler's kin have no range then.
    for levels in (sigma_levels, solver_levels) if steps > 1 else (solver_levels,):
        sigmas, timesteps = levels(make_schedule(), steps, SamplerOptions(sigma_schedule=name))
        assert sigmas[0] == pytest.approx(14.6146, rel=1e-4)
        assert np.all(np.diff(sigmas) < 0.0)
        assert len(timesteps) == steps
        assert np.all(np.diff(timesteps) <= 0.0)
