"""Some pictures of many."""

from __future__ import annotations

import numpy as np

from sdjax.data.sources.base import Example, Pictures


class Evenly:
    """At most `count` pictures, evenly chosen in their order."""

    def __init__(self, pictures: Pictures, count: int):
        """Chooses them."""
        self._pictures = pictures
        self._chosen = np.linspace(0, len(pictures) - 1, min(count, len(pictures))).astype(int)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Example:
        return self._pictures[int(self._chosen[index])]

    def id(self, index: int) -> str:
        """The picture's name among all."""
        return self._pictures.id(int(self._chosen[index]))

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the picture."""
        return self._pictures.size(int(self._chosen[index]))
