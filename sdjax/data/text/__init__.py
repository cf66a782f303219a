"""Tokenizers, prompt syntax, textual inversion, bounding boxes as tokens."""
