"""Sizes of networks in a config: a row of a table of variants, and what differs from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sdjax.core.errors import unknown
from sdjax.models import added_kv_unet, efficient_unet, unet, unet2d

BACKBONES: Mapping[str, Any] = {**unet.VARIANTS, **unet2d.VARIANTS, **added_kv_unet.VARIANTS, **efficient_unet.VARIANTS}
"""Sizes of denoising networks."""


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


def section_of(sizes: Any, variants: Mapping[str, Any]) -> dict[str, Any]:
    """The shortest section that `sizes_of` reads as these sizes: the nearest row, and what differs from it."""

    def section(name: str) -> dict[str, Any]:
        own, row = vars(sizes), vars(variants[name])
        return {"variant": name, **{field: own[field] for field in own if own[field] != row[field]}}

    return min((section(name) for name, row in variants.items() if type(row) is type(sizes)), key=len)
