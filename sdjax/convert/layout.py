"""The networks of a file in the original layout: where each is, of what size, and under which names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from sdjax.convert import sizes
from sdjax.convert.components import FORMATS, Checkpoint
from sdjax.convert.families import FAMILIES, UNET, VAE, Family
from sdjax.convert.original import Piece, clip_pieces, open_clip_pieces, outward, unet_pieces, vae_pieces
from sdjax.convert.rules import stored_shapes
from sdjax.core.errors import UserError

VOCABULARY = 49408  # CLIP's


class Detected(NamedTuple):
    """What a single file was taken for.

    Attributes:
        family: one of `FAMILIES`.
        prediction: "epsilon" or "v_prediction".
        reason: why the prediction is believed to be that.
        in_channels: of the UNet: 4, or 9 for inpainting, 5 for depth, 7 for the upscaler.
    """

    family: str
    prediction: str
    reason: str
    in_channels: int

    def __str__(self) -> str:
        kind = {9: ", inpainting", 5: ", depth"}.get(self.in_channels, "")
        return f"{FAMILIES[self.family].title}{kind}; predicts {self.prediction} ({self.reason})"


class Network(NamedTuple):
    """A network in a file: its component's name, its keys' prefix, its config and where its tensors are."""

    name: str
    prefix: str
    config: Any
    extra: Mapping[str, Any]
    pieces: Mapping[str, Piece]

    @property
    def is_open_clip(self) -> bool:
        """Whether it is a text encoder under OpenCLIP's names."""
        return self.prefix.endswith(".model.")

    def original_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by its whole original key."""
        form = FORMATS[self.name]
        shapes = stored_shapes(form.table(self.config), form.shapes(self.config))
        arrays = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
        return {self.prefix + key: whole.shape for key, whole in outward(self.pieces, arrays).items()}


def _below(shapes: sizes.Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def networks_in(shapes: sizes.Shapes, found: Detected, path: object) -> list[Network]:
    """All networks of a file, with the sizes that its shapes say.

    Raises:
        UserError: a network is missing or is of a structure that is not here.
    """
    family = FAMILIES[found.family]
    side = family.v_size if family.v_size and found.prediction == "v_prediction" else family.size
    vae = vae_in(_below(shapes, VAE), family, VAE, path)
    raw = sizes.unet_config(_below(shapes, UNET), family.heads, path)
    factor = 1 if found.family == "x4_upscaler" else 2 ** (len(vae.config.channels) - 1)
    extra = {**raw, **family.unet, "sample_size": side // factor}
    networks = [_network("unet", UNET, raw, extra, path), vae._replace(extra={**vae.extra, "sample_size": side})]
    for name, prefix in family.prefixes.items():
        below = _below(shapes, prefix)
        is_open, projected = prefix.endswith(".model."), name == "text_encoder_2"
        raw = sizes.open_clip_config(below, projected, path) if is_open else sizes.clip_config(below, path)
        if raw["vocab_size"] != VOCABULARY:
            raise UserError(
                f"{path} has a text encoder of {raw['vocab_size']} tokens; single files hold no tokenizer, so it must "
                f"be CLIP's, of {VOCABULARY}"
            )
        networks.append(_network(name, prefix, raw, raw, path))
    return networks


def vae_in(shapes: sizes.Shapes, family: Family, prefix: str, path: object) -> Network:
    """The autoencoder whose tensors, without `prefix`, have `shapes`.

    Raises:
        UserError: it is no autoencoder of a structure that is here.
    """
    # LDM diffuses the latents of a codebook as they are (scale_factor 1.0 in its configs).
    scale = 1.0 if sizes.CODEBOOK in shapes else family.scaling_factor
    raw = sizes.vae_config(shapes, scale, path)
    return _network("vae", prefix, raw, {**raw, **family.vae}, path)


def _network(name: str, prefix: str, raw: Mapping[str, Any], extra: Mapping[str, Any], path: object) -> Network:
    config = FORMATS[name].from_config(raw, str(path))
    return Network(name, prefix, config, extra, pieces_of(name, prefix, config))


def pieces_of(name: str, prefix: str, config: Any) -> dict[str, Piece]:
    """Where each tensor of a network is, by diffusers' key."""
    keys = stored_shapes(FORMATS[name].table(config), FORMATS[name].shapes(config))
    if name == "unet":
        crossed = tuple(depth > 0 for depth in config.depths)
        return unet_pieces(keys, len(config.channels), config.layers_per_block, crossed)
    if name == "vae":
        return vae_pieces(keys, len(config.channels), config.layers_per_block)
    return open_clip_pieces(keys) if prefix.endswith(".model.") else clip_pieces(keys)


def networks_of(checkpoint: Checkpoint, family: str) -> list[Network]:
    """The networks of a checkpoint, with their own configs."""
    prefixes = {"unet": UNET, "vae": VAE, **FAMILIES[family].prefixes}
    return [
        Network(name, prefixes[name], component.config, {}, pieces_of(name, prefixes[name], component.config))
        for name, component in checkpoint.components.items()
    ]
