"""T5's tokenizer: SentencePiece's unigrams, in a `tokenizer.json` or a `spiece.model`."""

from __future__ import annotations

PAD, EOS, UNKNOWN = 0, 1, 2
"""Ids of the tokens that every T5 has."""
