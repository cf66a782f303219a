"""Trajectories, timesteps and first noise against the scheduler classes of the installed PyTorch diffusers.

Tolerance: 5e-5 of the trajectory's own size (1e-4 over all the settings), because diffusers keeps sigmas and abar in
float32 (at the first timestep 1 - abar has lost four digits, which the mean squares out); 1e-9 where its tables can be
replaced by float64 ones.
"""

from __future__ import annotations

import inspect

import diffusers
import numpy as np
import pytest
import torch
from table_loop import walk

from sdjax.core.errors import UserError
from sdjax.diffusion.samplers import SamplerOptions, make_table, sampler_of, schedule_of, start_of

SHAPE = (2, 4, 4, 3)
CLASSES = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "plms": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpm2_a": "KDPM2AncestralDiscreteScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "dpmpp_2s": "DPMSolverSinglestepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
}
VARIANCE_PRESERVING = (
    *("ddpm", "ddim", "plms", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s", "unipc", "deis"),
    *("lcm", "tcd"),
)
SWITCHES = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas"}
ON_TIMESTEPS = ("ddpm", "ddim", "plms", "euler_a", "lcm", "tcd")
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


def model(x: np.ndarray, t: float) -> np.ndarray:
    """Nonlinear in x, and different at every timestep."""
    return np.tanh(x * (0.3 + t / 1500.0)) + 0.1 * np.cos(5.0 * x + t / 90.0)


def scheduler_of(config: dict):
    accepted = {k: v for k, v in config.items() if not k.startswith("_")}
    return getattr(diffusers, config["_class_name"]).from_config(accepted)


def theirs(scheduler, steps: int, noise: np.ndarray, eta: float, x=None, begin: int = 0, told=None):
    """diffusers' own loop; x after every step. told: timesteps for the network in place of the scheduler's."""
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    generator = torch.Generator().manual_seed(7)
    x = torch.from_numpy(noise) * scheduler.init_noise_sigma if x is None else torch.from_numpy(x)
    accepted = inspect.signature(scheduler.step).parameters
    extra = {"eta": eta} if "eta" in accepted else {}
    if "generator" in accepted and "s_churn" not in accepted:
        extra["generator"] = generator
    drawn = "variance_noise" in accepted and scheduler.config.get("algorithm_type", "").startswith("sde")
    out = []
    for i, t in enumerate(scheduler.timesteps[begin:]):
        scaled = scheduler.scale_model_input(x, t)
        output = torch.from_numpy(model(scaled.double().numpy(), float(t if told is None else told[i])))
        if drawn:  # left alone it would draw in float32
            extra["variance_noise"] = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
        x = scheduler.step(output, t, x, **extra).prev_sample
        out.append(x.double().numpy())
    return out


def ours(config: dict, steps: int, noise: np.ndarray, eta: float):
    sampler = sampler_of(config)
    options = SamplerOptions.from_scheduler_config(config)
    changes = {"eta": eta} if sampler in ("ddim", "tcd") else {}
    table = make_table(sampler, schedule_of(config), steps, options, **changes)
    generator = torch.Generator().manual_seed(7)

    def noises(_: int) -> np.ndarray:
        return torch.randn(SHAPE, generator=generator, dtype=torch.float64).numpy()

    trajectory = list(walk(table, model, noise * float(table.first_scale), options.prediction_type, noises))
    if sampler in VARIANCE_PRESERVING:
        trajectory = [x / np.sqrt(1.0 + table.sigma_next[i] ** 2) for i, x in enumerate(trajectory)]
    return table, trajectory


def compare(config: dict, steps: int, eta: float = 0.0, tolerance: float = 5e-5):
    noise = np.random.default_rng(0).standard_normal(SHAPE)
    scheduler = scheduler_of(config)
    table, got = ours(config, steps, noise, eta)
    n = int(table.active.sum())
    expected = theirs(scheduler, steps, noise, eta, told=table.timestep)
    assert n == len(scheduler.timesteps)
    wrong = np.abs(table.timestep[:n] - scheduler.timesteps.double().numpy())
    if config.get("use_exponential_sigmas") or config.get("use_beta_sigmas"):
        # diffusers truncates after rounding in float32: 999 may have become 998.
        assert wrong[0] in (0.0, 1.0) or wrong[0] < 2e-3
        wrong[0] = 0.0
    assert wrong.max() < 2e-3
    if sampler_of(config) not in VARIANCE_PRESERVING:
        np.testing.assert_allclose(table.first_scale, float(scheduler.init_noise_sigma), rtol=1e-6)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        error = np.abs(a - b).max() / np.abs(b).max()
        # From 2.6 to 0.029 in one step of five under beta, float32 levels weigh a hundred times as much.
        assert error < (3e-4 if config.get("use_beta_sigmas") else tolerance), (
            f"row {i} of {n}: relative error {error:.2g}"
        )


def config_of(sampler: str, **settings) -> dict:
    sde = {"algorithm_type": "sde-dpmsolver++"} if sampler == "dpmpp_2m_sde" else {}
    return {"_class_name": CLASSES[sampler], **LATENT, **sde, **settings}


def combinations():
    for sampler in CLASSES:
        for spacing in ("leading", "linspace", "trailing", *SWITCHES):
            if spacing in SWITCHES and sampler in ON_TIMESTEPS:
                continue
            for prediction in ("epsilon", "v_prediction", "sample"):
                if prediction == "sample" and sampler in ("plms", "euler_a", "dpm2", "dpm2_a"):
                    continue  # diffusers has not implemented these
                yield sampler, spacing, prediction


@pytest.mark.parametrize(("sampler", "spacing", "prediction"), combinations())
def test_trajectories(sampler, spacing, prediction):
    config = config_of(sampler, prediction_type=prediction, skip_prk_steps=True)
    config |= {SWITCHES[spacing]: True} if spacing in SWITCHES else {"timestep_spacing": spacing}
    for steps, offset in ((5, 0), (20, 1)):
        compare({**config, "steps_offset": offset}, steps, eta=0.7)


@pytest.mark.parametrize(
    "sampler", ["ddpm", "ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm", "tcd"]
)
def test_zero_terminal_snr(sampler):
    config = config_of(sampler, prediction_type="v_prediction")
    compare({**config, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}, 12)


@pytest.mark.parametrize(
    ("sampler", "settings"),
    [
        ("ddpm", {"clip_sample": True, "variance_type": "fixed_large"}),
        ("ddpm", {"beta_schedule": "squaredcos_cap_v2", "variance_type": "fixed_small_log", "clip_sample": True}),
        ("ddim", {"clip_sample": True, "clip_sample_range": 0.8}),
        ("ddim", {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}),
        ("ddim", {"set_alpha_to_one": False, "steps_offset": 1}),
        ("plms", {"set_alpha_to_one": True, "skip_prk_steps": False}),
        ("plms", {"skip_prk_steps": False, "prediction_type": "v_prediction"}),
        ("heun", {"clip_sample": True}),
        ("euler", {"final_sigmas_type": "sigma_min"}),
        ("euler", {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0}),
        ("dpmpp_2m", {"final_sigmas_type": "sigma_min"}),
        ("dpmpp_2m", {"final_sigmas_type": "sigma_min", "euler_at_final": True, "lower_order_final": False}),
        ("dpmpp_2m", {"solver_type": "heun", "timestep_spacing": "trailing"}),
        ("dpmpp_2m", {"solver_order": 1}),
        ("dpmpp_2m", {"thresholding": True, "sample_max_value": 2.0}),
        ("dpmpp_2m", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
        ("dpmpp_2m", {"solver_order": 3}),
        ("dpmpp_2m", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
        ("dpmpp_2m", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_type": "heun"}),
        ("dpmpp_2m", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3}),
        ("dpmpp_2m_sde", {"solver_type": "heun", "lower_order_final": False}),
        ("dpmpp_2m_sde", {"solver_order": 1, "use_karras_sigmas": True}),
        ("dpmpp_2m_sde", {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
        ("dpmpp_2s", {"solver_type": "heun"}),
        ("dpmpp_2s", {"solver_order": 3, "lower_order_final": True, "final_sigmas_type": "sigma_min"}),
        ("dpmpp_2s", {"solver_order": 3, "solver_type": "heun", "final_sigmas_type": "sigma_min"}),
        ("dpmpp_2s", {"solver_order": 1}),
        ("dpmpp_2s", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
        ("dpmpp_2s", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3}),
        ("dpmpp_2s", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
        ("dpmpp_2s", {"thresholding": True, "sample_max_value": 2.0}),
        ("unipc", {"solver_order": 3, "use_karras_sigmas": True}),
        (
            "unipc",
            {"solver_order": 3, "solver_type": "bh1", "lower_order_final": False, "final_sigmas_type": "sigma_min"},
        ),
        ("unipc", {"solver_order": 1}),
        ("unipc", {"predict_x0": False, "final_sigmas_type": "sigma_min"}),
        ("unipc", {"predict_x0": False, "final_sigmas_type": "sigma_min", "solver_order": 3}),
        ("unipc", {"disable_corrector": [0, 1, 2]}),
        ("unipc", {"thresholding": True, "sample_max_value": 2.0}),
        ("unipc", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "sigma_max": 12.0}),
        ("deis", {"solver_order": 3}),
        ("deis", {"solver_order": 1}),
        ("deis", {"solver_order": 3, "lower_order_final": False, "thresholding": True, "sample_max_value": 2.0}),
        ("lcm", {"original_inference_steps": 100, "timestep_scaling": 3.0}),
        ("lcm", {"clip_sample": True, "clip_sample_range": 0.8, "timestep_scaling": 0.003}),
        ("lcm", {"thresholding": True, "sample_max_value": 2.0}),
        ("tcd", {"original_inference_steps": 25}),
    ],
)
@pytest.mark.parametrize("steps", [10, 21])
def test_settings_of_scheduler_configs(sampler, settings, steps):
    # With the cosine schedule the float32 tables of diffusers carry an abar of 2e-9.
    tolerance = 2e-3 if settings.get("beta_schedule") == "squaredcos_cap_v2" else 1e-4
    compare(config_of(sampler, **settings), steps, eta=0.3, tolerance=tolerance)


def in_float64(scheduler, schedule):
    """Replaces diffusers' float32 tables."""
    scheduler.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod)
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    if hasattr(scheduler, "final_alpha_cumprod"):
        one = scheduler.config.set_alpha_to_one
        scheduler.final_alpha_cumprod = scheduler.one if one else scheduler.alphas_cumprod[0]
    return scheduler


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "plms"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_float64_tables_agree_to_rounding(sampler, prediction):
    config = {"_class_name": CLASSES[sampler], **LATENT, "prediction_type": prediction, "steps_offset": 1}
    noise = np.random.default_rng(1).standard_normal(SHAPE)
    expected = theirs(in_float64(scheduler_of(config), schedule_of(config)), 25, noise, 0.5)
    _, got = ours(config, 25, noise, 0.5)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)


def test_the_last_two_timesteps_of_ddpm_in_float64():
    """The conformance row that float32 rounding moves by 5e-5, held to diffusers without that rounding."""
    config = {"_class_name": "DDPMScheduler", "clip_sample": True}
    schedule = schedule_of(config)
    x = np.random.default_rng(2).standard_normal(SHAPE)
    expected = theirs(in_float64(scheduler_of(config), schedule), 1000, x, 0.0, x=x, begin=998)
    table = make_table("ddpm", schedule, 1000, SamplerOptions.from_scheduler_config(config), start=998)
    generator = torch.Generator().manual_seed(7)
    noises = lambda _: torch.randn(SHAPE, generator=generator, dtype=torch.float64).numpy()  # noqa: E731
    *_, got = walk(table, model, x * np.sqrt(1.0 + table.sigma[0] ** 2), noises=noises)
    assert table.timestep[:2].tolist() == [1.0, 0.0]
    np.testing.assert_allclose(got, expected[-1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun", "dpm2", "dpmpp_2m", "dpmpp_2s", "unipc", "deis"])
def test_image_to_image_begins_where_diffusers_begins(sampler):
    config = {"_class_name": CLASSES[sampler], **LATENT, "steps_offset": 1}
    steps, start = 10, start_of(10, 0.55)
    assert start == 5
    rng = np.random.default_rng(3)
    x0, noise = rng.standard_normal(SHAPE), rng.standard_normal(SHAPE)
    scheduler = scheduler_of(config)
    scheduler.set_timesteps(steps)
    begin = start * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    at = scheduler.timesteps[begin : begin + 1].repeat(SHAPE[0])
    noisy = scheduler.add_noise(torch.from_numpy(x0), torch.from_numpy(noise), at).double().numpy()
    expected = theirs(scheduler, steps, noise, 0.0, x=noisy, begin=begin)
    table = make_table(sampler, schedule_of(config), steps, SamplerOptions.from_scheduler_config(config), start=start)
    *_, got = walk(table, model, x0 + table.sigma[0] * noise)
    np.testing.assert_allclose(got, expected[-1], rtol=0, atol=5e-5)


def test_another_sampler_keeps_what_the_file_says_and_its_own_defaults():
    stable_diffusion = {
        "_class_name": "PNDMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    }
    for sampler, class_name in CLASSES.items():
        options = SamplerOptions.from_scheduler_config(stable_diffusion, sampler)
        scheduler = getattr(diffusers, class_name).from_config(stable_diffusion)
        for name in SamplerOptions.__dataclass_fields__:
            known = name in inspect.signature(type(scheduler).__init__).parameters and name != "beta_schedule"
            if known and scheduler.config[name] is not None and name != "variance_type":
                assert getattr(options, name) == scheduler.config[name], (sampler, name)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"_class_name": "EDMEulerScheduler"}, "scheduler class 'EDMEulerScheduler'"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver"},
            "algorithm_type 'sde-dpmsolver'",
        ),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "sideways"}, "timestep_spacing 'sideways'"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "score"}, "prediction type 'score'"),
    ],
)
def test_unknown_settings_are_named(config, says):
    with pytest.raises(UserError, match=f"unknown {says}.*choose one of"):
        SamplerOptions.from_scheduler_config(config)
