"""Calls of networks: with their parameters, and the condition of a diffusion network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
from jaxtyping import Array, Bool, Float, Int

from sdjax.core.tree import Params
from sdjax.models.lora import with_branches


class KeysValues(NamedTuple):
    """Further keys and values of a cross-attention layer, whose queries attend to them apart from the context's."""

    keys: Float[Array, "b n c"]
    values: Float[Array, "b n c"]


class Cond(NamedTuple):
    """The conditions of one batch (the literature's crossattn, adm, concat); a network reads those it was built for.

    Attributes:
        context: tokens for cross-attention ("crossattn").
        mask: which tokens may be attended to; None means all.
        vector: one vector an image, added to the timestep embedding ("adm").
        concat: maps joined to the noisy latents on channels ("concat").
        control: residuals for the skip connections and the middle block (ControlNet), deepest last.
        label: one class an image, e.g. the noise level of an upscaler's low-resolution input.
        guidance: an embedding of the guidance scale that a distilled network imitates (LCM), as
            `sdjax.models.layers.guidance_embedding` makes it.
        images: keys and values of image tokens (IP-Adapter) for each block of a transformer, by the transformer's name.
        features: maps added on the way down (T2I-Adapter), the finest level's first.
    """

    context: Float[Array, "b l d"] | None = None
    mask: Bool[Array, "b l"] | None = None
    vector: Float[Array, "b v"] | None = None
    concat: Float[Array, "b h w c"] | None = None
    control: tuple[Float[Array, "b h w c"], ...] | None = None
    label: Int[Array, " b"] | None = None
    guidance: Float[Array, "b g"] | None = None
    images: Mapping[str, Sequence[KeysValues]] | None = None
    features: Sequence[Float[Array, "b h w c"]] | None = None


def apply(module: nn.Module, params: Params, *inputs: Any, method: str | None = None) -> Any:
    """Output of a module, or of a method of it, and of the LoRA factors in its parameters; no variable changes."""
    with nn.intercept_methods(with_branches):
        return module.apply({"params": params}, *inputs, method=method)
