"""Classes: a learned token for cross-attention (LDM, section 4.4, table 3), or the backbone's own embedding (ADM)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PRNGKeyArray

from sdjax.core.errors import UserError, unknown
from sdjax.core.tree import Params
from sdjax.diffusion_model.conditioner import Columns, Conditioner, Host, Traits, required
from sdjax.models.conditioning import Cond, apply
from sdjax.models.embedders import ClassEmbedder, ClassEmbedderConfig

EMBEDDER, LABEL = "class_embedder", "label"


@dataclass(frozen=True)
class ClassConditioner(Conditioner):
    """`label`, int32 [b], as one token for cross-attention.

    Attributes:
        config: of the embedder.
        null_class: label of the null condition; None where the model was trained without condition dropout.
    """

    config: ClassEmbedderConfig = field(default_factory=ClassEmbedderConfig)
    null_class: int | None = None

    @property
    def traits(self) -> Traits:
        return Traits(("class_label",), context_width=self.config.width, has_null=self.null_class is not None)

    @property
    def components(self) -> dict[str, Any]:
        return {EMBEDDER: self.config}

    @property
    def settings(self) -> dict[str, Any]:
        return {"none": self.null_class}

    def init(self, key: PRNGKeyArray) -> Params:
        return {EMBEDDER: dict(ClassEmbedder(self.config).init(key, jnp.zeros(1, jnp.int32))["params"])}

    def encode(self, inputs: Mapping[str, Any], host: Host) -> dict[str, Any]:
        classes = self.config.classes if self.null_class is None else self.null_class
        return {LABEL: np.int32(class_number(required(inputs, "class_label", host.name), classes, host))}

    def cond(self, params: Params, columns: Columns, keys: Key[Array, " b"] | None = None) -> Cond:
        return Cond(context=apply(ClassEmbedder(self.config), params[EMBEDDER], jnp.asarray(columns[LABEL])))

    def null(self, columns: Columns) -> Columns | None:
        if self.null_class is None:
            return None
        return {**columns, LABEL: jnp.full_like(jnp.asarray(columns[LABEL]), self.null_class)}


@dataclass(frozen=True)
class BackboneClassConditioner(Conditioner):
    """`label`, int32 [b], for a backbone that adds an embedding of it to the timestep's.

    Attributes:
        classes: of the backbone.
    """

    classes: int = 1000

    @property
    def traits(self) -> Traits:
        return Traits(("class_label",))

    def encode(self, inputs: Mapping[str, Any], host: Host) -> dict[str, Any]:
        return {LABEL: np.int32(class_number(required(inputs, "class_label", host.name), self.classes, host))}

    def cond(self, params: Params, columns: Columns, keys: Key[Array, " b"] | None = None) -> Cond:
        return Cond(label=jnp.asarray(columns[LABEL]))


def class_number(value: Any, classes: int, host: Host, place: str = "class_label") -> int:
    """Number of a class, given by it or by its name in `host.settings["classes"]`; a UserError without such a class."""
    names = list(host.settings.get("classes", ()))
    if value in names:
        return names.index(value)
    count = len(names) or classes
    number = str(value)
    if not number.isdecimal():
        raise unknown("class", value, names or (f"0 to {count - 1}",), place)
    if not int(number) < count:
        raise UserError(f"{place} {value}: {host.name} has the classes 0 to {count - 1}")
    return int(number)
