"""Captions as DeepFloyd IF reads them."""

from __future__ import annotations


def read_caption(caption: str) -> str:
    """The caption in lower case without white space at its ends."""
    return caption.lower().strip()
