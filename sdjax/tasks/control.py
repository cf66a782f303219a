"""Training of a ControlNet beside a model that stays as it is (Zhang et al. 2023).

Reads `config.model.controlnet`, fields of `ControlNetConfig` beside those that follow from the UNet;
config.data.control_from, a maker of hints from the images themselves, "" where the data has conditioning images;
config.task.controlnet, a ControlNet to begin from, "" for a copy of the UNet's encoder.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from sdjax.checkpoints.checkpoint import ReadOptions
from sdjax.checkpoints.controlnets import CONTROLNET, read_controlnet
from sdjax.checkpoints.open import resolve
from sdjax.core.config import Config
from sdjax.core.errors import UserError
from sdjax.core.precision import dtype_named
from sdjax.core.prng import stream
from sdjax.core.tree import Params
from sdjax.data.hints.makers import CONTROL_IMAGE
from sdjax.data.sources.base import CONDITIONING_IMAGE
from sdjax.data.transforms.conditions import MakeHint
from sdjax.diffusion_model.conditioner import Columns, Combined, in_unit_range
from sdjax.diffusion_model.conditioners.control import ControlConditioner
from sdjax.models.controlnet import ControlNetConfig, config_for, trainable_copy
from sdjax.models.unet import UNetConfig
from sdjax.tasks.conditions import TrainingCondition
from sdjax.training.task import DevicePut


def with_control(condition: TrainingCondition, config: Config, factor: int, backbone: Any) -> TrainingCondition:
    """A condition with hints, and with the network that reads them.

    Args:
        condition: of the model.
        factor: pixels of a latent along each side.
        backbone: config of the UNet.

    Raises:
        UserError: no ControlNet fits the backbone, or a field or a maker of hints is unknown.
    """
    if not isinstance(backbone, UNetConfig):
        raise UserError(
            "config.model.controlnet: the backbone attends to no condition; ControlNets are copies of a UNet"
        )
    try:
        sizes = config_for(backbone, factor, **config.model.controlnet)
    except TypeError as error:
        raise UserError(f"config.model.controlnet: {error}") from error
    net = ControlConditioner((sizes,), dtype_named(config.train.dtype, "config.train.dtype"), config.train.remat)
    side = config.data.size

    def columns(batch: Columns) -> Columns:
        return {**condition.columns(batch), CONTROL_IMAGE: in_unit_range(batch[CONDITIONING_IMAGE])}

    return condition._replace(
        conditioner=Combined((condition.conditioner, net)),
        transforms=(*condition.transforms, *hint_makers(config)),
        spec={**condition.spec, CONDITIONING_IMAGE: jax.ShapeDtypeStruct((side, side, 3), np.uint8)},
        columns=columns,
    )


def hint_makers(config: Config) -> list[MakeHint]:
    """Transforms that make the hints of square images; none where the data has them.

    Raises:
        UserError: there is no such maker.
    """
    return [MakeHint(config.data.control_from)] if config.data.control_from else []


def first_weights(config: Config, sizes: ControlNetConfig, unet: Params, put: DevicePut) -> Params:
    """Parameters that a ControlNet begins from: those of `config.task.controlnet`, or a copy of the UNet's encoder.

    Raises:
        UserError: it cannot be read, or has other sizes.
    """
    source = config.task.controlnet
    if not source:
        copied = jax.jit(trainable_copy, static_argnums=0)(sizes, unet, stream(config.train.seed, "drawn", CONTROLNET))
        return jax.tree.map(lambda leaf: leaf.astype(np.float32), copied)
    found = read_controlnet(resolve(source, component=CONTROLNET), ReadOptions(place=put))
    if replace(found.config, zero_hint=sizes.zero_hint) != sizes:
        raise UserError(f"config.task.controlnet: {source} is {found.config}, the base needs {sizes}")
    return dict(found.params)
