"""The variational bound in bits per dimension, over all timesteps or a few of them (iDDPM, section 3 and 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sdjax.core.errors import UserError, unknown
from sdjax.diffusion.denoise import Network, q_sample
from sdjax.diffusion.loss import posterior_tables, vlb_term
from sdjax.diffusion.schedule import Schedule

# What stands for the network's answer v where the variance is fixed: the lower or the upper end of its range.
FIXED = {"fixed_small": -1.0, "fixed_large": 1.0}
VARIANCES = ("learned", *FIXED)


class Bits(NamedTuple):
    """Variational bound of an image's negative log-likelihood, in bits per value.

    Attributes:
        prior: of its noisiest version, KL(q(x_T | x0) || N(0, 1)).
        terms: of every step, the first is that of the image itself.
    """

    prior: Float[Array, " b"]
    terms: Float[Array, "s b"]

    @property
    def total(self) -> Float[Array, " b"]:
        """All together."""
        return self.prior + self.terms.sum(axis=0)


def respaced(schedule: Schedule, steps: int) -> tuple[Int[np.ndarray, " s"], Schedule]:
    """Evenly spaced timesteps, and the schedule of a process that has only those (openai/guided-diffusion, respace.py).

    Raises:
        UserError: fewer than two, or more than there are.
    """
    if not 2 <= steps <= schedule.num_timesteps:
        raise UserError(f"{steps} respaced steps; choose 2 to {schedule.num_timesteps}")
    kept = np.round(np.arange(steps) * ((schedule.num_timesteps - 1) / (steps - 1))).astype(int)
    abar = schedule.alphas_cumprod[kept]
    return kept, Schedule(1.0 - abar / np.concatenate([[1.0], abar[:-1]]), abar)


def bits_per_dimension(
    network: Network,
    x0: Float[Array, "b h w c"],
    key: PRNGKeyArray,
    schedule: Schedule,
    steps: int,
    variances: Sequence[str] = ("learned",),
    prediction: str = "epsilon",
) -> dict[str, Bits]:
    """The bound of 8-bit images with each of the variances, with one draw of noise a step; traceable.

    What the network takes for the image is clipped to [-1, 1] (openai/guided-diffusion, calc_bpd_loop): at the
    noisiest steps of a cosine schedule an error of the image is twenty thousand times that of the noise.

    Args:
        network: (x_vp, timesteps of training) -> the raw prediction, and v on further channels, which are left out
            where the variance is fixed; called once a step.
        x0: images in [-1, 1].
        key: of the noise.
        schedule: of training.
        steps: how many of its timesteps the process has.
        variances: of VARIANCES.
        prediction: what the network predicts.

    Raises:
        UserError: an unknown variance, or too few or too many steps.
    """
    for variance in variances:
        if variance not in VARIANCES:
            raise unknown("variance", variance, VARIANCES)
    kept, few = respaced(schedule, steps)
    tables = posterior_tables(few)
    channels = x0.shape[-1]

    def term(index: Array, timestep: Array) -> dict[str, Float[Array, " b"]]:
        noise = jax.random.normal(jax.random.fold_in(key, index), x0.shape)
        at = jnp.full(len(x0), index)
        output = network(q_sample(x0, noise, tables.abar[at]), jnp.full(len(x0), timestep, jnp.float32))
        mean = output[..., :channels]
        answers = {name: jnp.full_like(mean, FIXED[name]) for name in variances if name in FIXED}
        answers |= {"learned": output[..., channels:]} if "learned" in variances else {}
        return {name: vlb_term(mean, v, x0, noise, at, tables, prediction, 1.0) for name, v in answers.items()}

    terms = jax.lax.map(lambda pair: term(*pair), (jnp.arange(steps), jnp.asarray(kept)))
    abar = few.alphas_cumprod[-1]
    kl = 0.5 * (abar * jnp.square(x0) + (1.0 - abar) - 1.0 - np.log(1.0 - abar))
    prior = kl.mean(axis=(1, 2, 3)) / np.log(2.0)
    return {name: Bits(prior, terms[name]) for name in variances}
