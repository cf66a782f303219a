"""Objective of a latent diffusion model: predict the noise in latents (LDM, eq. 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sdjax.core.config import Config
from sdjax.core.errors import UserError, unknown
from sdjax.diffusion.denoise import Network, q_sample
from sdjax.diffusion.loss import (
    PosteriorTables,
    diffusion_loss,
    gather,
    hybrid_loss,
    offset_noise,
    posterior_tables,
    uniform_timesteps,
)
from sdjax.diffusion.samplers import schedule_of
from sdjax.diffusion.schedule import Schedule

Timesteps = Callable[[PRNGKeyArray, int, int], Int[Array, " b"]]


def late_timesteps(key: PRNGKeyArray, batch: int, steps: int) -> Int[Array, " b"]:
    """The density rises with t^2: where the prompt decides what the image is, there is most to learn."""
    return (jnp.cbrt(jax.random.uniform(key, (batch,))) * steps).astype(jnp.int32)


def in_range(draw: Timesteps, first: int, last: int) -> Timesteps:
    """A distribution stretched over the timesteps from `first` to `last` - 1."""
    return lambda key, batch, steps: first + draw(key, batch, last - first)


TIMESTEPS: dict[str, Timesteps] = {"uniform": uniform_timesteps, "late": late_timesteps}


class Noised(NamedTuple):
    """Noisy latents, and what made them so.

    Attributes:
        x: sqrt(abar) x0 + sqrt(1 - abar) noise.
        noise: standard normal, with an offset where there is one.
        timesteps: of each image.
        abar: their share of signal.
    """

    x: Float[Array, "b h w z"]
    noise: Float[Array, "b h w z"]
    timesteps: Int[Array, " b"]
    abar: Float[Array, " b"]


class Objective(NamedTuple):
    """The loss of a config's `task` section.

    Attributes:
        schedule: of the noise.
        timesteps: their distribution.
        prediction, weighting, norm: as `sdjax.diffusion.loss.diffusion_loss` takes them.
        offset: level of SDXL's offset noise; 0 for none.
        bounds: of a learned variance, which the hybrid loss trains, too (iDDPM, eq. 16); None for a fixed one.
    """

    schedule: Schedule
    timesteps: Timesteps
    prediction: str
    weighting: str
    offset: float
    norm: str = "l2"
    bounds: PosteriorTables | None = None

    def loss(
        self, network: Network, x0: Float[Array, "b h w z"], key: PRNGKeyArray, prior: float | None = None
    ) -> Float[Array, ""]:
        """The mean over a batch of scaled latents.

        Args:
            network: (noisy latents of unit variance, timesteps) -> the raw prediction.
            x0: clean latents.
            key: of the noise and of the timesteps.
            prior: weight of every second image, which is the class's and has no other weight (DreamBooth, eq. 2; as
                diffusers' scripts have it, each part is a mean). None for images without those of a class.
        """
        x, noise, t, abar = self.noised(x0, key)
        output = network(x, t)
        if self.bounds is not None:
            return hybrid_loss(output, x0, noise, t, self.bounds, self.prediction).mean()

        def losses(weighting: str) -> Array:
            return diffusion_loss(output, x0, noise, abar, self.prediction, weighting, self.norm)

        if prior is None:
            return losses(self.weighting).mean()
        return losses(self.weighting)[::2].mean() + prior * losses("simple")[1::2].mean()

    def noised(self, x0: Float[Array, "b h w z"], key: PRNGKeyArray) -> Noised:
        """Random timesteps, and clean latents as noisy as there."""
        noise_key, time_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, x0.shape)
        if self.offset:
            noise = offset_noise(jax.random.fold_in(noise_key, 1), noise, self.offset)
        t = self.timesteps(time_key, len(x0), self.schedule.num_timesteps)
        abar = gather(self.schedule.alphas_cumprod, t)
        return Noised(q_sample(x0, noise, abar), noise, t, abar)


def objective_of(task: Config, learned: bool = False) -> Objective:
    """Read `scheduler`, `timesteps`, `weighting`, `offset_noise` of a task section, `norm` and `timestep_range`, where
    they are there.

    Args:
        learned: whether the network predicts its variance, too.

    Raises:
        UserError: one of the names is unknown, the range is none, or the schedule allows no learned variance.
    """
    scheduler = task.scheduler.to_dict()
    if task.timesteps not in TIMESTEPS:
        raise unknown("timestep distribution", task.timesteps, TIMESTEPS, "config.task.timesteps")
    schedule, draw = schedule_of(scheduler), TIMESTEPS[task.timesteps]
    if given := tuple(task.get("timestep_range", ())):
        count = schedule.num_timesteps
        if len(given) != 2 or not 0 <= given[0] < given[1] <= count:
            raise UserError(f"config.task.timestep_range={given}: choose two of 0 to {count}, ascending")
        draw = in_range(draw, *given)
    return Objective(
        schedule,
        draw,
        scheduler["prediction_type"],
        task.weighting,
        task.offset_noise,
        task.get("norm", "l2"),
        posterior_tables(schedule) if learned else None,
    )
