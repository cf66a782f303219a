"""Parameterizations, and the one seam between networks and solvers: denoise(x, sigma, timestep) -> x0.

Two coordinates. Networks see variance-preserving x_vp = sqrt(abar) x0 + sqrt(1 - abar) noise; solvers keep the
variance-exploding x = x0 + sigma noise = x_vp / sqrt(abar) of k-diffusion, with sigma = sqrt((1 - abar) / abar).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sdjax.core.errors import unknown

PREDICTIONS = ("epsilon", "sample", "v_prediction")
"""Noise, clean sample, or velocity sqrt(abar) noise - sqrt(1 - abar) x0 (Salimans & Ho 2022): diffusers' names."""

Network = Callable[[Float[Array, "b *space c"], Float[Array, " b"]], Float[Array, "b *space d"]]
"""network(x_vp, timestep) -> raw prediction; d is c, or 2 c with a learned variance."""


class Guided(NamedTuple):
    """Answer of a denoiser that a gradient guides.

    Attributes:
        x0: [b h w c], as without it.
        v: of a learned variance; -1 without one.
        gradient: [b h w c] of the condition's log-probability with respect to x_vp.
    """

    x0: Array
    v: Array | float
    gradient: Array


Answer = Float[Array, "b *space c"] | tuple[Float[Array, "b *space c"], Float[Array, "b *space c"]] | Guided

Denoise = Callable[..., Answer]
"""denoise(x [b *space c], sigma [b] or [], timestep likewise) -> x0, x in variance-exploding coordinates.

With a learned variance it answers (x0, v), see `make_denoise`; guided by a gradient, `Guided`."""


def parts(answer: Answer) -> tuple[Array, Array | float, Array | None]:
    """x0, v and the gradient; without a learned variance v says the lower bound, the posterior's own."""
    if isinstance(answer, Guided):
        return answer.x0, answer.v, answer.gradient
    return (*answer, None) if isinstance(answer, tuple) else (answer, -1.0, None)


def per_image(values: Array | np.ndarray | float, like: Array) -> Array:
    """Appends axes to `values` ([] or [b]) so that it multiplies `like` ([b ...])."""
    values = jnp.asarray(values)
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim)) if values.ndim else values


def q_sample(
    x0: Float[Array, "b *space c"], noise: Float[Array, "b *space c"], abar: Float[Array, " b"]
) -> Float[Array, "b *space c"]:
    """x_vp = sqrt(abar) x0 + sqrt(1 - abar) noise (DDPM, eq. 4)."""
    abar = per_image(abar, x0)
    return jnp.sqrt(abar) * x0 + jnp.sqrt(1.0 - abar) * noise


class Parameterization(NamedTuple):
    """The map from a network's output to a clean sample (k-diffusion, external.py).

    Attributes:
        c_in: sigma -> the factor that takes x to the network's input.
        to_x0: (output, x, sigma) -> the clean sample; sigma is broadcast over x already.
    """

    c_in: Callable[[Array], Array]
    to_x0: Callable[[Array, Array, Array], Array]


def _vp_scale(sigma: Array) -> Array:
    """Takes x = x0 + sigma noise to unit variance: sqrt(abar) = 1 / sqrt(sigma^2 + 1)."""
    return 1.0 / jnp.sqrt(sigma**2 + 1.0)


# v: nothing cancels, so a level of sigma = 1e6 (zero terminal SNR) is as exact as any other.
PARAMETERIZATIONS = {
    "epsilon": Parameterization(_vp_scale, lambda output, x, sigma: x - sigma * output),
    "sample": Parameterization(_vp_scale, lambda output, x, sigma: output),
    "v_prediction": Parameterization(
        _vp_scale, lambda output, x, sigma: x / (sigma**2 + 1.0) - output * sigma / jnp.sqrt(sigma**2 + 1.0)
    ),
}


def to_x0(
    kind: str, output: Float[Array, "b h w c"], x: Float[Array, "b h w c"], sigma: Float[Array, "..."]
) -> Float[Array, "b h w c"]:
    """The clean sample that a prediction of this kind of PREDICTIONS implies; x in variance-exploding coordinates."""
    check_prediction(kind)
    return PARAMETERIZATIONS[kind].to_x0(output, x, per_image(sigma, x))


def make_denoise(network: Network, prediction: str) -> Denoise:
    """Wraps a network so that solvers need not know what it predicts.

    A network with 2 c output channels (learned variance, iDDPM) makes a denoiser that answers (x0, v): v [b h w c]
    in [-1, 1] says where between the two bounds the log-variance lies.

    Raises:
        UserError: the prediction is not among PREDICTIONS.
    """
    check_prediction(prediction)
    c_in, to_clean = PARAMETERIZATIONS[prediction]

    def denoise(x: Float[Array, "b *space c"], sigma: Float[Array, "..."], timestep: Float[Array, "..."]):
        sigma = per_image(sigma, x)
        output = network(x * c_in(sigma), jnp.broadcast_to(timestep, x.shape[:1])).astype(x.dtype)
        channels = x.shape[-1]
        x0 = to_clean(output[..., :channels], x, sigma)
        return x0 if output.shape[-1] == channels else (x0, output[..., channels:])

    return denoise


def check_prediction(kind: str) -> None:
    """Raises a UserError unless `kind` is among PREDICTIONS."""
    if kind not in PREDICTIONS:
        raise unknown("prediction type", kind, PREDICTIONS)
