"""Bits per dimension where they are known: of a network that knows the image, and by the entropy of a Gaussian."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sdjax.core.errors import UserError
from sdjax.diffusion.bound import bits_per_dimension, respaced
from sdjax.diffusion.schedule import make_schedule

SCHEDULE = make_schedule("linear", 1000, 1e-4, 0.02)
X0 = jnp.asarray(np.random.default_rng(0).integers(30, 226, (2, 4, 4, 3)) / 127.5 - 1.0, jnp.float32)


def test_respacing_keeps_the_noise_levels():
    """guided-diffusion's timesteps for "50" of 1000, and the product of what is left of the signal."""
    kept, few = respaced(SCHEDULE, 50)
    assert (len(kept), kept[0], kept[1], kept[-2], kept[-1]) == (50, 0, 20, 979, 999)
    np.testing.assert_allclose(np.cumprod(1.0 - few.betas), SCHEDULE.alphas_cumprod[kept], rtol=1e-12)
    kept, all_of_it = respaced(SCHEDULE, 1000)
    np.testing.assert_allclose(all_of_it.betas, SCHEDULE.betas, rtol=1e-9)
    for steps in (1, 1001):
        with pytest.raises(UserError, match=f"{steps} respaced steps; choose 2 to 1000"):
            respaced(SCHEDULE, steps)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
def test_bound_of_a_perfect_network(variance):
    """With the lower variance the steps cost nothing; with the upper one 0.5 (log r - 1 + 1/r) nats, r being the ratio
    of the variances; and the image what a bin of 2/255 around it has, to 1e-3 bits. "learned" answers v = -1."""
    _, few = respaced(SCHEDULE, 20)
    abar = jnp.asarray(SCHEDULE.alphas_cumprod, jnp.float32)

    def network(x, t):
        share = abar[t.astype(jnp.int32)][:, None, None, None]
        noise = (x - jnp.sqrt(share) * X0) / jnp.sqrt(1.0 - share)
        return jnp.concatenate([noise, -jnp.ones_like(noise)], -1) if variance == "learned" else noise

    of = jax.jit(lambda x: bits_per_dimension(network, x, jax.random.key(0), SCHEDULE, 20, (variance,)))
    found = of(X0)[variance]
    before = np.concatenate([[1.0], few.alphas_cumprod[:-1]])
    lower = few.betas * (1.0 - before) / (1.0 - few.alphas_cumprod)
    lower[0] = lower[1]
    used = few.betas if variance == "fixed_large" else lower
    ratio = used / lower
    steps = 0.5 * (np.log(ratio) - 1.0 + 1.0 / ratio)[1:]
    inside = 2.0 * stats.norm.cdf(1.0 / 255.0 / np.sqrt(used[0])) - 1.0
    wanted = np.concatenate([[-np.log(inside)], steps]) / np.log(2.0)
    np.testing.assert_allclose(found.terms, np.repeat(wanted[:, None], 2, 1), atol=1e-3)
    end = few.alphas_cumprod[-1]
    prior = 0.5 * (end * np.square(X0) - end - np.log(1.0 - end)).mean((1, 2, 3)) / np.log(2.0)
    np.testing.assert_allclose(found.prior, prior, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.total, prior + wanted.sum(), atol=1e-2)


def test_what_is_taken_for_the_picture_is_clipped():
    """A network that sees values of 5 pays as one that sees 1."""

    def bits_of(seen):
        network = lambda x, t: jnp.full_like(x, seen)  # noqa: E731
        names = ("fixed_small",)
        found = bits_per_dimension(network, X0, jax.random.key(0), SCHEDULE, 5, names, prediction="sample")
        return found["fixed_small"].total

    np.testing.assert_array_equal(bits_of(5.0), bits_of(1.0))
    assert (bits_of(0.5) != bits_of(1.0)).all()


def test_several_variances_share_network_calls():
    calls = []

    def network(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.concatenate([x, jnp.sin(x)], -1)

    names = ("learned", "fixed_small", "fixed_large")
    together = bits_per_dimension(network, X0, jax.random.key(0), SCHEDULE, 5, names)
    jax.effects_barrier()
    assert len(calls) == 5
    for name in names:
        alone = bits_per_dimension(network, X0, jax.random.key(0), SCHEDULE, 5, (name,))[name]
        np.testing.assert_allclose(together[name].total, alone.total, rtol=1e-6)


def test_an_unknown_variance_is_one_line():
    with pytest.raises(UserError, match="unknown variance 'any'; choose one of: fixed_large, fixed_small, learned"):
        bits_per_dimension(lambda x, t: x, X0, jax.random.key(0), SCHEDULE, 20, ("learned", "any"))
