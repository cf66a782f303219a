"""T5's tokenizer: SentencePiece's unigrams, in a `tokenizer.json` or a `spiece.model`.

White space is collapsed, and each word, which begins with "▁", split into the pieces whose product of probabilities is
the largest (Kudo 2018). Case counts.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import Unigram

from sdjax.core.errors import UserError
from sdjax.core.files import write_text
from sdjax.core.untrusted import read_json
from sdjax.data.text.sentencepiece import Unigrams, check_unigrams, read_sentencepiece

PAD, EOS, UNKNOWN = 0, 1, 2
SPECIALS = ("<pad>", "</s>", "<unk>")
"""The first tokens of every T5, by their ids."""
SENTINELS = [f"<extra_id_{i}>" for i in reversed(range(100))]
"""The last tokens of the published vocabularies, which a spiece.model leaves out."""
FILE, OTHER_FILE = "tokenizer.json", "spiece.model"


@dataclasses.dataclass(frozen=True)
class T5Tokenizer:
    """Text to ids: at most `length` - 1 tokens, the end of text, pads up to `length`."""

    backend: Backend
    length: int

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.backend.get_vocab_size()

    def encode(self, texts: Sequence[str]) -> Int[np.ndarray, "b l"]:
        """The ids, int32 [b, length]; what does not fit is cut (see `truncated`)."""
        return np.array([row.ids for row in self.backend.encode_batch(list(texts))], np.int32)

    def truncated(self, text: str) -> str:
        """The end of a text that `encode` cuts off; "" where all fits."""
        further = self.backend.encode(text).overflowing
        return text[further[0].offsets[0][0] :] if further else ""


def load_t5_tokenizer(folder: str | Path, length: int) -> T5Tokenizer:
    """The tokenizer of a folder, which holds a tokenizer.json or a spiece.model.

    Raises:
        UserError: it holds neither, or one that is not T5's.
    """
    folder = Path(folder)
    path, other = folder / FILE, folder / OTHER_FILE
    if not path.exists() and not other.exists():
        raise UserError(f"{folder} holds no tokenizer of T5's: neither {FILE} nor {OTHER_FILE}")
    found = check_unigrams(_from_json(path) if path.exists() else _from_model(other), folder)
    return T5Tokenizer(unigram_backend(found, length, folder), length)


def unigram_backend(found: Unigrams, length: int, place: object) -> Backend:
    """T5's normalisation, splitting and ends, by the tokenizers library.

    Raises:
        UserError: the vocabulary does not begin as T5's does.
    """
    first = tuple(piece for piece, _ in found.pieces[: len(SPECIALS)])
    if first != SPECIALS:
        raise UserError(f"the tokenizer {place} is not T5's, whose first tokens are {', '.join(SPECIALS)}")
    backend = Backend(Unigram(found.pieces, unk_id=UNKNOWN, byte_fallback=False))
    if found.charsmap:
        backend.normalizer = normalizers.Precompiled(found.charsmap)
    words = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {SPECIALS[EOS]}", special_tokens=[(SPECIALS[EOS], EOS)]
    )
    known = {piece for piece, _ in found.pieces}
    specials = [*SPECIALS, *(token for token in SENTINELS if token in known)]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    backend.enable_truncation(length)
    backend.enable_padding(pad_id=PAD, pad_token=SPECIALS[PAD], length=length)
    return backend


def write_t5_tokenizer(tokenizer: T5Tokenizer, folder: Path) -> None:
    """Writes a tokenizer.json, which transformers reads without SentencePiece, and its config."""
    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.no_truncation()
    backend.no_padding()
    sentinels = sum(backend.token_to_id(token) is not None for token in SENTINELS)
    names = dict(zip(("pad_token", "eos_token", "unk_token"), SPECIALS, strict=True))
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": sentinels, **names}
    write_text(folder / FILE, backend.to_str() + "\n")
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def _from_model(path: Path) -> Unigrams:
    found = read_sentencepiece(path)
    known = {piece for piece, _ in found.pieces}
    return found._replace(pieces=[*found.pieces, *((token, 0.0) for token in SENTINELS if token not in known)])


def _from_json(path: Path) -> Unigrams:
    content = read_json(path)
    model = content.get("model")
    pieces = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(pieces, list) or not all(map(_is_piece, pieces)):
        raise UserError(f"{path} holds no tokenizer of T5's: its vocabulary is no list of tokens and their scores")
    return Unigrams([(piece, float(score)) for piece, score in pieces], _charsmap(content.get("normalizer"), path))


def _is_piece(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and type(entry[1]) in (int, float)


def _charsmap(normalizer: Any, path: Path) -> bytes:
    """The table of a normaliser, or of one of a sequence of them; b"" for none."""
    several = normalizer.get("normalizers") if isinstance(normalizer, dict) else None
    for one in several if isinstance(several, list) else [normalizer]:
        if isinstance(one, dict) and one.get("precompiled_charsmap"):
            try:
                return base64.b64decode(one["precompiled_charsmap"], validate=True)
            except (TypeError, ValueError) as error:
                raise UserError(f"{path} has a table of characters that is not in base64") from error
    return b""
