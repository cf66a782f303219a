"""The exact record of an image of this program, each field of which the table of options checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdjax.cli.records import CHUNK
from sdjax.cli.settings.names import SDJAX
from sdjax.cli.settings.settings import Settings, brief
from sdjax.core.errors import UserError
from sdjax.core.untrusted import parse_json
from sdjax.pipeline.options import LOAD_OPTIONS, OPTIONS

# As version 0.1 called them.
RENAMED = {"embedding": "embeddings"}
TEXTS = ("prompt", "model", "checkpoint", *LOAD_OPTIONS)
# What JSON may have for options whose values are more than one thing.
KINDS: dict[str, tuple[type, ...]] = {
    "class_label": (str, int),
    "layout": (str, list),
    "lora_scale": (int, float, list),
}
KINDS |= {name: (str, list) for name, option in OPTIONS.items() if option.many}
KINDS |= {name: (list,) for name, option in LOAD_OPTIONS.items() if option.many}
# Options of a call that makes several images.
FOREIGN = ("num_images", "first_index")


def read(texts: Mapping[str, str], place: str) -> Settings:
    """The record, fields of other versions included.

    Raises:
        UserError: it is damaged.
    """
    record = parse_json(texts[CHUNK].encode(), f"the {CHUNK} text of {place}")
    if not isinstance(record, dict) or "prompt" not in record:
        raise UserError(f"the {CHUNK} text of {place} is damaged: it is no record of an image")
    found = Settings(place, SDJAX)
    for name, value in record.items():
        _put(found, RENAMED.get(str(name), str(name)), value)
    return found


def _put(found: Settings, name: str, value: Any) -> None:
    kinds = KINDS.get(name, ())
    if value is None or (name not in TEXTS and name not in OPTIONS and name != "index"):
        found.values[name] = value
    elif name in FOREIGN:
        found.refused[name] = UserError(f"{name} {brief(value)} in {found.place}: a record is of one image")
    elif not kinds:
        found.put(name, value, exact=True)
    elif isinstance(value, kinds) and not isinstance(value, bool):
        found.values[name] = value
    else:
        known = " or ".join(kind.__name__ for kind in kinds)
        found.refused[name] = UserError(f"{name} {brief(value)!r} in {found.place} is not of type {known}")
