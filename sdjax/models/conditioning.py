"""What a diffusion network may be told besides the noisy picture: the literature's crossattn, adm and concat."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int


class Cond(NamedTuple):
    """The conditions of one batch; a network reads those it was built for.

    Attributes:
        context: tokens for cross-attention ("crossattn").
        mask: which tokens may be attended to; None means all.
        vector: one vector a picture, added to the timestep embedding ("adm").
        concat: maps joined to the noisy latents on channels ("concat").
        control: residuals for the skip connections and the middle block (ControlNet), deepest last.
        label: one class a picture, e.g. the noise level of an upscaler's low-resolution input.
        guidance: an embedding of the guidance scale that a distilled network imitates (LCM), as
            `sdjax.models.layers.guidance_embedding` makes it.
    """

    context: Float[Array, "b l d"] | None = None
    mask: Bool[Array, "b l"] | None = None
    vector: Float[Array, "b v"] | None = None
    concat: Float[Array, "b h w c"] | None = None
    control: tuple[Float[Array, "b h w c"], ...] | None = None
    label: Int[Array, " b"] | None = None
    guidance: Float[Array, "b g"] | None = None
