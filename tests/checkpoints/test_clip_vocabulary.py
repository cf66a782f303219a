"""CLIP's published vocabulary, as it is shipped for checkpoints that hold none."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import CLIPTokenizer

from sdjax.checkpoints.layouts.original import TOKENIZER_FOLDERS
from sdjax.data.text.tokenizers import load_tokenizer

TEXTS = [
    "a photo of a cat",
    "An astronaut riding a horse, in the style of   Van Gogh!! 4k (trending)",
    "naïve café — 東京タワー 🗼 ﬁ",
    "it's the dog's 2nd day; they'll've gone",
    "",
    "the " * 100,
]


@pytest.mark.parametrize(("name", "pad"), [("clip_l", 49407), ("open_clip", 0)])
def test_ids_are_those_of_transformers(name: str, pad: int):
    ours = load_tokenizer(TOKENIZER_FOLDERS / name)
    theirs = CLIPTokenizer.from_pretrained(TOKENIZER_FOLDERS / name)
    assert (ours.vocab_size, ours.bos, ours.eos, ours.pad, ours.length) == (49408, 49406, 49407, pad, 77)
    assert theirs.pad_token_id == pad
    expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=77).input_ids
    np.testing.assert_array_equal(ours.encode(TEXTS), expected)


def test_ids_are_the_published_ones():
    """As openai/CLIP's `clip.tokenize` gives them."""
    ids = load_tokenizer(TOKENIZER_FOLDERS / "clip_l").encode(["a diagram", "a photo of a cat"])
    assert ids[0, :4].tolist() == [49406, 320, 22697, 49407]
    assert ids[1, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_the_vocabulary_is_numbered_as_clip_numbers_it():
    vocab = json.loads((TOKENIZER_FOLDERS / "clip_l" / "vocab.json").read_text(encoding="utf-8"))
    merges = (TOKENIZER_FOLDERS / "clip_l" / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert len(merges) == 48_894
    assert sorted(vocab.values()) == list(range(49_408))
    assert all(vocab[merge.replace(" ", "")] == 512 + i for i, merge in enumerate(merges))
    assert [vocab[token] for token in ("!", "a</w>", "<|startoftext|>", "<|endoftext|>")] == [0, 320, 49406, 49407]
