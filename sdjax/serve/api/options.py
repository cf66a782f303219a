"""The table of options as clients see it, and the images of a request in memory."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.core.errors import UserError
from sdjax.pipeline.options import OPTIONS, Number, Option, Pair, Scales
from sdjax.pipeline.pipeline import Pipeline
from sdjax.pipeline.prepare import defaults
from sdjax.pipeline.usable import usable_options
from sdjax.serve.images import decode_image
from sdjax.serve.limits import IMAGES, LOCAL, Limits

KINDS = {int: "int", float: "float", bool: "bool", Pair: "pair", Scales: "scales"}
JSON = ("layout", "neighbours")
WORD = re.compile(r"\w+")


def describe(pipe: Pipeline) -> dict[str, Any]:
    """Options that a model reads, and what else a form for it needs."""
    chosen = defaults(pipe)
    rows = [as_json(name, chosen.get(name)) for name in usable_options(pipe) if name not in LOCAL]
    controls = sum(name.startswith("controlnet") for name in pipe.params)
    return {
        "inputs": list(pipe.inputs),
        "default_size": list(pipe.default_size),
        "multiple": pipe.model.multiple,
        "options": rows,
        "loras": [lora.name for lora in pipe.loras],
        "controlnets": controls,
        "classes": list(map(str, pipe.settings.get("classes", ()))),
        "preview": True,
    }


def as_json(name: str, default: Any) -> dict[str, Any]:
    """A row of the table."""
    option = OPTIONS[name]
    return {
        "name": name,
        "kind": kind_of(name, option),
        "help": option.help,
        "least": _bound(option.least),
        "most": _bound(option.most),
        "choices": list(option.choices),
        "default": default,
        "many": option.many,
    }


def kind_of(name: str, option: Option) -> str:
    """The kind of value that a request has for an option."""
    if name in IMAGES:
        return "image"
    return "json" if name in JSON else KINDS.get(option.kind, "str")


def with_images(options: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Options of a request with its images in memory.

    Raises:
        UserError: an image cannot be read.
    """
    return {name: None if value is None else _read(name, value, limits) for name, value in options.items()}


def option_of(message: str) -> str | None:
    """The option that an error is about, which its line names first; None where it is about none."""
    return next((word for word in WORD.findall(message) if word in OPTIONS or word in ("prompt", "model")), None)


def _read(name: str, value: Any, limits: Limits) -> Any:
    if name == "neighbours":
        try:
            return np.asarray(value, np.float32)
        except (TypeError, ValueError) as error:
            raise UserError("neighbours: give a list of lists of numbers") from error
    if name not in IMAGES:
        return value
    if isinstance(value, list):
        return [_read(name, one, limits) for one in value]
    if not isinstance(value, str):
        raise UserError(f"{name}: give an image in base64")
    return decode_image(value, name, limits)


def _bound(value: Number) -> Number | None:
    return None if math.isinf(value) else value
