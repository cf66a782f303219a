"""The ancestral and SDE samplers: k-diffusion's loops in own words and float64, diffusers' DPMSolverSDE, a known law.

Loops after crowsonkb/k-diffusion, k_diffusion/sampling.py; agreement to 1e-11.
"""

from __future__ import annotations

import importlib
import itertools
import sys
import types

import numpy as np
import pytest
import torch
from diffusers_loop import LATENT, SHAPE
from table_loop import walk

from sdjax.core.errors import UserError
from sdjax.diffusion.samplers import SamplerOptions, make_table
from sdjax.diffusion.schedule import make_schedule

SCHEDULE = make_schedule()
STEPS = 9


def denoise(x: np.ndarray, s: float) -> np.ndarray:
    return 0.8 * np.tanh(x / np.sqrt(1.0 + s**2)) + 0.05 * np.cos(2.0 * x / np.sqrt(1.0 + s**2))


def network(scaled: np.ndarray, _: float) -> np.ndarray:
    return 0.8 * np.tanh(scaled) + 0.05 * np.cos(2.0 * scaled)


def split(s: float, target: float, eta: float) -> tuple[float, float]:
    up = eta * target * np.sqrt(1.0 - (target / s) ** 2)
    return np.sqrt(target**2 - up**2), up


class Path:
    """A Brownian path in sigma: noise(a, b) is its increment from a to b over the root of its length."""

    def __init__(self, levels: list[float]):
        """levels: descending, every one at which the path is asked."""
        rng = np.random.default_rng(5)
        self.levels = levels
        self.pieces = [rng.standard_normal(SHAPE) for _ in levels[1:]]
        jumps = [np.sqrt(a - b) * piece for (a, b), piece in zip(itertools.pairwise(levels), self.pieces, strict=True)]
        self.values = dict(zip(levels, [np.zeros(SHAPE), *np.cumsum(jumps, axis=0)], strict=True))

    def noise(self, a: float, b: float) -> np.ndarray:
        nearest = lambda level: min(self.values, key=lambda known: abs(known - level))  # noqa: E731
        return (self.values[nearest(b)] - self.values[nearest(a)]) / np.sqrt(a - b)


def two_calls(sampler: str, sigmas: np.ndarray, x: np.ndarray, eta: float, s_noise: float, path: Path) -> np.ndarray:
    for s, target in itertools.pairwise(sigmas.tolist()):
        first = denoise(x, s)
        if target == 0.0:
            return x + (x - first) / s * (target - s)
        down, up = split(s, target, eta)
        if sampler == "dpm2_a":
            middle = np.exp((np.log(s) + np.log(down)) / 2.0)
            half = x + (x - first) / s * (middle - s)
            x = x + (half - denoise(half, middle)) / middle * (down - s)
        elif sampler == "dpmpp_2s_a":
            h = np.log(s) - np.log(down)
            middle = s * np.exp(-h / 2.0)
            half = middle / s * x - np.expm1(-h / 2.0) * first
            x = down / s * x - np.expm1(-h) * denoise(half, middle)
        else:
            middle = np.exp((np.log(s) + np.log(target)) / 2.0)
            half_down, half_up = split(s, middle, eta)
            half = half_down / s * x + (1.0 - half_down / s) * first + path.noise(s, middle) * s_noise * half_up
            x = down / s * x + (1.0 - down / s) * denoise(half, middle)
        x = x + path.noise(s, target) * s_noise * up
    return x


def multistep_sde(sampler: str, sigmas: np.ndarray, x: np.ndarray, eta: float, solver_type: str, path: Path):
    old, lengths = [], []
    for s, target in itertools.pairwise(sigmas.tolist()):
        x0 = denoise(x, s)
        if target == 0.0:
            return x0
        h = np.log(s / target)
        long = h * (eta + 1.0)
        new = np.exp(-long) * x - np.expm1(-long) * x0
        phi_2 = np.expm1(-long) / long + 1.0
        if sampler == "dpmpp_3m_sde" and len(old) > 1:
            r0, r1 = lengths[-1] / h, lengths[-2] / h
            d10, d11 = (x0 - old[-1]) / r0, (old[-1] - old[-2]) / r1
            d1, d2 = d10 + (d10 - d11) * r0 / (r0 + r1), (d10 - d11) / (r0 + r1)
            new = new + phi_2 * d1 - (phi_2 / long - 0.5) * d2
        elif old:
            d = (x0 - old[-1]) / (lengths[-1] / h)
            new = new + (phi_2 * d if solver_type == "heun" else -0.5 * np.expm1(-long) * d)
        x = new + path.noise(s, target) * target * np.sqrt(-np.expm1(-2.0 * h * eta))
        old, lengths = [*old, x0], [*lengths, h]
    return x


@pytest.mark.parametrize("eta", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("spacing", ["karras", "sgm_uniform"])
@pytest.mark.parametrize("sampler", ["dpm2_a", "dpmpp_2s_a", "dpmpp_sde"])
def test_two_calls_a_step(sampler, spacing, eta):
    settings = {"spacing": spacing, "prediction_type": "sample", "eta": eta, "s_noise": 1.03}
    table = make_table(sampler, SCHEDULE, STEPS, **settings)
    n = int(table.active.sum())
    assert n == 2 * STEPS - 1
    sigmas = np.append(table.sigma[:n:2], 0.0)
    on_path = table.sigma[:n] if sampler == "dpmpp_sde" else sigmas[:-1]
    path = Path(on_path.tolist())
    x = np.random.default_rng(1).standard_normal(SHAPE) * sigmas[0]
    expected = two_calls(sampler, sigmas, x, eta, 1.03, path)
    pieces = iter(path.pieces)
    *_, got = walk(table, network, x, "sample", lambda _: next(pieces))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-11)
    assert eta == 0.0 or next(pieces, None) is None


@pytest.mark.parametrize("eta", [1.0, 0.4])
@pytest.mark.parametrize(
    ("sampler", "solver_type"), [("dpmpp_2m_sde", "midpoint"), ("dpmpp_2m_sde", "heun"), ("dpmpp_3m_sde", "heun")]
)
def test_multistep_sde(sampler, solver_type, eta):
    settings = {"prediction_type": "sample", "eta": eta, "solver_type": solver_type, "lower_order_final": False}
    table = make_table(sampler, SCHEDULE, STEPS, spacing="karras", **settings)
    sigmas = np.append(table.sigma[:STEPS], 0.0)
    path = Path(sigmas[:-1].tolist())
    x = np.random.default_rng(1).standard_normal(SHAPE) * sigmas[0]
    expected = multistep_sde(sampler, sigmas, x, eta, solver_type, path)
    pieces = iter(path.pieces)
    *_, got = walk(table, network, x, "sample", lambda _: next(pieces))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("switch", [{}, {"use_karras_sigmas": True}])
def test_dpmpp_sde_is_diffusers_own(monkeypatch, prediction, switch):
    """Its Brownian tree replaced by the same path; float32 levels there, 5e-5."""
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    config = {k: v for k, v in LATENT.items() if k != "clip_sample"} | {"prediction_type": prediction, **switch}
    scheduler = module.DPMSolverSDEScheduler(**config)
    scheduler.set_timesteps(STEPS)
    options = SamplerOptions.from_scheduler_config({**config, "_class_name": "DPMSolverSDEScheduler"})
    table = make_table("dpmpp_sde", SCHEDULE, STEPS, options)
    n = int(table.active.sum())
    np.testing.assert_allclose(table.timestep[:n], scheduler.timesteps.numpy(), rtol=0, atol=2e-3)
    path = Path(table.sigma[:n].tolist())
    scheduler.noise_sampler = lambda a, b: torch.from_numpy(path.noise(float(a), float(b)))
    noise = np.random.default_rng(2).standard_normal(SHAPE)

    def model(x: np.ndarray, t: float) -> np.ndarray:
        return np.tanh(x * (0.3 + t / 1500.0))

    x = torch.from_numpy(noise) * scheduler.init_noise_sigma
    expected = []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t).double().numpy()
        x = scheduler.step(torch.from_numpy(model(scaled, float(t))), t, x).prev_sample
        expected.append(x.double().numpy())
    got = walk(table, model, noise * float(table.first_scale), prediction, lambda i: path.pieces[i])
    for a, b in zip(got, expected, strict=True):
        assert np.abs(a - b).max() < 5e-5 * np.abs(b).max()


@pytest.mark.parametrize(
    ("sampler", "tolerance"),
    [
        ("euler_a", 0.07),
        ("dpm2_a", 0.01),
        ("dpmpp_2s_a", 0.01),
        ("dpmpp_sde", 0.01),
        ("dpmpp_2m_sde", 0.01),
        ("dpmpp_3m_sde", 0.01),
    ],
)
def test_samples_follow_the_law_of_the_data(sampler, tolerance):
    """Data N(0.3, 0.5^2), whose denoiser is known: 60 steps draw its mean and deviation, Euler a with its order."""
    rng = np.random.default_rng(0)
    table = make_table(sampler, SCHEDULE, 60, spacing="karras", prediction_type="sample")
    levels = iter(table.sigma)

    def denoiser(scaled: np.ndarray, _: float) -> np.ndarray:
        s = float(next(levels))
        return (0.25 * scaled * np.sqrt(1.0 + s**2) + 0.3 * s**2) / (0.25 + s**2)

    shape = (1, 150, 150, 1)
    x = 0.3 + 0.5 * rng.standard_normal(shape) + table.sigma[0] * rng.standard_normal(shape)
    *_, got = walk(table, denoiser, x, "sample", lambda _: rng.standard_normal(shape))
    assert got.mean() == pytest.approx(0.3, abs=0.01)
    assert got.std() == pytest.approx(0.5, rel=tolerance)


def test_an_eta_that_leaves_nothing_of_x_is_named():
    with pytest.raises(UserError, match=r"eta 1\.5: dpmpp_sde needs 0 to 1"):
        make_table("dpmpp_sde", SCHEDULE, 5, eta=1.5)
