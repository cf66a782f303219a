"""The one scan: against the same rows in NumPy, textbook loops, known solutions; what it compiles and what it calls."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from table_loop import walk

from sdjax.core.errors import UserError
from sdjax.core.prng import image_keys
from sdjax.diffusion.denoise import make_denoise
from sdjax.diffusion.guidance import guided
from sdjax.diffusion.samplers import SAMPLERS, SamplerOptions, first_noise, make_table, sample, start_of
from sdjax.diffusion.samplers.noise_levels import SIGMA_SCHEDULES
from sdjax.diffusion.samplers.options import TIMESTEP_SPACINGS
from sdjax.diffusion.schedule import make_schedule

SCHEDULE = make_schedule()
SHAPE = (2, 4, 4, 3)
TWO_CALLS = ("heun", "dpm2", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde")
KEYS = image_keys(0, jnp.arange(SHAPE[0]))


def row_noise(i: int) -> np.ndarray:
    draw = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), SHAPE[1:]))
    return np.asarray(draw(KEYS), np.float64)


@jax.jit
def run(table, x):
    def network(x, t):
        return jnp.tanh(x * (0.3 + t[:, None, None, None] / 1500.0))

    return sample(make_denoise(network, "v_prediction"), table, x, KEYS)


def model(x: np.ndarray, t: float) -> np.ndarray:
    return np.tanh(x * (0.3 + t / 1500.0))


@pytest.mark.parametrize("limits", [{}, {"clip_sample": True}, {"thresholding": True, "sample_max_value": 3.0}])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_scan_is_the_textbook_loop(sampler, limits):
    """float32 against float64; the recorded noise of PLMS divides by small sigmas and costs one digit more."""
    table = make_table(sampler, SCHEDULE, 8, prediction_type="v_prediction", s_churn=2.0, **limits)
    x = np.asarray(first_noise(KEYS, SHAPE[1:]), np.float64) * table.first_scale
    *_, expected = walk(table, model, x, "v_prediction", row_noise)
    got = run(table, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 if sampler == "plms" else 4e-6)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler", "euler_a", "dpmpp_2m", "unipc", "dpmpp_2m_sde"])
def test_zero_terminal_snr_in_float32(sampler):
    """Sampling begins at a sigma of 4096 or a million; v-prediction loses nothing there."""
    schedule = make_schedule(zero_terminal_snr=True)
    table = make_table(sampler, schedule, 8, spacing="trailing", prediction_type="v_prediction")
    assert table.sigma[0] > 4000.0
    x = np.asarray(first_noise(KEYS, SHAPE[1:]), np.float64) * table.first_scale
    *_, expected = walk(table, model, x, "v_prediction", row_noise)
    np.testing.assert_allclose(run(table, jnp.asarray(x, jnp.float32)), expected, rtol=0, atol=3e-6)


def gaussian_error(sampler: str, steps: int, **options) -> float:
    """Error at the last level before 0 for data N(0.3, 0.5^2), whose denoiser and probability flow are known.

    D(x, s) = (0.25 x + 0.3 s^2) / (0.25 + s^2);  x(s) = 0.3 + (x(S) - 0.3) sqrt((0.25 + s^2) / (0.25 + S^2)).
    """
    table = make_table(sampler, SCHEDULE, steps, prediction_type="sample", **options)
    levels = iter(table.sigma)

    def denoiser(scaled: np.ndarray, _: float) -> np.ndarray:
        s = float(next(levels))
        return (0.25 * scaled * np.sqrt(1.0 + s**2) + 0.3 * s**2) / (0.25 + s**2)

    x = np.full((1, 1, 1, 1), 5.0)
    *_, got, _ = walk(table, denoiser, x, "sample")
    first, last = table.sigma[0], table.sigma[int(table.active.sum()) - 1]
    exact = 0.3 + (5.0 - 0.3) * np.sqrt((0.25 + last**2) / (0.25 + first**2))
    return abs(float(got.item()) - exact)


@pytest.mark.parametrize(
    ("sampler", "order", "options"),
    [
        ("euler", 1, {"spacing": "karras"}),
        ("ddim", 1, {"spacing": "leading"}),
        ("heun", 2, {"spacing": "karras"}),
        ("dpm2", 2, {"spacing": "karras"}),
        ("dpmpp_2m", 2, {"spacing": "karras"}),
        ("lms", 3, {"spacing": "karras"}),
        ("dpm2_a", 2, {"spacing": "karras", "eta": 0.0}),
        ("dpmpp_2s_a", 2, {"spacing": "karras", "eta": 0.0}),
        ("dpmpp_sde", 2, {"spacing": "karras", "eta": 0.0}),
        ("dpmpp_2m_sde", 2, {"spacing": "karras", "eta": 0.0}),
        ("dpmpp_2m", 2, {"spacing": "karras", "algorithm_type": "dpmsolver"}),
        ("dpmpp_2s", 2, {"spacing": "karras"}),
        ("unipc", 1, {"spacing": "karras", "solver_order": 1, "disable_corrector": tuple(range(100))}),
        ("unipc", 2, {"spacing": "karras", "disable_corrector": tuple(range(100))}),
        ("unipc", 3, {"spacing": "karras"}),
        ("unipc", 3, {"spacing": "karras", "predict_x0": False}),
        ("deis", 1, {"spacing": "karras", "solver_order": 1}),
        ("deis", 2, {"spacing": "karras"}),
        ("deis", 3, {"spacing": "karras", "solver_order": 3}),
    ],
)
def test_order_of_convergence(sampler, order, options):
    errors = [gaussian_error(sampler, steps, **options) for steps in (50, 100)]
    measured = np.log2(errors[0] / errors[1])
    assert order - 0.2 < measured < order + (1.2 if order > 2 else 0.4), (measured, errors)


def gaussian_step_error(sampler: str, steps: int, **options) -> float:
    """Error of the step in the middle of the table when all before it was exact: the problem of `gaussian_error`.

    A multistep method's first steps are of lower order and hide its own over a whole trajectory.
    """
    table = make_table(sampler, SCHEDULE, steps, spacing="karras", **options)
    i = steps // 2

    def exact(s: float) -> float:
        return 0.3 + 4.7 * np.sqrt((0.25 + s**2) / (0.25 + table.sigma[0] ** 2))

    def recorded(j: int) -> float:
        s = table.sigma[j]
        x0 = (0.25 * exact(s) + 0.3 * s**2) / (0.25 + s**2)
        return float(np.dot(table.record[j], (exact(s), x0, x0)))

    terms = [exact(table.sigma[i]), exact(table.sigma[i - 1]), *(recorded(i - k) for k in range(4)), 0.0]
    return abs(float(np.dot(table.weights[i, 0], terms)) - exact(table.sigma[i + 1]))


@pytest.mark.parametrize(
    ("sampler", "order", "options"),
    [
        ("dpmpp_2m_sde", 2, {"eta": 0.0}),
        # By the published coefficients, see dpm_solver.py.
        ("dpmpp_3m_sde", 2, {"eta": 0.0}),
        ("dpmpp_2m", 2, {"solver_order": 3, "algorithm_type": "dpmsolver"}),
        ("deis", 3, {"solver_order": 3}),
        ("deis", 2, {}),
        ("unipc", 3, {"solver_order": 3, "disable_corrector": tuple(range(400))}),
        ("unipc", 3, {"solver_order": 3, "solver_type": "bh1", "disable_corrector": tuple(range(400))}),
        ("unipc", 3, {"solver_order": 3, "predict_x0": False, "disable_corrector": tuple(range(400))}),
    ],
)
def test_order_of_one_step(sampler, order, options):
    errors = [gaussian_step_error(sampler, steps, **options) for steps in (100, 200)]
    assert abs(np.log2(errors[0] / errors[1]) - (order + 1)) < 0.25, errors


def test_third_order_is_nearer_than_second():
    second, third = (gaussian_step_error("dpmpp_2m", 100, solver_order=order) for order in (2, 3))
    assert third < 0.6 * second


def test_order_of_the_corrector():
    """UniC raises the order by one: its x, the anchor, from the exact x before and exact predictions."""
    for order in (1, 2, 3):
        errors = []
        for steps in (100, 200):
            table = make_table("unipc", SCHEDULE, steps, spacing="karras", solver_order=order)
            i, first = steps // 2, table.sigma[0]
            sigmas = table.sigma[i - np.arange(4)]
            exact = 0.3 + 4.7 * np.sqrt((0.25 + sigmas**2) / (0.25 + first**2))
            x0 = (0.25 * exact + 0.3 * sigmas**2) / (0.25 + sigmas**2)
            errors.append(abs(np.dot(table.weights[i, 1], [0.0, exact[1], *x0, 0.0]) - exact[0]))
        assert abs(np.log2(errors[0] / errors[1]) - (order + 2)) < 0.35, (order, errors)


def textbook_churn(sampler: str, table_sigmas: np.ndarray, gamma: float, window, x, noises) -> np.ndarray:
    """k-diffusion's sample_euler, sample_heun and sample_dpm_2 (crowsonkb/k-diffusion sampling.py), in own words."""
    s_tmin, s_tmax, s_noise = window

    def denoise(x, s):
        return 0.8 * np.tanh(x / np.sqrt(1.0 + s**2))

    for i, (s, target) in enumerate(itertools.pairwise(table_sigmas)):
        lifted = s * (1.0 + gamma) if s_tmin <= s <= s_tmax else s
        if lifted > s:
            x = x + noises[i] * s_noise * np.sqrt(lifted**2 - s**2)
        d = (x - denoise(x, lifted)) / lifted
        if target == 0.0 or sampler == "euler":
            x = x + d * (target - lifted)
        elif sampler == "heun":
            ahead = x + d * (target - lifted)
            x = x + (d + (ahead - denoise(ahead, target)) / target) / 2.0 * (target - lifted)
        else:
            middle = np.exp((np.log(lifted) + np.log(target)) / 2.0)
            half = x + d * (middle - lifted)
            x = x + (half - denoise(half, middle)) / middle * (target - lifted)
    return x


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm2"])
def test_churn(sampler):
    """The first level is above s_tmax: its churn would be part of the first noise."""
    steps, s_churn = 7, 1.5
    window = (0.05, 5.0, 1.01)
    settings = dict(zip(("s_tmin", "s_tmax", "s_noise"), window, strict=True))
    plain = make_table("euler", SCHEDULE, steps, spacing="karras")
    sigmas = np.append(plain.sigma[:steps], 0.0)
    noises = np.random.default_rng(0).standard_normal((steps, *SHAPE))
    x = np.random.default_rng(1).standard_normal(SHAPE) * sigmas[0]
    expected = textbook_churn(sampler, sigmas, s_churn / steps, window, x, noises)
    table = make_table(
        sampler, SCHEDULE, steps, spacing="karras", prediction_type="sample", s_churn=s_churn, **settings
    )
    drawn = iter(noises[[i for i in range(steps) if window[0] <= sigmas[i] <= window[1]]])
    *_, got = walk(table, lambda x, _: 0.8 * np.tanh(x), x, "sample", lambda _: next(drawn))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
    assert next(drawn, None) is None
    assert table.sigma[0] == sigmas[0]


def test_first_churn_is_part_of_the_first_noise():
    plain = make_table("euler", SCHEDULE, 10)
    churned = make_table("euler", SCHEDULE, 10, s_churn=4.0)
    assert churned.sigma[0] == pytest.approx(1.4 * plain.sigma[0], rel=1e-12)
    assert churned.first_scale == pytest.approx(churned.sigma[0], rel=1e-12)


def test_nothing_compiles_again():
    """Sampler, steps within one padded length, seed, guidance, spacing, clipping and the start are arguments."""
    compiled = []

    @jax.jit
    def go(table, seed, scale, rescale):
        compiled.append(1)
        keys = image_keys(seed, jnp.arange(2))

        def pair(x, t):
            return jnp.tanh(x), jnp.sin(x) * t[:, None, None, None] / 1000.0

        x = first_noise(keys, SHAPE[1:]) * table.first_scale
        return sample(make_denoise(guided(pair, scale, rescale), "epsilon"), table, x, keys)

    results = []
    for i, sampler in enumerate(SAMPLERS):
        for steps in (17 + i % 9, 28):
            table = make_table(sampler, SCHEDULE, steps // 2 + 2 if sampler in TWO_CALLS else steps)
            results.append(go(table, i, 1.0 + i, 0.05 * i))
    for changes in ({"start": 15}, {"spacing": "linspace"}, {"eta": 1.0}, {"thresholding": True}):
        results.append(go(make_table("ddim", SCHEDULE, 20, **changes), 3, 7.5, 0.0))
    for spacing in (*TIMESTEP_SPACINGS, *SIGMA_SCHEDULES):
        results.append(go(make_table("unipc", SCHEDULE, 19, spacing=spacing), 3, 7.5, 0.0))
    results.append(go(make_table("ddpm", SCHEDULE, 27, spacing="smart27"), 3, 7.5, 0.0))
    assert go._cache_size() == 1
    assert len(compiled) == 1
    assert len({float(r.sum()) for r in results}) == len(results)


@pytest.mark.parametrize(("sampler", "calls"), [("ddim", 20), ("heun", 39), ("plms", 21), ("dpmpp_sde", 39)])
def test_padding_calls_no_network(sampler, calls):
    seen = []

    def network(x, t):
        jax.debug.callback(lambda t: seen.append(float(t)), t[0])
        return x

    table = make_table(sampler, SCHEDULE, 20)
    assert len(table.sigma) > calls
    jax.block_until_ready(sample(make_denoise(network, "epsilon"), table, jnp.ones(SHAPE), KEYS))
    jax.effects_barrier()
    assert sorted(seen) == sorted(table.timestep[:calls].astype(np.float32).tolist())


@pytest.mark.parametrize("sampler", ["ddpm", "euler_a", "dpmpp_sde"])
def test_an_image_does_not_depend_on_its_batch(sampler):
    table = make_table(sampler, SCHEDULE, 12)
    denoise = make_denoise(lambda x, t: jnp.tanh(x), "epsilon")

    def pictures(indices):
        keys = image_keys(5, jnp.array(indices))
        return sample(denoise, table, first_noise(keys, SHAPE[1:]) * table.first_scale, keys)

    together, alone = pictures([0, 1, 2, 3, 4]), pictures([3])
    np.testing.assert_allclose(together[3], alone[0], rtol=0, atol=1e-6)
    assert float(jnp.abs(together[3] - together[4]).max()) > 0.1


def test_blending_between_rows_keeps_the_known_part():
    """Inpainting: the known half is q_sample'd to each row's next level, and clean after the last."""
    known = jnp.asarray(np.random.default_rng(0).standard_normal(SHAPE), jnp.float32)
    noise = first_noise(KEYS, SHAPE[1:])
    mask = jnp.zeros(SHAPE).at[:, :, 2:].set(1.0)  # 1: repaint
    levels = []

    def between(x, sigma_next):
        jax.debug.callback(lambda s: levels.append(float(s)), sigma_next[0])
        return mask * x + (1.0 - mask) * (known + sigma_next[:, None, None, None] * noise)

    table = make_table("euler", SCHEDULE, 10)
    denoise = make_denoise(lambda x, t: jnp.tanh(x), "epsilon")
    got = sample(denoise, table, noise * table.first_scale, KEYS, between)
    jax.effects_barrier()
    free = sample(denoise, table, noise * table.first_scale, KEYS)
    np.testing.assert_array_equal(got[:, :, :2], known[:, :, :2])
    np.testing.assert_allclose(got[:, :, 2:], free[:, :, 2:], atol=1e-6)
    np.testing.assert_allclose(sorted(levels, reverse=True), [*table.sigma[1:10], 0.0], rtol=1e-6)


def test_learned_variance_is_diffusers_own():
    """Twelve respaced steps of DDPM with variance_type learned_range, by one torch generator; float32 tables there."""
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        variance_type="learned_range",
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(12)
    first = first_noise(KEYS, SHAPE[1:])
    x, generator = torch.from_numpy(np.array(first)).permute(0, 3, 1, 2), torch.Generator().manual_seed(7)
    for t in scheduler.timesteps:
        answer = torch.cat([torch.sin(3 * x), torch.cos(2 * x)], 1)
        x = scheduler.step(answer, t, x, generator=generator).prev_sample
    denoise = make_denoise(lambda x, t: jnp.concatenate([jnp.sin(3 * x), jnp.cos(2 * x)], -1), "epsilon")
    options = SamplerOptions(variance_type="learned_range", timestep_spacing="trailing", clip_sample=True)
    table = make_table("ddpm", SCHEDULE, 12, options)
    generator = torch.Generator().manual_seed(7)
    noise = np.zeros((SHAPE[0], len(table.sigma), *SHAPE[1:]), np.float32)
    for row in range(12):  # by trailing timesteps the last one adds some too
        noise[:, row] = torch.randn(x.shape, generator=generator).permute(0, 2, 3, 1)
    got = sample(denoise, table, first * table.first_scale, KEYS, given=jnp.asarray(noise))
    np.testing.assert_allclose(got, x.permute(0, 2, 3, 1), rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: make_table("dpm++", SCHEDULE, 10), "unknown sampler 'dpm\\+\\+'; choose one of: ddim, ddpm"),
        (lambda: make_table("euler", SCHEDULE, 10, spacing="quad"), "unknown schedule 'quad'; choose one of"),
        (lambda: make_table("ddim", SCHEDULE, 10, spacing="karras"), "schedule 'karras'.*leading, linspace, trailing"),
        (lambda: make_table("ddim", SCHEDULE, 0), "start 0|steps 0"),
        (lambda: make_table("ddim", SCHEDULE, 27, spacing="fast27"), "schedule 'fast27'.*for ddpm, not ddim"),
        (lambda: make_table("ddpm", SCHEDULE, 50, spacing="fast27"), "steps 50: schedule 'fast27' has 27"),
        (lambda: make_table("ddpm", SCHEDULE, 2, timesteps=(3, 7)), "timesteps \\[3, 7\\]: give 2 descending"),
        (lambda: make_table("euler", SCHEDULE, 1001), "steps 1001: choose 1 to 1000"),
        (lambda: make_table("dpmpp_2m", SCHEDULE, 1000), "steps 1000: choose 1 to 999"),
        (lambda: make_table("ddim", SCHEDULE, 10, start=10), "start 10: choose 0 to 9"),
        (lambda: make_table("ddim", SCHEDULE, 10, etta=1.0), "unknown sampler option 'etta'"),
        (lambda: start_of(10, 0.0), "strength 0.0"),
    ],
)
def test_mistakes_are_named(call, says):
    with pytest.raises(UserError, match=says):
        call()
