"""What a command line asks for, picture by picture, and which of them one call can make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sdjax.pipeline.prompt_files import PromptLine

# What differs between the pictures of one call.
OF_A_PICTURE = ("prompt", "negative_prompt")


class Order(NamedTuple):
    """One picture.

    Attributes:
        number: its place among all, which names its file.
        index: with the seed it decides the noise; the cells of a grid share it.
        prompt: what to paint.
        options: further keyword arguments of `paint`.
    """

    number: int
    index: int
    prompt: str
    options: Mapping[str, Any]


def list_orders(
    lines: Sequence[PromptLine], common: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], first_index: int
) -> list[Order]:
    """All pictures, numbered by prompt, image and cell, in the order in which they are best made: cell by cell.

    Args:
        lines: prompts, whose own settings win over the common ones.
        common: settings; num_images says how many images each prompt has.
        cells: of a grid, whose settings win over all; one empty one without a grid.
        first_index: of the first image.
    """
    images = [line for line in lines for _ in range(_images(line, common))]
    orders = []
    for cell, changed in enumerate(cells):
        for i, line in enumerate(images):
            options = {**common, **line.overrides, **changed}
            options.pop("num_images", None)
            number = first_index + i * len(cells) + cell
            orders.append(Order(number, first_index + i, line.prompt, options))
    return orders


def _images(line: PromptLine, common: Mapping[str, Any]) -> int:
    return int(line.overrides.get("num_images", common.get("num_images") or 1))


def groups(orders: Sequence[Order]) -> Iterator[list[Order]]:
    """Runs of orders that one call can make: equal settings but for the prompts, and indices without a gap."""
    group: list[Order] = []
    for order in orders:
        if group and (_settings(order) != _settings(group[-1]) or order.index != group[-1].index + 1):
            yield group
            group = []
        group.append(order)
    if group:
        yield group


def _settings(order: Order) -> dict[str, Any]:
    return {name: value for name, value in order.options.items() if name not in OF_A_PICTURE}
