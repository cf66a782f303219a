"""BERT's tokenizer, which LDM's text models read: WordPiece over lower-cased words, in a `vocab.txt`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from tokenizers import BertWordPieceTokenizer

from sdjax.core.errors import UserError
from sdjax.core.untrusted import read_json, read_text
from sdjax.data.text.tokenizers import is_numbered

FILE, OTHER_FILE = "vocab.txt", "tokenizer.json"
CLS, SEP, PAD, UNKNOWN = "[CLS]", "[SEP]", "[PAD]", "[UNK]"


@dataclasses.dataclass(frozen=True)
class WordPieces:
    """Text to ids: [CLS], at most `length` - 2 tokens, [SEP], [PAD] up to `length`."""

    backend: BertWordPieceTokenizer
    length: int

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.backend.get_vocab_size()

    def encode(self, texts: Sequence[str]) -> Int[np.ndarray, "b l"]:
        """The ids, int32 [b, length]; what does not fit is cut."""
        return np.array([row.ids for row in self.backend.encode_batch(list(texts))], np.int32)


def load_word_pieces(folder: str | Path, length: int) -> WordPieces:
    """The tokenizer of a folder; a UserError where there is none, or it lacks a token that BERT needs."""
    tokens = read_vocabulary(folder)
    missing = [token for token in (CLS, SEP, PAD, UNKNOWN) if token not in tokens]
    if missing:
        raise UserError(f"the tokenizer {folder} lacks the token {missing[0]}")
    backend = BertWordPieceTokenizer(tokens, lowercase=True)
    backend.enable_truncation(length)
    backend.enable_padding(pad_id=tokens[PAD], pad_token=PAD, length=length)
    return WordPieces(backend, length)


def read_vocabulary(folder: str | Path) -> dict[str, int]:
    """The ids of the tokens in a folder's `vocab.txt`, one token a line, or in what transformers writes since 5.0.

    Raises:
        UserError: neither file can be read.
    """
    path, other = Path(folder) / FILE, Path(folder) / OTHER_FILE
    if path.exists() or not other.exists():
        return {token: i for i, token in enumerate(read_text(path).splitlines())}
    model = read_json(other).get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict) or not is_numbered(vocabulary) or max(vocabulary.values()) >= len(vocabulary):
        raise UserError(f"cannot read the tokenizer {other}: its tokens are not numbered from 0 on")
    return vocabulary


def write_vocabulary(folder: Path, tokens: Mapping[str, int]) -> None:
    """Writes `vocab.txt` into an empty folder."""
    order = sorted(tokens, key=lambda token: tokens[token])
    (folder / FILE).write_text("".join(f"{token}\n" for token in order), encoding="utf-8")
