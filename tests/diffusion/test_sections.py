"""DeepFloyd IF's uneven timesteps, beside the lists and the scheduler of PyTorch diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.pipelines.deepfloyd_if import timesteps as published
from diffusers_loop import SHAPE, config_of, model, scheduler_of
from table_loop import walk

from sdjax.diffusion.samplers import SamplerOptions, make_table, schedule_of
from sdjax.diffusion.samplers.sections import SECTIONS, section_timesteps, steps_of


@pytest.mark.parametrize("name", SECTIONS)
def test_timesteps_are_the_published_ones(name):
    wanted = getattr(published, f"{name}_timesteps")
    assert section_timesteps(SECTIONS[name], 1000).tolist() == wanted
    assert steps_of(name) == len(wanted)


@pytest.mark.parametrize("start", [0, 7])
def test_a_trajectory_agrees_with_diffusers_to_5e_5(start):
    config = config_of("ddpm", beta_schedule="squaredcos_cap_v2", clip_sample=True)
    scheduler = scheduler_of(config)
    scheduler.set_timesteps(timesteps=published.smart27_timesteps)
    x = noise = np.random.default_rng(0).standard_normal(SHAPE)
    x, generator = torch.from_numpy(x), torch.Generator().manual_seed(7)
    expected = []
    for t in scheduler.timesteps[start:]:
        x = scheduler.step(torch.from_numpy(model(x.numpy(), float(t))), t, x, generator=generator).prev_sample
        expected.append(x.numpy())
    options = SamplerOptions.from_scheduler_config(config)
    table = make_table("ddpm", schedule_of(config), 27, options, spacing="smart27", start=start)
    generator = torch.Generator().manual_seed(7)
    drawn = lambda _: torch.randn(SHAPE, generator=generator, dtype=torch.float64).numpy()  # noqa: E731
    got = list(walk(table, model, noise * float(table.first_scale), noises=drawn))
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        np.testing.assert_allclose(ours / np.sqrt(1.0 + table.sigma_next[i] ** 2), theirs, rtol=0, atol=5e-5)
