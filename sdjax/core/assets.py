"""Files that are part of the package: tokenizers, and weights of a metric."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"
