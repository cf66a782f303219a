"""BERT's tokenizer, which LDM's text models read: WordPiece over lower-cased words, in a `vocab.txt`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import grain
import numpy as np
from jaxtyping import Int
from tokenizers import BertWordPieceTokenizer

from sdjax.core.errors import UserError
from sdjax.data.transforms import Example

FILE = "vocab.txt"
CLS, SEP, PAD, UNKNOWN = "[CLS]", "[SEP]", "[PAD]", "[UNK]"


@dataclasses.dataclass(frozen=True)
class WordPieces:
    """Text to ids: [CLS], at most `length` - 2 tokens, [SEP], [PAD] up to `length`."""

    backend: BertWordPieceTokenizer
    length: int

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return self.backend.get_vocab_size()

    def encode(self, texts: Sequence[str]) -> Int[np.ndarray, "b l"]:
        """The ids, int32 [b, length]; what does not fit is cut."""
        return np.array([row.ids for row in self.backend.encode_batch(list(texts))], np.int32)


def load_word_pieces(folder: str | Path, length: int) -> WordPieces:
    """The tokenizer in a folder's `vocab.txt`, one token a line.

    Raises:
        UserError: there is none, or it lacks a token that BERT needs.
    """
    path = Path(folder) / FILE
    try:
        tokens = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the tokenizer {path}: {error}") from error
    missing = [token for token in (CLS, SEP, PAD, UNKNOWN) if token not in tokens]
    if missing:
        raise UserError(f"{path} lacks the token {missing[0]}")
    backend = BertWordPieceTokenizer({token: i for i, token in enumerate(tokens)}, lowercase=True)
    backend.enable_truncation(length)
    backend.enable_padding(pad_id=tokens.index(PAD), pad_token=PAD, length=length)
    return WordPieces(backend, length)


def train_word_pieces(texts: Iterable[str], folder: Path, vocab_size: int) -> None:
    """Writes `vocab.txt` into a folder, learned from texts."""
    backend = BertWordPieceTokenizer(lowercase=True)
    backend.train_from_iterator(texts, vocab_size=vocab_size, show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save_model(str(folder))


@dataclasses.dataclass(frozen=True)
class TokenizeWords(grain.transforms.Map):
    """Adds `tokens`, int32 [l], the ids of the example's caption."""

    tokenizer: WordPieces

    def map(self, element: Example) -> Example:
        return {**element, "tokens": self.tokenizer.encode([element["caption"]])[0]}
