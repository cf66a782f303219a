"""Conditions that are tokens: a transformer that learns with the UNet, which attends to its states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from sdjax.core.tree import Params
from sdjax.models.apply import apply
from sdjax.models.bert import Bert, BertConfig
from sdjax.models.conditioning import Cond
from sdjax.tasks.ldm.conditioner import Columns, Conditioner

BERT, TOKENS = "bert", "tokens"


@dataclass(frozen=True)
class TokenConditioner(Conditioner):
    """`tokens`, int32 [b l].

    Attributes:
        bert: sizes of the transformer.
        nothing: the tokens that say nothing; () where there is no guidance.
    """

    bert: BertConfig = field(default_factory=BertConfig)
    nothing: tuple[int, ...] = ()

    @property
    def components(self) -> dict[str, Any]:
        return {BERT: self.bert}

    @property
    def settings(self) -> dict[str, Any]:
        return {"nothing": list(self.nothing)}

    @property
    def context_width(self) -> int:
        return self.bert.width

    def init(self, key: PRNGKeyArray) -> Params:
        return {BERT: dict(Bert(self.bert).init(key, jnp.zeros((1, self.bert.max_length), jnp.int32))["params"])}

    def cond(self, params: Params, columns: Columns) -> Cond:
        return Cond(context=apply(Bert(self.bert), params[BERT], jnp.asarray(columns[TOKENS])))

    def silent(self, columns: Columns) -> Columns | None:
        if not self.nothing:
            return None
        tokens = jnp.broadcast_to(np.array(self.nothing, np.int32), columns[TOKENS].shape)
        return {**columns, TOKENS: tokens}


def conditioner_of(sizes: Mapping[str, Any], settings: Mapping[str, Any]) -> TokenConditioner:
    """Of a stored model."""
    return TokenConditioner(sizes[BERT], tuple(settings.get("nothing", ())))
