"""Hints of networks of which a model may have several: ControlNets and T2I-Adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sdjax.core.errors import UserError
from sdjax.data.image_inputs import size_of


class Hinted(NamedTuple):
    """Networks that read a hint each.

    Attributes:
        option: by which they are loaded, for messages.
        image: the option of their hints.
        count: of the networks.
    """

    option: str
    image: str
    count: int

    def each(self, name: str, given: Any) -> list[Any]:
        """A value for each network, of one for all or a list; of hints one each.

        Raises:
            UserError: there are not as many.
        """
        values = list(given) if isinstance(given, list | tuple) else [given]
        values = values * self.count if len(values) == 1 and name != self.image else values
        if len(values) != self.count:
            wanted = f"{self.count} in {self.option}"
            raise UserError(f"{len(values)} entries in {name} for {wanted}; give one for each, in order")
        return values

    def numbers(self, name: str, given: Any) -> list[float]:
        """A number for each network.

        Raises:
            UserError: there are not as many, or one is a pair.
        """
        values = self.each(name, given)
        if (pair := next((value for value in values if isinstance(value, list | tuple)), None)) is not None:
            raise UserError(f"{name} {pair}: choose a number for each of {self.option}")
        return values

    def image_size(self, inputs: Mapping[str, Any], multiple: int) -> tuple[int, int] | None:
        """The largest part of the first hint with sides of `multiple`, where no image to begin from says the size.

        Raises:
            UserError: there are not as many hints, or the first cannot be read.
        """
        given = inputs.get(self.image)
        if given is None or inputs.get("init_image") is not None:
            return None
        height, width = size_of(self.each(self.image, given)[0], self.image)
        return max(height // multiple, 1) * multiple, max(width // multiple, 1) * multiple
