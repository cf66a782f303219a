"""ADM's files (openai/guided-diffusion `256x256_diffusion.pt`, `256x256_classifier.pt`): keys without a prefix.

Which of the models it is follows from its levels; the number of heads, the order of their queries, keys and values, and
the noise schedule, which no file says, are those of the flags in the repository's README.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdjax.convert import adm_classifier, unet2d
from sdjax.convert.components import Checkpoint, Component, Dtypes, Reading, read_params
from sdjax.convert.model_index import pixel_conditioning
from sdjax.convert.rules import Placer
from sdjax.convert.single_file import shapes_of
from sdjax.convert.sizes import Heads, unet2d_config
from sdjax.convert.weights import Source, read_file
from sdjax.core.errors import UserError, unknown
from sdjax.models.adm_classifier import VARIANTS
from sdjax.models.unet2d import UNet2DConfig

FIRST, POOL = "input_blocks.0.0.weight", "out.2.positional_embedding"


class ADMFamily(NamedTuple):
    """What ADM's files do not say.

    Attributes:
        size: of the pictures.
        levels: of the UNet, by which with `layers`, its residual blocks at each, a file is known.
        heads: of every level.
        schedule: diffusers' name of the noise schedule.
        new_order: of queries, keys and values: those of all heads together, or of each head.
    """

    size: int
    levels: int
    heads: Heads
    layers: int = 2
    schedule: str = "linear"
    new_order: bool = False

    @property
    def scheduler(self) -> dict[str, Any]:
        """Its scheduler_config.json."""
        return {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": 1000,
            "beta_schedule": self.schedule,
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "prediction_type": "epsilon",
            "variance_type": "learned_range",
            "clip_sample": True,
            "timestep_spacing": "linspace",  # of `timestep_respacing` 250; for "ddim25" give the schedule "leading"
        }


ADM_FAMILIES = {
    "adm_64": ADMFamily(64, 4, Heads(), 3, "squaredcos_cap_v2", new_order=True),
    "adm_128": ADMFamily(128, 5, Heads(4)),
    "adm_256": ADMFamily(256, 6, Heads()),
    "adm_512": ADMFamily(512, 7, Heads()),
}


def is_adm_file(source: Source) -> bool:
    """Whether a file holds a UNet or a classifier of ADM's; of a safetensors file only the header is read.

    Raises:
        UserError: it cannot be read.
    """
    tensors = read_file(source).tensors
    return {FIRST, "time_embed.0.weight", "middle_block.1.qkv.weight"} <= set(tensors)


def is_adm_classifier(source: Source) -> bool:
    """Whether a file holds a classifier of ADM's."""
    return is_adm_file(source) and POOL in read_file(source).tensors


def read_adm_file(
    source: Source, dtype: Dtypes = "float32", *, family: str | None = None, place: Placer | None = None
) -> Checkpoint:
    """Reads a UNet; `.pt` through torch's restricted loader.

    Args:
        family: one of `ADM_FAMILIES`; None to find out.
        place: as in `sdjax.convert.folder.read_folder`.

    Raises:
        UserError: the file is missing or corrupt, or holds no such UNet, lacks keys or has others.
    """
    if family is not None and family not in ADM_FAMILIES:
        raise unknown("family", family, ADM_FAMILIES)
    tensors, path = _arrays(source)
    found = unet2d_config(shapes_of(tensors), Heads(), path)
    row = ADM_FAMILIES[family or _family(found, path)]
    conditioning = pixel_conditioning(found, path)
    config = dataclasses.replace(found, heads=tuple(map(row.heads.of, found.channels)))
    renamed = unet2d.from_original(tensors, config, new_order=row.new_order)
    params = read_params("unet", config, renamed, path, Reading(dtype, place))
    unet = Component(config, params, {"sample_size": row.size})
    return Checkpoint(components={"unet": unet}, scheduler=row.scheduler, conditioning=conditioning)


def _family(config: UNet2DConfig, path: object) -> str:
    """The published model that has such a UNet."""
    structure = (config.scale_shift, config.resblock_updown, config.in_channels, config.out_channels)
    for name, row in ADM_FAMILIES.items():
        if structure == (True, True, 3, 6) and (len(config.channels), config.layers_per_block) == (
            row.levels,
            row.layers,
        ):
            return name
    raise UserError(
        f"{path} has a UNet of {len(config.channels)} levels of {config.layers_per_block} blocks, {config.in_channels} "
        f"channels in and {config.out_channels} out, which is none of ADM's ({', '.join(ADM_FAMILIES)}); give the "
        "family whose heads and noise schedule it has"
    )


def read_adm_classifier(source: Source, dtype: Dtypes = "float32", place: Placer | None = None) -> Component:
    """Reads one of the four published classifiers, known by the number of its blocks.

    Raises:
        UserError: the file is missing or corrupt, or holds none of them.
    """
    tensors, path = _arrays(source)
    blocks = {key.split(".")[1] for key in tensors if key.startswith("input_blocks.")}
    known = {len(row.encoder.channels) * (row.encoder.layers_per_block + 1): row for row in VARIANTS.values()}
    config = known.get(len(blocks))
    if config is None:
        raise UserError(f"{path} is none of ADM's classifiers ({', '.join(VARIANTS)}): it has {len(blocks)} blocks")
    renamed = adm_classifier.from_original(tensors, config)
    return Component(config, read_params("classifier", config, renamed, path, Reading(dtype, place)))


def _arrays(source: Source) -> tuple[Mapping[str, np.ndarray], Path]:
    stored = read_file(source)
    return {key: np.asarray(tensor) for key, tensor in stored.tensors.items()}, stored.path
