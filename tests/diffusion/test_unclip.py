"""Karlo's samplers beside diffusers' UnCLIPScheduler, the same noise injected: of the prior, and of the decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import zoo
from diffusers import PriorTransformer as Reference
from diffusers import UnCLIPScheduler
from diffusers.schedulers import scheduling_unclip
from torch_reference import channels_first, channels_last, randomised, translated

from sdjax.checkpoints.networks import prior as conversion
from sdjax.diffusion.denoise import make_denoise
from sdjax.diffusion.guidance import guided
from sdjax.diffusion.samplers import SamplerOptions, sample, schedule_of, table_for
from sdjax.models.conditioning import Cond
from sdjax.models.prior import PriorTransformer

PRIOR = {"clip_sample_range": 5.0, "prediction_type": "sample"}
DECODER = {"variance_type": "learned_range"}
SCALE = 4.0
PUBLISHED = {
    7: [999, 832, 666, 500, 333, 166, 0],
    25: [
        *(999, 957, 916, 874, 832, 791, 749, 708, 666, 624, 583, 541, 500),
        *(458, 416, 375, 333, 291, 250, 208, 166, 125, 83, 42, 0),
    ],
}


def config_of(settings: dict[str, Any]) -> dict[str, Any]:
    return {"_class_name": "UnCLIPScheduler", **settings}


def theirs(
    settings: dict[str, Any],
    steps: int,
    network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    noises: Sequence[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> torch.Tensor:
    """The loop of diffusers' UnCLIPPipeline, its tables in float64.

    In float32 rounding makes its last image 0.05 % smaller: 1 - abar of timestep 0 is not quite the first beta.
    """
    scheduler, drawn, schedule = UnCLIPScheduler(**settings), iter(noises), schedule_of(config_of(settings))
    scheduler.betas, scheduler.alphas_cumprod = map(torch.from_numpy, schedule)
    scheduler.alphas = 1.0 - scheduler.betas
    monkeypatch.setattr(scheduling_unclip, "randn_tensor", lambda shape, **_: next(drawn))
    scheduler.set_timesteps(steps)
    for t, then in zip(scheduler.timesteps, [*scheduler.timesteps[1:], None], strict=True):
        with torch.no_grad():
            x = scheduler.step(network(x, t), t, x, prev_timestep=then).prev_sample
    return x


@pytest.mark.parametrize("steps", PUBLISHED)
def test_timesteps_are_the_published_ones(steps: int):
    table = table_for(config_of({}), steps=steps)
    assert table.timestep[table.active].tolist() == PUBLISHED[steps]
    table = table_for(config_of({}) | {"_class_name": "DDPMScheduler"}, steps=25)  # as Stable unCLIP reads it
    assert table.timestep[table.active][:2].tolist() == [960, 920]


def test_noise_levels_are_those_of_the_class():
    expected = UnCLIPScheduler().alphas_cumprod
    np.testing.assert_allclose(schedule_of(config_of({})).alphas_cumprod, expected, rtol=2e-4, atol=1e-7)


def test_another_sampler_keeps_what_the_file_says():
    options = SamplerOptions.from_scheduler_config(config_of(PRIOR), "ddim")
    assert (options.prediction_type, options.clip_sample_range) == ("sample", 5.0)
    assert options.timestep_spacing == "leading"


def test_the_loop_of_the_prior_agrees_to_1e_4(monkeypatch: pytest.MonkeyPatch):
    """Guided, its null condition another text; the prediction reaches the clip."""
    config, steps, rng = zoo.PRIOR, 25, np.random.default_rng(0)
    reference: Any = randomised(Reference.from_config(conversion.to_diffusers_config(config)))
    params = translated(reference, conversion.TABLE, conversion.shapes(config))
    context = rng.standard_normal((4, config.tokens, config.embedding_dim)).astype("f")
    vector = rng.standard_normal((4, config.embedding_dim)).astype("f")
    mask = np.arange(config.tokens) < np.array([[2], [2], [5], [config.tokens]])
    noise = rng.standard_normal((2, config.embedding_dim)).astype("f")
    noises = rng.standard_normal((steps, 2, config.embedding_dim)).astype("f")
    seen = []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        text = (torch.from_numpy(part) for part in (vector, context, mask))
        null, cond = reference(torch.cat([x, x]), t, *text).predicted_image_embedding.chunk(2)
        seen.append(null + SCALE * (cond - null))
        return seen[-1]

    expected = theirs(PRIOR, steps, network, torch.from_numpy(noise), torch.from_numpy(noises), monkeypatch)
    assert 0.01 < (torch.stack(seen).abs() > 5.0).float().mean() < 0.5
    table = table_for(config_of(PRIOR), steps=steps)

    @jax.jit
    def ours(params: Any) -> Any:
        def pair(x: Any, t: Any) -> Any:
            both = PriorTransformer(config).apply({"params": params}, jnp.tile(x, (2, 1)), jnp.tile(t, 2), text)
            return both[2:], both[:2]

        text = Cond(context, mask, vector)
        denoise = make_denoise(guided(pair, SCALE), "sample")
        keys = jax.random.split(jax.random.key(0), 2)
        given = jnp.pad(noises.swapaxes(0, 1), ((0, 0), (0, len(table.sigma) - steps), (0, 0)))
        return sample(denoise, table, table.first_scale * noise, keys, given=given)

    np.testing.assert_allclose(ours(params), expected, atol=1e-4, rtol=0)


def test_the_loop_of_the_decoder_agrees_to_1e_4(monkeypatch: pytest.MonkeyPatch):
    """Epsilon and a learned variance, of a network that is no network."""
    steps, rng = 7, np.random.default_rng(0)
    noise, *noises = rng.standard_normal((1 + steps, 2, 4, 4, 3)).astype("f")

    def network(x: Any, t: Any, np: Any) -> tuple[Any, Any]:
        return np.tanh(x * (0.3 + t / 1500.0)) + 0.1 * np.cos(5.0 * x), np.sin(3.0 * x)

    expected = theirs(
        DECODER,
        steps,
        lambda x, t: torch.cat(network(x, t, torch), dim=1),
        channels_first(noise),
        [channels_first(each) for each in noises],
        monkeypatch,
    )
    table = table_for(config_of(DECODER), steps=steps)

    @jax.jit
    def ours(x: Any) -> Any:
        def stacked(x: Any, t: Any) -> Any:
            return jnp.concatenate(network(x, t[:, None, None, None], jnp), axis=-1)

        keys = jax.random.split(jax.random.key(0), 2)
        given = jnp.stack([*noises, *[noise] * (len(table.sigma) - steps)], axis=1)
        return sample(make_denoise(stacked, "epsilon"), table, table.first_scale * x, keys, given=given)

    np.testing.assert_allclose(ours(noise), channels_last(expected), atol=1e-4, rtol=0)
