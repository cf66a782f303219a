"""Latents that are kept in memory, with the tokens of every caption of their images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sdjax.data.transforms.conditions import Draw
from sdjax.diffusion_model.conditioner import Conditioner
from sdjax.tasks.conditions import TrainingCondition
from sdjax.tasks.latents import TOKENS, caption_tokens


class Letters:
    """A tokenizer of words of two letters."""

    def encode(self, prompts):
        return np.array([[ord(letter) for letter in prompt] for prompt in prompts], np.int32)


def test_each_image_keeps_the_tokens_of_its_captions():
    condition = TrainingCondition(
        Conditioner(), tokenizers={"text_encoder": Path()}, loaded={"text_encoder": Letters()}
    )
    found = caption_tokens(condition, [("ab",), ("cd", "ef", "gh"), ("ij",)])
    texts = [["".join(map(chr, row)) for row in tokens[:, 0]] for tokens in found]
    assert texts == [["ab"], ["cd", "ef", "gh"], ["ij"]]
    rng = np.random.default_rng(0)
    drawn = [Draw(TOKENS, TOKENS).random_map({TOKENS: found[1]}, rng)[TOKENS] for _ in range(30)]
    assert {tokens.shape for tokens in drawn} == {(1, 2)}
    assert {chr(tokens[0, 0]) for tokens in drawn} == set("ceg")
