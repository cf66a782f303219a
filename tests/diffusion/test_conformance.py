"""The full-loop results that huggingface/diffusers asserts for its schedulers, from tables alone.

Numbers and settings: huggingface/diffusers tests/schedulers/* (Apache-2.0) in the file that each row names, at commit
58eb52c0 (KDPM2 ancestral at 1fd1afa0, TCD at 0378974c); tolerance there and here: 1e-2 on the sum and 1e-3 on the mean
of |x|. Rows with large norms hold to a relative 5e-6 instead, rows near zero to the scheduler classes themselves
(test_parity.py) besides.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from table_loop import walk

from sdjax.diffusion.samplers import SamplerOptions, SamplerTable, make_table
from sdjax.diffusion.schedule import Schedule

STEPS = 10
SIGMA_FAMILY = ("euler", "euler_a", "heun", "dpm2", "dpm2_a", "lms")


@dataclass(frozen=True)
class Case:
    """One upstream test: file is scheduler suffix, total and mean are its asserted sum and mean of |x|."""

    file: str
    sampler: str
    mean: float
    total: float | None = None
    options: dict = field(default_factory=dict)
    beta_start: float = 1e-4
    start: int | None = None
    rtol: float = 0.0
    steps: int = STEPS
    atol: float = 1e-2


V = {"prediction_type": "v_prediction"}
ALPHA_ONE = {"set_alpha_to_one": True}
THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.87, "sample_max_value": 0.5}
CASES = [
    Case("test_scheduler_ddpm.py", "ddpm", 0.3372, 258.9606),
    Case("test_scheduler_ddpm.py", "ddpm", 0.2631, 202.0296, V),
    # Upstream's step rounds beta = 1 - abar / abar' to float32, 3e-4 of it at timestep 1; test_parity.py holds this
    # very loop to diffusers in float64.
    Case("test_scheduler_ddpm.py", "ddpm", 0.5051, 387.9466, start=998, rtol=6e-5),
    Case("test_scheduler_ddim.py", "ddim", 0.223967, 172.0067),
    Case("test_scheduler_ddim.py", "ddim", 0.0684, 52.5302, V),
    Case("test_scheduler_ddim.py", "ddim", 0.1951, 149.8295, ALPHA_ONE, beta_start=0.01),
    Case("test_scheduler_pndm.py", "plms", 0.258, 198.1318),
    Case("test_scheduler_pndm.py", "plms", 0.0878, 67.3986, V),
    Case("test_scheduler_pndm.py", "plms", 0.2434, 186.9482, {"set_alpha_to_one": False}, beta_start=0.01),
    Case("test_scheduler_kdpm2_ancestral.py", "dpm2_a", 18.2030, 13979.9433),
    Case("test_scheduler_kdpm2_ancestral.py", "dpm2_a", 0.4320, 331.8133, V),
    Case("test_scheduler_kdpm2_ancestral.py", "dpm2_a", 121.2074, 93087.3437, start=8, rtol=5e-6),
    Case("test_scheduler_lms.py", "lms", 1.31, 1006.388),
    Case("test_scheduler_lms.py", "lms", 2.2676e-06, 0.0017, V),
    Case("test_scheduler_lms.py", "lms", 36.0204, 27663.6895, start=8, rtol=5e-6),
    Case("test_scheduler_euler.py", "euler", 0.0131, 10.0807),
    Case("test_scheduler_euler.py", "euler", 2.2676e-06, 0.0002, V),
    Case("test_scheduler_euler.py", "euler", 74.3007, 57062.9297, start=8, rtol=5e-6),
    Case("test_scheduler_euler_ancestral.py", "euler_a", 0.1983, 152.3192),
    Case("test_scheduler_euler_ancestral.py", "euler_a", 0.1412, 108.4439, V),
    Case("test_scheduler_heun.py", "heun", 0.0002, 0.1233),
    Case("test_scheduler_heun.py", "heun", 6.1112e-10, 4.6934e-07, V),
    Case("test_scheduler_heun.py", "heun", 97.7538, 75074.8906, start=8, rtol=5e-6),
    Case("test_scheduler_kdpm2_discrete.py", "dpm2", 0.0266, 20.4125),
    Case("test_scheduler_kdpm2_discrete.py", "dpm2", 6.1112e-10, 4.6934e-07, V),
    Case("test_scheduler_dpm_multi.py", "dpmpp_2m", 0.3301),
    Case("test_scheduler_dpm_multi.py", "dpmpp_2m", 1.1364, None, THRESHOLD),
    Case("test_scheduler_dpm_multi.py", "dpmpp_2m", 0.2251, None, V),
    Case("test_scheduler_dpm_multi.py", "dpmpp_2m", 0.1554, None, {**V, "sigma_schedule": "lu"}),
    Case("test_scheduler_dpm_multi.py", "dpmpp_2m", 0.4146, 318.4111, start=5),
    Case("test_scheduler_dpm_single.py", "dpmpp_2s", 0.2791),
    Case("test_scheduler_dpm_single.py", "dpmpp_2s", 0.1453, None, V),
    Case("test_scheduler_unipc.py", "unipc", 0.2464),
    Case("test_scheduler_unipc.py", "unipc", 0.2925, None, {"sigma_schedule": "karras"}),
    Case("test_scheduler_unipc.py", "unipc", 0.1014, None, V),
    Case("test_scheduler_deis.py", "deis", 0.23916),
    Case("test_scheduler_deis.py", "deis", 0.091, None, V),
    Case("test_scheduler_lcm.py", "lcm", 0.0244, 18.7097, steps=1, atol=1e-3),
    Case("test_scheduler_lcm.py", "lcm", 0.2575, 197.7616, atol=1e-3),
    Case("test_scheduler_tcd.py", "tcd", 0.0389, 29.8715, steps=1, atol=1e-3),
    Case("test_scheduler_tcd.py", "tcd", 0.2359, 181.2040, atol=1e-3),
]
# What the upstream tests pass to the schedulers' constructors, and the constructors' defaults.
SETTINGS = {
    "ddpm": {"timestep_spacing": "leading", "clip_sample": True},
    "ddim": {"timestep_spacing": "leading", "clip_sample": True, "set_alpha_to_one": True},
    "plms": {"timestep_spacing": "leading"},
    "euler_a": {"eta": 1.0},
    "dpm2_a": {"eta": 1.0},
    "dpmpp_2m": {"final_sigmas_type": "sigma_min", "lower_order_final": False},
    "dpmpp_2s": {"final_sigmas_type": "sigma_min", "lower_order_final": False},
    "unipc": {"final_sigmas_type": "sigma_min", "solver_type": "bh2"},
    "deis": {"final_sigmas_type": "sigma_min"},
}


def model(x: np.ndarray, t: float) -> np.ndarray:
    return x * t / (t + 1)


def dummy(reverse: bool) -> np.ndarray:
    values = np.arange(768, dtype=np.float32) / np.float32(768)
    return (values[::-1] if reverse else values).reshape(3, 8, 8, 4).transpose(3, 0, 1, 2).astype(np.float64)


def table_of(case: Case, schedule: Schedule, options: SamplerOptions) -> tuple[SamplerTable, int]:
    """The table and its first row. diffusers begins LMS later with the coefficients of a full history of which the
    missing part counts as zero: the rows of the whole table, from a later one, do just that."""
    start = case.start or 0
    steps = 1000 if case.sampler == "ddpm" else case.steps
    if case.sampler == "lms":
        return make_table(case.sampler, schedule, steps, options), start
    return make_table(case.sampler, schedule, steps, options, start=start), 0


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.sampler}-{c.mean}")
def test_upstream_full_loop(case):
    num_timesteps = 1100 if case.sampler in SIGMA_FAMILY else 1000
    # Upstream's table is a float32 product: with it 1 - abar at timestep 1 and norms of 1e4 agree as well.
    if case.sampler in ("lcm", "tcd"):  # whose own betas are those of latent diffusion
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, num_timesteps) ** 2
    else:
        betas = torch.linspace(case.beta_start, 0.02, num_timesteps)
    schedule = Schedule(betas.double().numpy(), torch.cumprod(1.0 - betas, 0).double().numpy())
    options = SamplerOptions(**{**SETTINGS.get(case.sampler, {}), **case.options})
    table, first = table_of(case, schedule, options)
    generator = torch.manual_seed(0)

    def noises(_: int) -> np.ndarray:
        return torch.randn((4, 3, 8, 8), generator=generator).double().numpy()

    sigma = table.sigma[first]
    if case.start is None:
        x = dummy(False) * float(table.first_scale)
    elif case.sampler in SIGMA_FAMILY:
        # Upstream the sample is scaled for pure noise first, by the level of the whole list's beginning.
        whole = make_table(case.sampler, schedule, STEPS, options)
        x = dummy(False) * float(whole.first_scale) + dummy(True) * sigma
    else:
        x = dummy(False) + dummy(True) * sigma
    quirk = case.sampler in SIGMA_FAMILY  # there the scaled input overwrites x
    *_, x = walk(table, model, x, options.prediction_type, noises, quirk, first)
    total, mean = np.abs(x).sum(), np.abs(x).mean()
    if case.total is not None:
        assert abs(total - case.total) < max(case.atol, case.rtol * case.total)
    assert abs(mean - case.mean) < max(1e-3, case.rtol * case.mean)
