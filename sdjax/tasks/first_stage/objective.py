"""The objective of LDM's autoencoders: reconstruction, regularisation, and a discriminator that is trained beside them.

CompVis/latent-diffusion, ldm/modules/losses/contperceptual.py and vqperceptual.py. Two networks learn by one gradient
of one sum: the autoencoder's terms hold the discriminator fixed, and the discriminator's hold the image fixed. Both
take their step from the same state, where the original's discriminator sees the autoencoder after its step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sdjax.training.task import Metrics

MOST = 1e4  # of the adversarial weight, before `Adversary.weight`
EPS = 1e-4
LOGGED = ("g_loss", "d_loss", "d_weight", "logits_real", "logits_fake")

Images = Float[Array, "b h w 3"]
Judge = Callable[[Any, Images], Float[Array, "b h2 w2 1"]]
"""(the discriminator's parameters, images) -> logits."""


def hinge(real: Array, fake: Array) -> Float[Array, ""]:
    """Hinge loss of logits: real ones above 1, false ones below -1."""
    return 0.5 * (jax.nn.relu(1.0 - real).mean() + jax.nn.relu(1.0 + fake).mean())


def vanilla(real: Array, fake: Array) -> Float[Array, ""]:
    """The cross entropy of logits (Goodfellow et al. 2014), halved as in the original."""
    return 0.5 * (jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean())


CRITERIA = {"hinge": hinge, "vanilla": vanilla}


class Adversary(NamedTuple):
    """Settings of the discriminator.

    Attributes:
        judge: the discriminator.
        criterion: what it descends: a value of `CRITERIA`.
        weight: of what it thinks of reconstructions, beside the ratio of gradients.
        start: the first step (counted from 0) at which either network feels the other.
        most: the largest ratio of gradients.
    """

    judge: Judge
    criterion: Callable[[Array, Array], Float[Array, ""]]
    weight: float
    start: int
    most: float = MOST


def reconstruction(
    error: Float[Array, "b h w 3"], perceptual: Float[Array, " b"] | None, logvar: Float[Array, ""] | float
) -> Float[Array, ""]:
    """The mean over all values of (error + LPIPS) / exp(logvar) + logvar.

    Args:
        error: |x - x̂|, or its square.
        perceptual: of each image, weighted; joins the error of all of its values.
        logvar: of the observation; 0 where it is not learned.
    """
    if perceptual is not None:
        error = error + perceptual[:, None, None, None]
    return (error / jnp.exp(logvar) + logvar).mean()


def adversarial(
    adversary: Adversary,
    params: Any,
    x: Images,
    made: Images,
    likelihood: Callable[[Images], Float[Array, ""]],
    at_last_layer: Callable[[Images], Array],
    step: Int[Array, ""],
) -> tuple[Float[Array, ""], Metrics]:
    """The reconstruction loss with both networks' adversarial terms, and what to log.

    Each term's gradient with respect to the image is computed once, for its weight and for the descent. Until the
    discriminator's start it costs nothing, and zeros are logged of it.

    Args:
        params: the discriminator's.
        x: images.
        made: their reconstructions.
        likelihood: `reconstruction`, of the reconstructed image.
        at_last_layer: a gradient with respect to the reconstruction -> that of the decoder's last kernel.
        step: optimiser steps taken so far.
    """

    def together() -> tuple[Float[Array, ""], Metrics]:
        fixed = jax.lax.stop_gradient(params)
        nll, nll_pull = jax.value_and_grad(likelihood)(made)
        doubt, doubt_pull = jax.value_and_grad(lambda y: -adversary.judge(fixed, y).mean())(made)
        ratio = _norm(at_last_layer(nll_pull)) / (_norm(at_last_layer(doubt_pull)) + EPS)
        weight = adversary.weight * jnp.clip(jax.lax.stop_gradient(ratio), 0.0, adversary.most)
        loss = with_gradient(nll + weight * doubt, made, nll_pull + weight * doubt_pull)
        real, fake = adversary.judge(params, x), adversary.judge(params, jax.lax.stop_gradient(made))
        judged = adversary.criterion(real, fake)
        return loss + judged, dict(zip(LOGGED, (doubt, judged, weight, real.mean(), fake.mean()), strict=True))

    def alone() -> tuple[Float[Array, ""], Metrics]:
        return likelihood(made), {name: jnp.zeros(()) for name in LOGGED}

    return jax.lax.cond(step >= adversary.start, together, alone)


def with_gradient(value: Float[Array, ""], x: Array, gradient: Array) -> Float[Array, ""]:
    """`value`, whose gradient with respect to x is known already."""
    pulled = (x * jax.lax.stop_gradient(gradient)).sum()
    return jax.lax.stop_gradient(value - pulled) + pulled


def _norm(x: Array) -> Float[Array, ""]:
    return jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum())
