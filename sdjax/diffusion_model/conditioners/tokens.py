"""Tokens through a transformer that is trained with the backbone: LDM's text and layout models (section 4.3.1, D.4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PRNGKeyArray

from sdjax.core.errors import UserError
from sdjax.core.tree import Params
from sdjax.core.untrusted import parse_json, read_bytes
from sdjax.data.text.box_tokens import LayoutTokens
from sdjax.diffusion_model.conditioner import Columns, Conditioner, Host, Traits, required
from sdjax.diffusion_model.conditioners.class_label import class_number
from sdjax.models.bert import Bert, BertConfig
from sdjax.models.conditioning import Cond, apply

BERT, TOKENS = "bert", "tokens"


@dataclass(frozen=True)
class TokenConditioner(Conditioner):
    """`tokens`, int32 [b l].

    Attributes:
        bert: sizes of the transformer.
        null_tokens: tokens of the null condition; () where the model was trained without condition dropout.
    """

    bert: BertConfig = field(default_factory=BertConfig)
    null_tokens: tuple[int, ...] = ()

    @property
    def traits(self) -> Traits:
        return Traits(context_width=self.bert.width, has_null=bool(self.null_tokens))

    @property
    def components(self) -> dict[str, Any]:
        return {BERT: self.bert}

    @property
    def settings(self) -> dict[str, Any]:
        return {"nothing": list(self.null_tokens)}

    def init(self, key: PRNGKeyArray) -> Params:
        return {BERT: dict(Bert(self.bert).init(key, jnp.zeros((1, self.bert.max_length), jnp.int32))["params"])}

    def cond(self, params: Params, columns: Columns, keys: Key[Array, " b"] | None = None) -> Cond:
        return Cond(context=apply(Bert(self.bert), params[BERT], jnp.asarray(columns[TOKENS])))

    def null(self, columns: Columns) -> Columns | None:
        if not self.null_tokens:
            return None
        tokens = jnp.broadcast_to(np.array(self.null_tokens, np.int32), columns[TOKENS].shape)
        return {**columns, TOKENS: tokens}


@dataclass(frozen=True)
class BertTextConditioner(TokenConditioner):
    """Captions in BERT's word pieces."""

    @property
    def traits(self) -> Traits:
        return super().traits._replace(required=("prompt",), optional=("negative_prompt",))

    def encode(self, inputs: Mapping[str, Any], host: Host) -> dict[str, Any]:
        if BERT not in host.tokenizers:
            raise UserError(f"{host.name} has no tokenizer; give the folder with BERT's vocab.txt")
        prompt, negative = inputs["prompt"], inputs.get("negative_prompt")
        columns = {TOKENS: host.tokenizers[BERT].encode([prompt])[0]}
        if negative:
            columns["negative_tokens"] = host.tokenizers[BERT].encode([negative])[0]
        return columns

    def null(self, columns: Columns) -> Columns | None:
        if "negative_tokens" in columns:
            return {**columns, TOKENS: columns["negative_tokens"]}
        return super().null(columns)


@dataclass(frozen=True)
class LayoutConditioner(TokenConditioner):
    """Objects in bounding boxes.

    Attributes:
        classes: of objects.
    """

    classes: int = 1

    @property
    def traits(self) -> Traits:
        return super().traits._replace(required=("layout",))

    def encode(self, inputs: Mapping[str, Any], host: Host) -> dict[str, Any]:
        layout = required(inputs, "layout", host.name)
        objects = parse_json(read_bytes(layout), layout) if isinstance(layout, str | Path) else list(layout)
        try:
            if not isinstance(objects, list) or not all(isinstance(one, Mapping) for one in objects):
                raise TypeError("not objects")
            # In float64: a corner half way between two points of the grid must fall as its decimals do.
            boxes = np.array([one["box"] for one in objects], np.float64).reshape(-1, 4)
            classes = [one["class"] for one in objects]
        except (KeyError, TypeError, ValueError) as error:
            form = 'a list of {"class": ..., "box": [x, y, width, height]}'
            raise UserError(f"layout: {form} is needed") from error
        labels = [class_number(one, self.classes, host, "layout") for one in classes]
        return {TOKENS: layout_tokens(self.bert, self.classes).encode(labels, boxes)}


def layout_tokens(sizes: BertConfig, classes: int) -> LayoutTokens:
    """Vocabulary of layouts for a transformer; a UserError unless its length is three tokens an object and two more."""
    objects, rest = divmod(sizes.max_length - 2, 3)
    if rest or objects < 1:
        raise UserError(f"config.model.bert.max_length={sizes.max_length}; choose 3 times the objects, and 2 more")
    return LayoutTokens(classes, sizes.vocab_size, objects)
