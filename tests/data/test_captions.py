"""Captions beside diffusers' pipelines of DeepFloyd IF, with ftfy and Beautiful Soup."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from sdjax.data.text.captions import read_caption

CLEANED = json.loads((Path(__file__).parent / "cleaned_captions.json").read_text())
"""By tests/reference/cleaned_captions.py."""
LONG = ["a", "a.", "a.com", "<", "&#", "\"'", " \n", "1x"]


@pytest.mark.parametrize(("caption", "cleaned"), CLEANED)
def test_cleaned_as_by_diffusers(caption: str, cleaned: str):
    assert read_caption(caption) == cleaned


@pytest.mark.parametrize("piece", LONG)
def test_long_captions_take_seconds_at_most(piece: str):
    begun = time.process_time()
    read_caption(piece * 100_000)
    assert time.process_time() - begun < 10
