"""Prompts that are templates: each image's own words."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sdjax.data.text.wildcards import WildcardFolder, fill_template, wildcards_of

if TYPE_CHECKING:
    from sdjax.pipeline.pipeline import Pipeline

SIDES = ("prompt", "negative_prompt")
TEMPLATES = {side: f"{side}_template" for side in SIDES}
"""Names under which a record keeps a prompt as it was written."""

logger = logging.getLogger("sdjax")


def inputs_of_images(
    pipe: Pipeline, entries: Sequence[dict[str, Any]], given: Mapping[str, Any], first: int
) -> list[dict[str, Any]]:
    """Inputs of each image in turn: `num_images` of the first entry, then of the next.

    Words are drawn by the seed, the image's index, and whether the prompt is the negative one. Images of one entry
    without a template share its inputs.

    Raises:
        UserError: as of `WildcardFolder` and `fill_template`.
    """
    images = [entry for entry in entries for _ in range(given.get("num_images", 1))]
    if "syntax" not in pipe.inputs or entries[0]["syntax"] != "a1111":
        return images
    folder = WildcardFolder(given["wildcard_dir"]) if "wildcard_dir" in given else None
    if folder is None:
        _report_wildcards(entries)
    return [_filled(entry, folder, f"{given['seed']} {first + i}") for i, entry in enumerate(images)]


def _filled(entry: dict[str, Any], folder: WildcardFolder | None, seed: str) -> dict[str, Any]:
    changed = {}
    for side, template in TEMPLATES.items():
        text = fill_template(entry[side] or "", folder, f"{seed} {side}")
        if text != (entry[side] or ""):
            changed |= {side: text, template: entry[side]}
    return {**entry, **changed} if changed else entry


def _report_wildcards(entries: Sequence[Mapping[str, Any]]) -> None:
    for text in dict.fromkeys(entry[side] or "" for entry in entries for side in SIDES):
        if names := wildcards_of(text):
            logger.warning("%s in the prompt %.40r is read as words: no wildcard_dir is given", ", ".join(names), text)
