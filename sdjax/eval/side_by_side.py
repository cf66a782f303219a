"""A static page on which a person compares two models' images of the same prompts without knowing whose they are.

Two questions a prompt, as Imagen's raters had them (Saharia et al. 2022, section 4.3): alignment and fidelity. Answers
stay in the browser's storage, and can be downloaded as JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sdjax.core.files import write_text

TEMPLATE = Path(__file__).with_name("side_by_side.html")
PLACE = "{{data}}"


class Pair(NamedTuple):
    """A prompt; `sides` are files of images by the first and by the second model, relative to the page."""

    prompt: str
    category: str
    sides: list[list[str]]


def write_page(path: Path, pairs: Sequence[Pair], models: Sequence[tuple[str, str]], seed: int) -> None:
    """Write the page.

    Args:
        models: the two models' short names, which answers have, and what they are.
        seed: of which model stands on the left, drawn for each prompt.
    """
    left = np.random.default_rng(seed).integers(0, 2, len(pairs))
    rows = [{**pair._asdict(), "left": int(side)} for pair, side in zip(pairs, left, strict=True)]
    data = {"models": [{"name": name, "source": source} for name, source in models], "seed": seed, "pairs": rows}
    data["key"] = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]  # answers are those to these pairs
    # Within <script> only "<" could end the data.
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    write_text(path, TEMPLATE.read_text(encoding="utf-8").replace(PLACE, text))
