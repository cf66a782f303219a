"""Sizes of networks in a config: a row of a table of variants, and what differs from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sdjax.core.errors import unknown


def sizes_of(section: Mapping[str, Any], variants: Mapping[str, Any], place: str) -> Any:
    """A row of a table of sizes, with the fields that the config gives in place of the row's own.

    Args:
        section: "variant", and any field of the sizes.
        variants: of a module of `sdjax.models`.
        place: the section's name, for messages.

    Raises:
        UserError: no such variant or field.
    """
    given = dict(section)
    variant = given.pop("variant")
    if variant not in variants:
        raise unknown("variant", variant, variants, f"{place}.variant")
    fields = {field.name for field in dataclasses.fields(variants[variant])}
    for name in given:
        if name not in fields:
            raise unknown("size", name, fields, place)
    return dataclasses.replace(variants[variant], **given)
