"""The loops of PyTorch diffusers' scheduler classes and of this project's tables, on the same noise, side by side."""

from __future__ import annotations

import inspect

import diffusers
import numpy as np
import torch
from table_loop import walk

from sdjax.diffusion.samplers import SamplerOptions, make_table, sampler_of, schedule_of

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
SWITCHES = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
    "lu": "use_lu_lambdas",
}
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
