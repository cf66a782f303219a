"""Training objectives: the forward process, weighted regression, and the variational bound for a learned variance."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sdjax.core.errors import UserError, unknown
from sdjax.diffusion.denoise import check_prediction, per_image, q_sample
from sdjax.diffusion.schedule import Schedule

WEIGHTINGS = ("simple", "min_snr")
NORMS = ("l1", "l2")
VLB_WEIGHT = 0.001
"""lambda of the hybrid objective (iDDPM, eq. 16)."""


def gather(table: np.ndarray | Float[Array, " t"], timesteps: Int[Array, " b"]) -> Float[Array, " b"]:
    """The entries of a schedule's float64 [T] table at integer timesteps, in float32."""
    return jnp.asarray(table, jnp.float32)[timesteps]


def target(
    kind: str, x0: Float[Array, "b h w c"], noise: Float[Array, "b h w c"], abar: Float[Array, " b"]
) -> Float[Array, "b h w c"]:
    """Regression target of a parameterization at x_vp = sqrt(abar) x0 + sqrt(1 - abar) noise.

    Raises:
        UserError: the kind is not among PREDICTIONS.
    """
    check_prediction(kind)
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return x0
    abar = per_image(abar, x0)
    return jnp.sqrt(abar) * noise - jnp.sqrt(1.0 - abar) * x0


def vp_to_x0(
    kind: str, output: Float[Array, "b h w c"], x_vp: Float[Array, "b h w c"], abar: Float[Array, " b"]
) -> Float[Array, "b h w c"]:
    """Clean sample of x in variance-preserving coordinates (DDPM eq. 15; Salimans & Ho 2022, appendix D).

    Raises:
        UserError: the kind is not among PREDICTIONS.
    """
    check_prediction(kind)
    abar = per_image(abar, x_vp)
    if kind == "epsilon":
        return (x_vp - jnp.sqrt(1.0 - abar) * output) / jnp.sqrt(abar)
    if kind == "sample":
        return output
    return jnp.sqrt(abar) * x_vp - jnp.sqrt(1.0 - abar) * output


def uniform_timesteps(key: PRNGKeyArray, batch: int, num_timesteps: int) -> Int[Array, " b"]:
    """[batch] integers, uniform over 0 .. num_timesteps - 1."""
    return jax.random.randint(key, (batch,), 0, num_timesteps)


def offset_noise(key: PRNGKeyArray, noise: Float[Array, "b h w c"], level: float) -> Float[Array, "b h w c"]:
    """Adds `level` times one normal number for each image and channel (SDXL, level 0.05)."""
    batch, _, _, channels = noise.shape
    return noise + level * jax.random.normal(key, (batch, 1, 1, channels), noise.dtype)


def min_snr_weight(prediction: str, abar: Float[Array, " b"], gamma: float = 5.0) -> Float[Array, " b"]:
    """Min-SNR-gamma weights (Hang et al. 2023), for the loss in the space of the prediction.

    min(snr, gamma) for x0, divided by snr for epsilon and by snr + 1 for v; written without the quotient, so that a
    terminal abar of zero is a number.

    Raises:
        UserError: the prediction is unknown.
    """
    check_prediction(prediction)
    if prediction == "epsilon":
        return jnp.minimum(1.0, gamma * (1.0 - abar) / abar)
    if prediction == "sample":
        return jnp.minimum(abar / (1.0 - abar), gamma)
    return jnp.minimum(abar, gamma * (1.0 - abar))


def diffusion_loss(
    output: Float[Array, "b h w c"],
    x0: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    abar: Float[Array, " b"],
    prediction: str,
    weighting: str = "simple",
    norm: str = "l2",
) -> Float[Array, " b"]:
    """Each image's mean |target - output|^p, weighted by noise level, in float32.

    Args:
        output: the network's raw prediction at q_sample(x0, noise, abar).
        x0: clean samples.
        noise: standard normal.
        abar: the share of signal of each image.
        prediction: "epsilon", "sample" or "v_prediction".
        weighting: "simple" (DDPM, eq. 14) or "min_snr" (gamma 5).
        norm: "l2" (p = 2) or "l1" (p = 1).

    Raises:
        UserError: a name is unknown.
    """
    if weighting not in WEIGHTINGS:
        raise unknown("loss weighting", weighting, WEIGHTINGS)
    if norm not in NORMS:
        raise unknown("loss norm", norm, NORMS)
    x0, noise, abar = (a.astype(jnp.float32) for a in (x0, noise, abar))
    error = output.astype(jnp.float32) - target(prediction, x0, noise, abar)
    loss = _image_mean(jnp.square(error) if norm == "l2" else jnp.abs(error))
    return loss * min_snr_weight(prediction, abar) if weighting == "min_snr" else loss


class PosteriorTables(NamedTuple):
    """q(x_{t-1} | x_t, x0) of a schedule, [T] float32 each (DDPM, eq. 6 and 7; iDDPM, eq. 15)."""

    abar: Array
    mean_x0: Array
    mean_xt: Array
    min_log: Array  # log beta~_t, its first entry replaced by its second, which is finite
    max_log: Array  # log beta_t


def posterior_tables(schedule: Schedule) -> PosteriorTables:
    """The tables of `hybrid_loss`, computed in float64.

    Raises:
        UserError: the schedule has one timestep, or a terminal SNR of zero, where the bound is infinite.
    """
    betas, abar = schedule
    if len(betas) < 2 or abar[-1] <= 0.0:
        raise UserError("a learned variance needs at least two timesteps and a terminal SNR above zero")
    before = np.concatenate([[1.0], abar[:-1]])
    variance = betas * (1.0 - before) / (1.0 - abar)
    tables = (
        abar,
        np.sqrt(before) * betas / (1.0 - abar),
        np.sqrt(1.0 - betas) * (1.0 - before) / (1.0 - abar),
        np.log(np.concatenate([variance[1:2], variance[1:]])),
        np.log(betas),
    )
    return PosteriorTables(*(jnp.asarray(table, jnp.float32) for table in tables))


def hybrid_loss(
    output: Float[Array, "b h w d"],
    x0: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    timesteps: Int[Array, " b"],
    tables: PosteriorTables,
    prediction: str = "epsilon",
) -> Float[Array, " b"]:
    """L_simple + lambda L_vlb for a network with 2 c output channels (iDDPM, eq. 16).

    The bound trains the variance alone: its mean is under a stop-gradient. T times the bound of one random timestep
    estimates the whole bound, in bits per dimension.

    Args:
        output: [b h w 2c]: the prediction, then v, where (v + 1) / 2 interpolates the log-variance.
        x0: clean samples; pixels in [-1, 1] for the discrete likelihood at timestep 0.
        noise: standard normal.
        timesteps: integers of each image.
        tables: of `posterior_tables`.
        prediction: "epsilon", "sample" or "v_prediction".

    Raises:
        UserError: the prediction is unknown, or the output does not have 2 c channels.
    """
    channels = x0.shape[-1]
    if output.shape[-1] != 2 * channels:
        raise UserError(f"learned variance: the network must have {2 * channels} channels, it has {output.shape[-1]}")
    mean_output, v = jnp.split(output.astype(jnp.float32), 2, axis=-1)
    simple = diffusion_loss(mean_output, x0, noise, tables.abar[timesteps], prediction)
    bound = vlb_term(jax.lax.stop_gradient(mean_output), v, x0, noise, timesteps, tables, prediction)
    return simple + VLB_WEIGHT * tables.abar.shape[0] * bound


def vlb_term(
    mean_output: Float[Array, "b h w c"],
    v: Float[Array, "b h w c"],
    x0: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    timesteps: Int[Array, " b"],
    tables: PosteriorTables,
    prediction: str = "epsilon",
    limit: float = math.inf,
) -> Float[Array, " b"]:
    """One term of the variational bound in bits per dimension: L_{t-1}, or L_0 at timestep 0 (DDPM, eq. 5 and 13).

    Args: as of `hybrid_loss`; the x0 that is predicted is clipped to [-limit, limit].

    Raises:
        UserError: the prediction is unknown.
    """
    x0, noise = x0.astype(jnp.float32), noise.astype(jnp.float32)
    at = PosteriorTables(*(per_image(table[timesteps], x0) for table in tables))
    abar = tables.abar[timesteps]
    xt = q_sample(x0, noise, abar)
    predicted = jnp.clip(vp_to_x0(prediction, mean_output, xt, abar), -limit, limit)
    mean = at.mean_x0 * predicted + at.mean_xt * xt
    log_variance = interpolate_log_variance(v, at.min_log, at.max_log)
    true_mean = at.mean_x0 * x0 + at.mean_xt * xt
    kl = _normal_kl(true_mean, at.min_log, mean, log_variance)
    nll = -_discrete_log_likelihood(x0, mean, 0.5 * log_variance)
    return jnp.where(timesteps == 0, _image_mean(nll), _image_mean(kl)) / np.log(2.0)


def interpolate_log_variance(v: Array, min_log: Array, max_log: Array) -> Array:
    """Geometric interpolation between the bounds, v = -1 the lower, v = 1 the upper (iDDPM, eq. 15)."""
    fraction = (v + 1.0) / 2.0
    return fraction * max_log + (1.0 - fraction) * min_log


def _image_mean(values: Array) -> Array:
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))


def _normal_kl(mean_q: Array, log_q: Array, mean_p: Array, log_p: Array) -> Array:
    """KL(q || p) of diagonal normal distributions, in nats, element by element."""
    return 0.5 * (log_p - log_q - 1.0 + jnp.exp(log_q - log_p) + jnp.square(mean_q - mean_p) * jnp.exp(-log_p))


def _discrete_log_likelihood(x: Array, mean: Array, log_scale: Array) -> Array:
    """log P(x) of 8-bit values on [-1, 1] under a normal: bins of half-width 1/255, the outer open (DDPM, eq. 13)."""
    inverse = jnp.exp(-log_scale)
    # A bin in the upper tail is mirrored into the lower one, where the difference of two small numbers is exact.
    offset = -jnp.abs(x - mean)
    inside = jax.scipy.stats.norm.cdf((offset + 1 / 255) * inverse) - jax.scipy.stats.norm.cdf(
        (offset - 1 / 255) * inverse
    )
    lowest = jax.scipy.stats.norm.logcdf((x - mean + 1 / 255) * inverse)
    highest = jax.scipy.stats.norm.logcdf((mean - x + 1 / 255) * inverse)
    inside = jnp.log(jnp.maximum(inside, 1e-12))
    return jnp.where(x < -0.999, lowest, jnp.where(x > 0.999, highest, inside))
