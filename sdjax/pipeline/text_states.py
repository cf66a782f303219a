"""States of texts, kept for the images that follow: a text encoder may be larger than the network that it serves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

MOST = 128  # of T5's XXL and 77 tokens in float32, 160 MB


class TextStates:
    """States by token ids, on the host; those that were not asked for longest go first."""

    def __init__(self) -> None:
        self._kept: dict[bytes, np.ndarray] = {}

    def get(
        self, tokens: Int[np.ndarray, " l"], encode: Callable[[np.ndarray], np.ndarray]
    ) -> Float[np.ndarray, "l d"]:
        """The states of a text, by `encode` where they are not kept."""
        key = tokens.tobytes()
        states = self._kept.pop(key) if key in self._kept else encode(tokens)
        self._kept[key] = states
        if len(self._kept) > MOST:
            del self._kept[next(iter(self._kept))]
        return states
