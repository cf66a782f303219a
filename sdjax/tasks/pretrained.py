"""Parameters that a run begins from: read from a source, or drawn for rehearsals without weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from sdjax.checkpoints.checkpoint import Component
from sdjax.checkpoints.layouts.diffusers import read_component
from sdjax.checkpoints.open import read_checkpoint, resolve
from sdjax.core.config import Config
from sdjax.core.errors import UserError
from sdjax.core.prng import stream
from sdjax.core.tree import Params, flatten, unflatten
from sdjax.diffusion_model.model import AUTOENCODER, BACKBONE, DiffusionModel
from sdjax.models.clip import CLIPTextConfig
from sdjax.training.task import DevicePut


def init_component(model: DiffusionModel, name: str, key: PRNGKeyArray) -> Params:
    """Fresh parameters of one component; traceable."""
    if name == BACKBONE:
        return dict(model.backbone.init(key, *model.config.example_inputs())["params"])
    if name == AUTOENCODER:
        assert model.autoencoder is not None, "only latents have one"
        side = model.factor
        return dict(model.autoencoder.init(key, jnp.zeros((1, side, side, 3)), key)["params"])
    return model.conditioner.init(key)[name]


def frozen_source(task: Config) -> tuple[str, str]:
    """Key and source of frozen networks: `task.components`, or else `task.initial`; "" where they are drawn."""
    given = [(key, task[key]) for key in ("components", "initial") if task.get(key)]
    return given[0] if given else ("components", "")


def read_components(
    source: str, model: DiffusionModel, names: Iterable[str], put: DevicePut, key: str, seed: int = 0
) -> Params:
    """Components of a source, every array on the devices as soon as it is read.

    Args:
        source: a Hub id, a diffusers folder, a single file or a finished run's workdir; "" draws them.
        model: whose configs they must have.
        names: e.g. ("vae", "text_encoder").
        put: puts an array onto the devices.
        key: the config's key that holds the source, for messages.
        seed: of what is drawn.

    Raises:
        UserError: they cannot be read, or have other sizes.
    """
    names, wanted = tuple(names), model.configs()
    found = _stored(source, names, put) if source else _drawn(model, names, put, seed)
    for name in names:
        if name not in found:
            raise UserError(f"{key}: {source} has no {name}")
        if not _same(found[name].config, wanted[name]):
            raise UserError(
                f"{key}: the {name} of {source} is {found[name].config}, the config describes {wanted[name]}"
            )
    return {name: dict(found[name].params) for name in names}


def _stored(source: str, names: tuple[str, ...], put: DevicePut) -> Mapping[str, Component]:
    path = resolve(source)
    if path.is_dir():
        # A run's first stage is a folder of a network alone.
        return {name: read_component(_folder(path, name), name, place=put) for name in names}
    # Of a single file every network is read; others than those asked for never reach the devices.
    checkpoint = read_checkpoint(
        path, place=lambda array, at: put(array, at) if at.split("/", 1)[0] in names else array
    )
    return checkpoint.components


def _folder(path: Path, name: str) -> Path:
    """LDM's folders call a first stage with a codebook vqvae."""
    other = path / "vqvae"
    return other if name == AUTOENCODER and not (path / name).is_dir() and other.is_dir() else path / name


def _drawn(model: DiffusionModel, names: Iterable[str], put: DevicePut, seed: int) -> Mapping[str, Component]:
    found, draw = {}, jax.jit(init_component, static_argnums=(0, 1))
    for name in names:
        drawn = draw(model, name, stream(seed, "drawn", name))
        leaves = {at: put(np.asarray(leaf), f"{name}/{at}") for at, leaf in flatten(drawn).items()}
        found[name] = Component(model.configs()[name], unflatten(leaves))
    return found


def _same(found: Any, wanted: Any) -> bool:
    """True if sizes are the same; checkpoints name the end of text in two ways that mean the same."""
    if isinstance(wanted, CLIPTextConfig):
        found = dataclasses.replace(found, eos_token_id=wanted.eos_token_id)
    return found == wanted
