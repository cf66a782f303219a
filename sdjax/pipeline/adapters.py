"""Adapters as users name them, to patches of a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from sdjax.checkpoints.adapters import read_ip_adapter, read_t2i_adapter
from sdjax.checkpoints.checkpoint import Checkpoint, Patch, ReadOptions
from sdjax.checkpoints.layouts.diffusers import read_component
from sdjax.checkpoints.networks import clip_image
from sdjax.checkpoints.open import CONFIG, resolve
from sdjax.core.errors import UserError
from sdjax.core.tree import numbered
from sdjax.core.untrusted import read_json
from sdjax.diffusion_model.conditioners import TEXT, t2i_adapter
from sdjax.diffusion_model.conditioners.ip_adapter import ADAPTER, ENCODER
from sdjax.diffusion_model.model import AUTOENCODER, BACKBONE
from sdjax.models.clip_image import CLIPImageConfig
from sdjax.models.ip_adapter import IPAdapterConfig
from sdjax.models.unet import UNetConfig

WEIGHTS = "model.safetensors"
FOLDERS = "image_encoder", "../models/image_encoder"
"""Places of image encoders from an adapter's file; h94/IP-Adapter has that of SDXL's vit-h files in the second."""


def add_ip_adapter(source: str | Path, encoder: str | Path | None, how: ReadOptions) -> Patch:
    """An IP-Adapter with the image encoder that it was trained with.

    Args:
        source: a local file or one of the Hub, e.g. "h94/IP-Adapter/models/ip-adapter_sd15.bin".
        encoder: a folder of CLIP's, local or of the Hub; None for the one that is found beside the file.

    Raises:
        UserError: by the patch, where a file cannot be read or does not fit, or there is no image encoder.
    """

    def patch(checkpoint: Checkpoint) -> Checkpoint:
        unet = _unet_for("IP-Adapter", ADAPTER, source, checkpoint)
        adapter = read_ip_adapter(resolve(source), unet, how)
        tower = read_component(find_encoder(source, encoder, adapter.config), ENCODER, how.dtype, place=how.place)
        return checkpoint.replace_component(ADAPTER, adapter).replace_component(ENCODER, tower)

    return patch


def add_t2i_adapters(sources: Sequence[str | Path], how: ReadOptions) -> Patch:
    """T2I-Adapters, whose features add up: folders of diffusers', or files, local or of the Hub.

    Raises:
        UserError: by the patch, where one cannot be read or is for another UNet.
    """

    def patch(checkpoint: Checkpoint) -> Checkpoint:
        for number, source in enumerate(sources):
            unet = _unet_for("T2I-Adapter", t2i_adapter.ADAPTER, source, checkpoint)
            factor = checkpoint.components[AUTOENCODER].config.factor
            adapter = read_t2i_adapter(resolve(source, component=t2i_adapter.ADAPTER), how)
            found, wanted = adapter.config.places, [(width, side * factor) for width, side in unet.adapted]
            if list(found) != wanted[: len(found)]:
                said = [", ".join(f"{width} at 1/{side}" for width, side in each) for each in (found, wanted)]
                raise UserError(f"t2i_adapter {str(source)!r} is for another UNet: it gives {said[0]}, not {said[1]}")
            checkpoint = checkpoint.replace_component(numbered(t2i_adapter.ADAPTER, number), adapter)
        return checkpoint

    return patch


def find_encoder(source: str | Path, given: str | Path | None, adapter: IPAdapterConfig) -> Path:
    """The folder, or a file in one, of the image encoder whose outputs an adapter reads.

    Raises:
        UserError: the given one has others, or none is found.
    """
    if given is not None:
        found = resolve(given, component=ENCODER)
        config = (found if found.is_dir() else found.parent) / CONFIG
        width = width_of(clip_image.from_config(read_json(config), str(config)), adapter)
        if width != adapter.image_dim:
            raise UserError(f"image_encoder {str(given)!r} gives {width} features; {source} reads {adapter.image_dim}")
        return found
    failed: UserError | None = None
    for file in _beside(source):
        try:
            config = resolve(file(CONFIG))
        except UserError as error:  # not there, or not to be downloaded
            failed = error
            continue
        if width_of(clip_image.from_config(read_json(config), str(config)), adapter) == adapter.image_dim:
            if not os.path.exists(file("")):  # of the Hub, which has given its config.json alone
                resolve(file(WEIGHTS))
            return config.parent
    reason = "" if failed is None else f" ({failed})"
    raise UserError(
        f"there is no image encoder of {adapter.image_dim} features for {source}: neither {FOLDERS[0]} beside it nor "
        f"{FOLDERS[1]} is one{reason}; give its folder as image_encoder"
    ) from failed


def width_of(encoder: CLIPImageConfig, adapter: IPAdapterConfig) -> int:
    """Features of what an adapter reads of an encoder."""
    return encoder.projection_dim if adapter.resampler is None else encoder.width


def _unet_for(kind: str, option: str, source: str | Path, checkpoint: Checkpoint) -> UNetConfig:
    """Sizes of the UNet that an adapter acts on; a UserError where the model is none of Stable Diffusion's."""
    unet = checkpoint.components[BACKBONE].config
    if not isinstance(unet, UNetConfig) or checkpoint.conditioning != TEXT:
        raise UserError(f"{option} {str(source)!r}: {kind}s are for models of Stable Diffusion's")
    return unet


def _beside(source: str | Path) -> Iterator[Callable[[str], str]]:
    """Names of files in each of FOLDERS, of the Hub where the source is."""
    text, at, revision = (str(source), "", "") if os.path.exists(source) else str(source).partition("@")
    for folder in FOLDERS:
        place = os.path.normpath(PurePosixPath(text).parent / folder)
        yield lambda file, place=place: f"{os.path.join(place, file)}{at}{revision}"
