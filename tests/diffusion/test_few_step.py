"""LCM, TCD and the few-step checkpoints' own configs, against the scheduler classes of the installed diffusers.

Tolerance as in test_parity.py: 5e-5 of the trajectory's size.
"""

from __future__ import annotations

import numpy as np
import pytest
from diffusers_loop import LATENT, SHAPE, compare, model, scheduler_of, theirs
from table_loop import walk

from sdjax.core.errors import UserError
from sdjax.diffusion.samplers import SamplerOptions, make_table, sampler_of, schedule_of
from sdjax.diffusion.schedule import make_schedule

# What the scheduler_config.json of the published checkpoint says, as far as it bears on sampling.
COMMON = {**LATENT, "num_train_timesteps": 1000, "trained_betas": None, "skip_prk_steps": True, "steps_offset": 1}
CHECKPOINTS = {
    # stabilityai/sdxl-turbo
    "euler_a": {**COMMON, "_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    # stabilityai/sd-turbo; ByteDance/SDXL-Lightning asks for the same
    "euler": {
        **COMMON,
        "_class_name": "EulerDiscreteScheduler",
        "interpolation_type": "linear",
        "timestep_spacing": "trailing",
        "timestep_type": "discrete",
        "rescale_betas_zero_snr": False,
        "use_karras_sigmas": False,
    },
    # SimianLuo/LCM_Dreamshaper_v7
    "lcm": {
        **COMMON,
        "_class_name": "LCMScheduler",
        "original_inference_steps": 50,
        "rescale_betas_zero_snr": False,
        "set_alpha_to_one": True,
        "thresholding": False,
        "timestep_scaling": 10.0,
        "timestep_spacing": "leading",
    },
    # h1t/TCD-SDXL-LoRA is sampled with TCDScheduler.from_config of SDXL's own
    "tcd": {**COMMON, "_class_name": "TCDScheduler", "timestep_spacing": "leading"},
}


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("sampler", CHECKPOINTS)
def test_few_steps(sampler, steps):
    assert sampler_of(CHECKPOINTS[sampler]) == sampler
    compare(CHECKPOINTS[sampler], steps, eta=0.3)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_gamma_of_tcd(gamma, prediction):
    compare({**CHECKPOINTS["tcd"], "prediction_type": prediction}, 7, eta=gamma)


def test_boundary_condition_of_lcm_near_timestep_zero():
    """With a small timestep scaling the skip connection counts: it is 0.87 of x at timestep 19, 0.2 at 99."""
    compare({**CHECKPOINTS["lcm"], "timestep_scaling": 0.01}, 50)


@pytest.mark.parametrize("sampler", ["lcm", "tcd"])
def test_timesteps_of_ones_own(sampler):
    timesteps = (999, 700, 339, 19)
    config = CHECKPOINTS[sampler]
    scheduler = scheduler_of(config)
    given = scheduler.set_timesteps
    scheduler.set_timesteps = lambda _: given(timesteps=list(timesteps))
    noise = np.random.default_rng(0).standard_normal(SHAPE)
    rng = np.random.default_rng(1)
    drawn = [rng.standard_normal(SHAPE) for _ in timesteps]
    options = SamplerOptions.from_scheduler_config(config)
    table = make_table(sampler, schedule_of(config), 4, options, timesteps=timesteps, eta=0.0)
    assert table.timestep[:4].tolist() == list(timesteps)
    if sampler == "tcd":  # with gamma 0 nothing is drawn
        expected = theirs(scheduler, 4, noise, 0.0)
        *_, got = walk(table, model, noise * float(table.first_scale))
        np.testing.assert_allclose(got, expected[-1], rtol=0, atol=5e-5)
        return
    *_, got = walk(table, model, noise * float(table.first_scale), noises=lambda i: drawn[i])
    np.testing.assert_allclose(got, _consistency_loop(timesteps, noise, drawn), rtol=0, atol=1e-9)


def _consistency_loop(timesteps, noise, drawn) -> np.ndarray:
    """Algorithm 3 of Luo et al. 2023 in variance-preserving coordinates, epsilon prediction."""
    abar = make_schedule().alphas_cumprod
    x = noise
    for i, t in enumerate(timesteps):
        x0 = (x - np.sqrt(1.0 - abar[t]) * model(x, t)) / np.sqrt(abar[t])
        s = 10.0 * t
        x = 0.25 / (s**2 + 0.25) * x + s / np.sqrt(s**2 + 0.25) * x0
        if i + 1 < len(timesteps):
            after = abar[timesteps[i + 1]]
            x = np.sqrt(after) * x + np.sqrt(1.0 - after) * drawn[i]
    return x


def test_exact_lcm_samples_the_data():
    """Data N(0.3, 0.5^2): the function follows the probability flow to its end, so any number of steps is exact."""
    rng = np.random.default_rng(0)
    table = make_table("lcm", make_schedule(), 4)
    levels = iter(table.sigma)

    def consistency(scaled: np.ndarray, _: float) -> np.ndarray:
        s = float(next(levels))
        return 0.3 + (scaled * np.sqrt(1.0 + s**2) - 0.3) * 0.5 / np.sqrt(0.25 + s**2)

    shape = (1, 200, 200, 1)
    x = 0.3 + 0.5 * rng.standard_normal(shape) + table.sigma[0] * rng.standard_normal(shape)
    *_, got = walk(table, consistency, x, "sample", lambda _: rng.standard_normal(shape))
    assert got.mean() == pytest.approx(0.3, abs=0.01)
    assert got.std() == pytest.approx(0.5, abs=0.01)


def test_order_of_tcd_without_noise():
    """Data N(0.3, 0.5^2): the error at timestep 0, where TCD ends, halves with the step."""
    errors = []
    for stride in (20, 10):
        timesteps = tuple(range(980, 0, -stride))
        table = make_table("tcd", make_schedule(), len(timesteps), eta=0.0, timesteps=timesteps)
        levels = iter(table.sigma)

        def denoiser(scaled: np.ndarray, _: float, levels=levels) -> np.ndarray:
            s = float(next(levels))
            return (0.25 * scaled * np.sqrt(1.0 + s**2) + 0.3 * s**2) / (0.25 + s**2)

        *_, got = walk(table, denoiser, np.full((1, 1, 1, 1), 5.0), "sample")
        end = make_schedule().sigmas[0]
        exact = 0.3 + 4.7 * np.sqrt((0.25 + end**2) / (0.25 + table.sigma[0] ** 2))
        errors.append(abs(got.item() * np.sqrt(1.0 + end**2) - exact))
    assert 0.8 < np.log2(errors[0] / errors[1]) < 1.4, errors


@pytest.mark.parametrize(
    ("sampler", "arguments", "says"),
    [
        ("lcm", {"steps": 51}, "steps 51: choose 1 to 50, the steps this model was distilled on"),
        ("lcm", {"steps": 4, "spacing": "karras"}, "schedule 'karras': lcm has the timesteps of its distillation"),
        ("tcd", {"steps": 4, "spacing": "trailing"}, "schedule 'trailing': tcd has the timesteps"),
        ("tcd", {"steps": 4, "eta": 1.5}, "eta 1.5: tcd needs 0 to 1"),
        ("lcm", {"steps": 3, "timesteps": (999, 700)}, "give 3 descending integers of 0 to 999"),
        ("lcm", {"steps": 2, "timesteps": (700, 999)}, "give 2 descending integers"),
        ("lcm", {"steps": 2, "original_inference_steps": 0}, "original_inference_steps 0: choose 1 to 1000"),
    ],
)
def test_mistakes_are_named(sampler, arguments, says):
    with pytest.raises(UserError, match=says):
        make_table(sampler, make_schedule(), **arguments)
