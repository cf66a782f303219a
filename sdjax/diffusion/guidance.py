"""Guidance of a network's raw prediction, and thresholds for the clean sample.

The combination of classifier-free guidance is the same for epsilon, v and x0 at one (x, sigma); the rescaling is not,
so both act where PyTorch diffusers has them: on the raw prediction, below `make_denoise`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sdjax.diffusion.denoise import Denoise, Guided, Network, parts, per_image

NetworkPair = Callable[
    [Float[Array, "b *space c"], Float[Array, " b"]], tuple[Float[Array, "b *space d"], Float[Array, "b *space d"]]
]
"""pair(x_vp, timestep) -> (conditional, unconditional) raw predictions."""

Scalar = float | Float[Array | np.ndarray, ""] | Float[Array | np.ndarray, " b"]
"""One value for all images, or one an image; may be traced."""


def classifier_free(
    cond: Float[Array, "b *space c"], null: Float[Array, "b *space c"], scale: Scalar
) -> Float[Array, "b *space c"]:
    """null + scale (cond - null): scale 1 is no guidance (Ho & Salimans 2022, eq. 6 with w = scale - 1)."""
    return null + per_image(scale, cond) * (cond - null)


def composed(
    conds: Float[Array, "b m *space c"], null: Float[Array, "b *space c"], weights: Float[Array | np.ndarray, "b m"]
) -> Float[Array, "b *space c"]:
    """null + sum_i w_i (cond_i - null): guidance of it adds up that of every condition (Liu et al. 2022, eq. 11)."""
    return null + jnp.sum(per_image(weights, conds) * (conds - null[:, None]), axis=1)


def rescale_guidance(
    guided_output: Float[Array, "b *space c"], cond: Float[Array, "b *space c"], phi: Scalar
) -> Float[Array, "b *space c"]:
    """To the share phi, gives each image the conditional prediction's standard deviation (Lin et al. 2024, eq. 15)."""
    axes, phi = tuple(range(1, cond.ndim)), per_image(phi, cond)
    deviation = jnp.std(guided_output, axis=axes, keepdims=True)
    ratio = jnp.std(cond, axis=axes, keepdims=True) / jnp.maximum(deviation, jnp.finfo(deviation.dtype).tiny)
    return guided_output * (phi * ratio + (1.0 - phi))


def guided(pair: NetworkPair, scale: Scalar, rescale: Scalar = 0.0) -> Network:
    """A network whose prediction is guided; scale and rescale may be traced, so that changing them compiles nothing.

    Channels beyond those of x (a learned variance) are the conditional network's own (diffusers, DeepFloyd IF).

    Args:
        pair: pair(x_vp, timestep) -> (conditional, unconditional).
        scale: guidance scale, 1 for none.
        rescale: phi of `rescale_guidance`, 0 for none.
    """

    def network(x: Float[Array, "b *space c"], timestep: Float[Array, " b"]) -> Float[Array, "b *space d"]:
        cond, null = (output.astype(x.dtype) for output in pair(x, timestep))
        channels = x.shape[-1]
        mean = classifier_free(cond[..., :channels], null[..., :channels], scale)
        mean = rescale_guidance(mean, cond[..., :channels], rescale)
        return jnp.concatenate([mean, cond[..., channels:]], axis=-1)

    return network


LogProbability = Callable[[Float[Array, "b h w c"], Float[Array, " b"]], Float[Array, " b"]]
"""log_probability(x_vp, timestep) -> log p(y | x_t) of each image, y being whatever is asked for."""


def classifier_guided(denoise: Denoise, log_probability: LogProbability, scale: Scalar) -> Denoise:
    """A denoiser that is drawn to what a classifier recognises (Dhariwal & Nichol 2021).

    DDPM moves the mean of a step by its variance times s grad log p(y | x_t) (algorithm 1); every other sampler takes
    epsilon - sqrt(1 - abar) s grad log p(y | x_t) (algorithm 2, for DDIM). x0 is clipped before, and not again. At
    timestep 0 the learned variance is ADM's, whose fixed ones are smaller there; both are next to nothing.

    Args:
        denoise, log_probability: of the network, guided or not, and of the classifier, which is differentiated.
        scale: s, 0 for none; may be traced.
    """

    def total(x_vp: Array, timestep: Array) -> Array:
        return log_probability(x_vp, jnp.broadcast_to(timestep, x_vp.shape[:1])).astype(jnp.float32).sum()

    def guided_denoise(x: Float[Array, "b h w c"], sigma: Float[Array, "..."], timestep: Float[Array, "..."]):
        x_vp = x / jnp.sqrt(per_image(sigma, x) ** 2 + 1.0)
        gradient = per_image(scale, x) * jax.grad(total)(x_vp, timestep)
        x0, v, others = parts(denoise(x, sigma, timestep))
        return Guided(x0, v, gradient if others is None else gradient + others)

    return guided_denoise


Likelihood = Callable[[Float[Array, "b h w c"]], Float[Array, " b"]]
"""likelihood(x0) -> log p(y | x0) of each image."""


def image_guided(denoise: Denoise, likelihood: Likelihood, scale: Scalar) -> Denoise:
    """A denoiser that is drawn to what a given image makes likely (LDM, appendix C, eq. 15 and 16).

    The classifier of noisy images is here the likelihood of the clean ones that the network itself estimates, so
    the gradient goes through the network.

    Args:
        denoise, likelihood: of the network, guided or not, and of what is asked for, differentiable.
        scale: s, 0 for none; may be traced.
    """

    def guided_denoise(x: Float[Array, "b h w c"], sigma: Float[Array, "..."], timestep: Float[Array, "..."]):
        def total(x: Array) -> tuple[Array, Any]:
            answer = denoise(x, sigma, timestep)
            x0 = answer[0] if isinstance(answer, tuple) else answer
            return likelihood(x0).astype(jnp.float32).sum(), answer

        gradient, answer = jax.grad(total, has_aux=True)(x)
        # x0 = x - sigma epsilon; with respect to x_vp the gradient is sqrt(sigma^2 + 1) times as long.
        moved = per_image(scale, x) * per_image(sigma, x) ** 2 * gradient
        if isinstance(answer, Guided):
            return answer._replace(x0=answer.x0 + moved)
        return (answer[0] + moved, answer[1]) if isinstance(answer, tuple) else answer + moved

    return guided_denoise


def static_threshold(x0: Float[Array, "b *space c"], limit: Scalar = 1.0) -> Float[Array, "b *space c"]:
    """Clips to [-limit, limit]."""
    limit = per_image(limit, x0)
    return jnp.clip(x0, -limit, limit)


def dynamic_threshold(
    x0: Float[Array, "b *space c"], ratio: Scalar = 0.995, sample_max_value: Scalar = 1.0
) -> Float[Array, "b *space c"]:
    """Clips each image to the quantile s of its own |x0| and divides by s (Imagen, section 2.3).

    s is held in [1, sample_max_value] as in diffusers, whose default of 1 makes it a static threshold.
    """
    magnitudes = jnp.abs(x0).reshape(x0.shape[0], -1)
    ratios = jnp.broadcast_to(ratio, x0.shape[:1])
    limit = per_image(jnp.clip(jax.vmap(jnp.quantile)(magnitudes, ratios), 1.0, sample_max_value), x0)
    return jnp.clip(x0, -limit, limit) / limit
