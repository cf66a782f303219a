"""OpenMoji in other colours: drawings whose red, green and blue have changed places, for LoRA and for C-LoRA."""

from __future__ import annotations

import functools
from typing import Any

from sdjax.core.errors import UserError, unknown
from sdjax.data.images import read_image
from sdjax.data.sources.openmoji import HELD_OUT, SIZE, captions, render

STRIDE = 10
FIRST = {"train": 0, HELD_OUT: STRIDE // 2}
"""The first drawing of each split, of which each `STRIDE`th follows; none has a skin tone."""


class RecolouredSource:
    """OpenMoji's images with their channels in another order, and words before their captions.

    `brg` takes red from blue, green from red and blue from green; `brg:in jungle colours` begins every caption so.
    """

    problems = ()

    def __init__(self, rest: str, split: str):
        """Args: `rest` is ORDER or ORDER:WORDS; `split` a key of FIRST.

        Raises:
            UserError: no such split, or no order of r, g and b.
        """
        if split not in FIRST:
            raise unknown("split", split, FIRST, "openmoji_recoloured")
        order, _, self._words = rest.partition(":")
        if sorted(order) != sorted("rgb"):
            raise UserError(f"openmoji_recoloured:{rest}: {order!r} is no order of r, g and b, such as brg")
        self._order = ["rgb".index(channel) for channel in order]
        self._drawings = _drawings()[FIRST[split] :: STRIDE]

    def __len__(self) -> int:
        return len(self._drawings)

    def __getitem__(self, index: int) -> Any:
        stem, caption = self._drawings[index]
        image = read_image(render(stem), self.place(index))[..., self._order]
        return {"image": image, "caption": f"{self._words} {caption}".strip(), "id": stem}

    def id(self, index: int) -> str:
        """The drawing's code points."""
        return self._drawings[index][0]

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the image."""
        del index
        return SIZE, SIZE

    def place(self, index: int) -> str:
        """The drawing."""
        return f"openmoji {self.id(index)}"


@functools.cache
def _drawings() -> list[tuple[str, str]]:
    return [(stem, caption) for stem, caption in captions().items() if "skin tone" not in caption]
