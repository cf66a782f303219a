"""The random numbers of a call, of JAX's generator or in the order in which PyTorch diffusers draws on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sdjax.core.torch_rng import TorchGenerator
from sdjax.diffusion.samplers import Table


class Noises(NamedTuple):
    """Noise given from outside, one row an image; None where the image's own key decides.

    Attributes:
        first: standard normal noise of the latents.
        picture: of an upscaler's low-resolution picture.
        steps: of every network call.
    """

    first: Float[np.ndarray, "n h w z"] | None = None
    picture: Float[np.ndarray, "n p q 3"] | None = None
    steps: Float[np.ndarray, "n r h w z"] | None = None


class Draws(NamedTuple):
    """What a call of diffusers draws before its first step, in this order.

    Attributes:
        picture: (h, w, 3) of an upscaler's low-resolution picture; None for other models.
        posteriors: how many given pictures are encoded, each of which draws from its posterior.
        masked: how many are encoded a second time, masked, after the noise of the latents.
    """

    picture: tuple[int, int, int] | None
    posteriors: int
    masked: int


def torch_noises(
    seed: int, images: range, batch: int, shape: tuple[int, int, int], tables: Sequence[Table], draws: Draws
) -> list[Noises]:
    """What `torch.Generator("cpu").manual_seed(seed)` gives diffusers for one batch, one `Noises` a table.

    Draws from a posterior are left out of use: its mean is taken, whose difference is far below a byte.

    Args:
        seed: of the generator.
        images: indices of those that are wanted.
        batch: how many images the batch has, from 0 on.
        shape: (h, w, z) of the latents.
        tables: of the models that one after the other draw from the generator; rows that add noise each draw.
        draws: what comes before.
    """
    generator = TorchGenerator(seed)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        h, w, c = shape
        return generator.normal((batch, c, h, w)).transpose(0, 2, 3, 1)[images.start : images.stop]

    def skip(count: int) -> None:
        h, w, c = shape
        if count:
            generator.normal((count, c, h, w))

    picture = None if draws.picture is None else draw(draws.picture)
    skip(draws.posteriors)
    first = draw(shape)
    skip(draws.masked)
    steps = [_steps(table, lambda: draw(shape), (len(images), *shape)) for table in tables]
    return [Noises(first, picture, steps[0]), *(Noises(steps=own) for own in steps[1:])]


def _steps(table: Table, draw: Callable[[], np.ndarray], shape: tuple[int, ...]) -> np.ndarray | None:
    noisy = table.active & np.any(table.weights[..., -1] != 0.0, axis=-1)
    if not noisy.any():
        return None
    steps = np.zeros((shape[0], len(noisy), *shape[1:]), np.float32)
    for row in np.flatnonzero(noisy):
        steps[:, row] = draw()
    return steps
