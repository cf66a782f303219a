"""Prior preservation (DreamBooth; Ruiz et al. 2023, section 3.3): images of the class keep what the model knows of it.

Reads of config.data, where `class_folder` is not "":

class_folder   images of the class; what is missing of `class_images` is generated (`sdjax.tasks.class_images`)
class_prompt   of all of them
class_images   the least that there are

Every row of a batch is an image and one of the class: n rows are 2 n images for the networks, every second of which is
the class's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sdjax.core.config import Config
from sdjax.data.loader import Transform
from sdjax.data.sources.base import Source
from sdjax.data.sources.open import PairedSource

PRIOR = "prior_"
"""Beginning of the names of the class's columns."""


def has_prior(config: Config) -> bool:
    """True for a run with images of a class."""
    return bool(config.data.get("class_folder", ""))


def class_config(config: Config) -> Config:
    """The config whose images are those of the class."""
    config = config.copy_and_resolve_references()
    config.data.update(source=f"pictures:{config.data.class_folder}", prompt=config.data.class_prompt)
    return config


def paired(config: Config, rows: Callable[[Config], Source]) -> Source:
    """The rows of a config, each with one of the class beside it where there is one."""
    own = rows(config)
    return PairedSource(own, rows(class_config(config)), PRIOR) if has_prior(config) else own


def for_both(config: Config, transforms: Sequence[Transform]) -> list[Transform]:
    """Transforms of an image, and the same of the class's beside it where there is one."""
    return [*transforms, *(OfPrior(transform) for transform in transforms if has_prior(config))]


def of_both(config: Config, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of a row, with those of the class where there is one."""
    return {**spec, **({f"{PRIOR}{name}": column for name, column in spec.items()} if has_prior(config) else {})}


@dataclasses.dataclass(frozen=True)
class OfPrior(grain.transforms.RandomMap):
    """A transform of the entries whose names begin with `PRIOR`."""

    transform: Any

    def random_map(self, element: Mapping[str, Any], rng: np.random.Generator) -> Mapping[str, Any]:
        own = {name.removeprefix(PRIOR): value for name, value in element.items() if name.startswith(PRIOR)}
        is_random = isinstance(self.transform, grain.transforms.RandomMap)
        changed = self.transform.random_map(own, rng) if is_random else self.transform.map(own)
        return {**element, **{f"{PRIOR}{name}": value for name, value in changed.items()}}


def interleaved(batch: Mapping[str, Array]) -> dict[str, Array]:
    """A batch of n rows as one of 2 n images where they have a class's: every device keeps its own rows."""
    own = {name: column for name, column in batch.items() if not name.startswith(PRIOR)}
    if len(own) == len(batch):
        return own
    pairs = {name: jnp.stack([column, batch[f"{PRIOR}{name}"]], axis=1) for name, column in own.items()}
    return {name: pair.reshape(-1, *pair.shape[2:]) for name, pair in pairs.items()}
