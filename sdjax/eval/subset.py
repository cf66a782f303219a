"""Some images of many."""

from __future__ import annotations

import numpy as np

from sdjax.data.sources.base import Example, Images


class Evenly:
    """At most `count` images, evenly chosen in their order."""

    def __init__(self, images: Images, count: int):
        """Chooses them."""
        self._images = images
        self._chosen = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Example:
        return self._images[int(self._chosen[index])]

    def id(self, index: int) -> str:
        """The image's name among all."""
        return self._images.id(int(self._chosen[index]))

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the image."""
        return self._images.size(int(self._chosen[index]))
