"""Conditions made of captions, objects and the image itself, as transforms of a data loader."""

from __future__ import annotations

import dataclasses

import grain
import numpy as np

from sdjax.core.errors import UserError
from sdjax.data.hints.makers import INPAINT, hint_maker
from sdjax.data.sources.base import CONDITIONING_IMAGE
from sdjax.data.text.box_tokens import WHOLE, LayoutTokens
from sdjax.data.text.captions import read_caption
from sdjax.data.text.t5_tokenizer import T5Tokenizer
from sdjax.data.text.tokenizers import Tokenizer
from sdjax.data.text.word_pieces import WordPieces
from sdjax.data.transforms.images import Example


@dataclasses.dataclass(frozen=True)
class Draw(grain.transforms.RandomMap):
    """Draws `name` from the example's `several`, anew each time that the example is read; without them it stays."""

    name: str
    several: str

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        if self.several not in element:
            return element
        values = element[self.several]
        return {**element, self.name: values[int(rng.integers(len(values)))]}


DRAW_CAPTION = Draw("caption", "captions")


@dataclasses.dataclass(frozen=True)
class CleanCaption(grain.transforms.Map):
    """The example with its caption as T5 reads it."""

    def map(self, element: Example) -> Example:
        return {**element, "caption": read_caption(element["caption"])}


@dataclasses.dataclass(frozen=True)
class TokenizeWords(grain.transforms.Map):
    """Adds `tokens`, int32 [l], the ids of the example's caption."""

    tokenizer: WordPieces | Tokenizer | T5Tokenizer

    def map(self, element: Example) -> Example:
        return {**element, "tokens": self.tokenizer.encode([element["caption"]])[0]}


@dataclasses.dataclass(frozen=True)
class Tokenize(grain.transforms.Map):
    """Adds `tokens`, int32 [e l], the ids of the example's caption by each of e tokenizers."""

    tokenizers: tuple[Tokenizer, ...]

    def map(self, element: Example) -> Example:
        ids = [tokenizer.encode([element["caption"]])[0] for tokenizer in self.tokenizers]
        return {**element, "tokens": np.stack(ids)}


@dataclasses.dataclass(frozen=True)
class Layout(grain.transforms.RandomMap):
    """Adds `tokens`, those of the example's `objects` and `boxes` in a random order."""

    tokens: LayoutTokens

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        order = rng.permutation(len(element["objects"]))[: self.tokens.objects]
        tokens = self.tokens.encode(element["objects"][order], element["boxes"][order], element.get("crop", WHOLE))
        return {**element, "tokens": tokens}


@dataclasses.dataclass(frozen=True)
class MakeHint(grain.transforms.Map):
    """Adds `conditioning_image`, made of the image as it was cropped.

    Attributes:
        name: a key of `hints.makers.HINTS`, with numbers or without.

    Raises:
        UserError: there is none of this name, or it needs a mask.
    """

    name: str

    def __post_init__(self) -> None:
        hint_maker(self.name)
        if self.name == INPAINT:
            raise UserError(f"config.data.control_from={INPAINT!r} needs masks, which the data has not")

    def map(self, element: Example) -> Example:
        return {**element, CONDITIONING_IMAGE: hint_maker(self.name)(element["image"])}
