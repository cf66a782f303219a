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
from diffusers_loop import (
    CLASSES,
    LATENT,
    ON_TIMESTEPS,
    SHAPE,
    SWITCHES,
    compare,
    config_of,
    model,
    ours,
    scheduler_of,
    theirs,
)
from table_loop import walk

from sdjax.core.errors import UserError
from sdjax.diffusion.samplers import SamplerOptions, make_table, sampler_of, schedule_of, start_of
from sdjax.diffusion.schedule import make_schedule


def combinations():
    for sampler in CLASSES:
        for spacing in ("leading", "linspace", "trailing", *SWITCHES):
            if spacing in SWITCHES and sampler in ON_TIMESTEPS:
                continue
            if spacing == "lu" and CLASSES[sampler] != "DPMSolverMultistepScheduler":
                continue  # the other classes do not have it
            for prediction in ("epsilon", "v_prediction", "sample"):
                if spacing in ("exponential", "beta", "lu") and prediction != "epsilon":
                    continue  # levels do not depend on it
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
        ("dpmpp_2m", {"beta_schedule": "squaredcos_cap_v2", "use_lu_lambdas": True}),
        ("dpmpp_2m", {"use_lu_lambdas": True, "final_sigmas_type": "sigma_min"}),
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


def test_another_sampler_keeps_settings_and_defaults():
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
            another = name == "variance_type" or (name == "algorithm_type" and sampler in ("dpmpp_2m_sde", "deis"))
            if known and scheduler.config[name] is not None and not another:
                theirs_says = scheduler.config[name]
                expected = tuple(theirs_says) if isinstance(theirs_says, list) else theirs_says
                assert getattr(options, name) == expected, (sampler, name)


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


@pytest.mark.parametrize(
    ("config", "sampler", "expected"),
    [
        ({"_class_name": "DPMSolverMultistepScheduler"}, "dpmpp_2m", {"algorithm_type": "dpmsolver++"}),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
            "dpmpp_2m_sde",
            {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "eta": 1.0},
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", "solver_order": 3},
            "dpmpp_3m_sde",
            {"solver_order": 3, "solver_type": "heun", "lower_order_final": False, "eta": 1.0},
        ),
        ({"_class_name": "KDPM2AncestralDiscreteScheduler"}, "dpm2_a", {"eta": 1.0}),
        (
            {"_class_name": "DPMSolverSDEScheduler", "use_karras_sigmas": True},
            "dpmpp_sde",
            {"sigma_schedule": "karras"},
        ),
        (
            {"_class_name": "DEISMultistepScheduler", "algorithm_type": "dpmsolver++", "solver_type": "bh2"},
            "deis",
            {"solver_type": "logrho", "final_sigmas_type": "sigma_min"},
        ),
        (
            {"_class_name": "UniPCMultistepScheduler", "solver_type": "midpoint", "disable_corrector": [0]},
            "unipc",
            {"solver_type": "bh2", "disable_corrector": (0,)},
        ),
        (
            {"_class_name": "DPMSolverSinglestepScheduler", "timestep_spacing": "leading", "use_beta_sigmas": True},
            "dpmpp_2s",
            {"timestep_spacing": "linspace", "lower_order_final": False, "sigma_schedule": "beta"},
        ),
        ({"_class_name": "LCMScheduler", "timestep_scaling": 5.0}, "lcm", {"timestep_scaling": 5.0}),
        ({"_class_name": "TCDScheduler", "thresholding": True}, "tcd", {"eta": 0.3, "thresholding": False}),
    ],
)
def test_classes_name_their_samplers(config, sampler, expected):
    assert sampler_of(config) == sampler
    options = SamplerOptions.from_scheduler_config(config)
    assert {name: getattr(options, name) for name in expected} == expected


def test_named_sampler_wins_over_the_file():
    file = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}
    assert SamplerOptions.from_scheduler_config(file, "dpmpp_2m").algorithm_type == "dpmsolver++"
    file["algorithm_type"] = "dpmsolver"
    assert SamplerOptions.from_scheduler_config(file, "dpmpp_2m").algorithm_type == "dpmsolver"
    assert SamplerOptions.from_scheduler_config(file, "dpmpp_2m_sde").algorithm_type == "sde-dpmsolver++"


@pytest.mark.parametrize("class_name", [*CLASSES.values(), "DPMSolverSDEScheduler"])
def test_noise_schedules_of_bare_classes(class_name):
    """Each class's default betas, and whether it follows rescale_betas_zero_snr; its own table, to float32."""
    for settings in ({}, {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}):
        if class_name == "DPMSolverSDEScheduler":  # cannot be made without torchsde: its documented defaults
            expected = make_schedule("scaled_linear" if settings else "linear").alphas_cumprod
        else:
            scheduler = getattr(diffusers, class_name).from_config(settings)
            expected = scheduler.alphas_cumprod.numpy()
        got = schedule_of({"_class_name": class_name, **settings}).alphas_cumprod
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "only one of use_karras_sigmas, use_beta_sigmas"),
        ({"use_flow_sigmas": True}, "unknown use_flow_sigmas"),
        ({"solver_order": 4}, "unknown solver_order '?4'?; choose one of: 1, 2, 3"),
        ({"lambda_min_clipped": "low"}, "lambda_min_clipped 'low' is not a number"),
        ({"steps_offset": "one"}, "steps_offset 'one': must be of type int"),
        ({"sample_max_value": float("nan")}, "sample_max_value nan: must be a number"),
        ({"thresholding": 3}, "thresholding 3: must be of type bool"),
    ],
)
def test_settings_out_of_range_are_named(settings, says):
    with pytest.raises(UserError, match=says):
        SamplerOptions.from_scheduler_config({"_class_name": "DPMSolverMultistepScheduler", **settings})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_train_timesteps": 10**9}, "num_train_timesteps 1000000000: choose 1 to 100000"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps 'many'"),
        ({"beta_start": []}, "beta_start .* is not a number"),
        ({"beta_start": 1e-300}, "beyond what can be computed"),
        ({"trained_betas": [0.1]}, "trained_betas is not supported"),
    ],
)
def test_noise_schedules_of_damaged_files_are_named(settings, says):
    with pytest.raises(UserError, match=says):
        schedule_of({"_class_name": "DDIMScheduler", **settings})


JUNK = ("x", [], {}, True, -1, 0, 0.5, 10**9, float("nan"), float("inf"), ["a"], [1, 2])


@pytest.mark.parametrize("class_name", [*dict.fromkeys(CLASSES.values()), "DPMSolverSDEScheduler", "UnCLIPScheduler"])
def test_damaged_files_are_refused_or_give_finite_tables(class_name):
    fields = {*SamplerOptions.__dataclass_fields__, *SWITCHES.values(), "num_train_timesteps", "beta_start", "beta_end"}
    for field in (*sorted(fields), "beta_schedule", "solver_p"):
        for value in JUNK:
            config = {"_class_name": class_name, field: value}
            try:
                options = SamplerOptions.from_scheduler_config(config)
                table = make_table(sampler_of(config), schedule_of(config), 6, options)
            except UserError:
                continue
            assert np.isfinite(table.weights).all(), (field, value)
            assert np.isfinite(table.sigma).all(), (field, value)
