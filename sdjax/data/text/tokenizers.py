"""CLIP's tokenizer: byte-level BPE in `vocab.json` and `merges.txt`.

Text is NFC-normalised, its white space collapsed, lower-cased, and split into words, digits and runs of punctuation;
each piece is then merged by byte-pair encoding with `</w>` at its end (openai/CLIP `simple_tokenizer.py`; Hugging Face
`CLIPTokenizer`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from sdjax.core.errors import UserError
from sdjax.core.untrusted import read_json, read_text
from sdjax.data.text.added_tokens import MAX_TOKENS, joined, read_added

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
SPECIALS = ("bos_token", "eos_token", "pad_token")
LENGTH = 77
SHOWN = 80
WORD_END = "</w>"
PIECES = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


class Placeholder(NamedTuple):
    """A word that stands for vectors of its own (textual inversion), one id each, beyond the vocabulary."""

    word: str
    ids: tuple[int, ...]


class Token(NamedTuple):
    """A token of a text, or a placeholder's ids, which belong together; `start` is where in the text it begins."""

    ids: tuple[int, ...]
    start: int


class Tokenizer(NamedTuple):
    """Text to ids: BOS, at most `length` - 2 tokens, EOS, then `pad` up to `length`."""

    backend: Backend
    bos: int
    eos: int
    pad: int
    length: int
    vocab_size: int
    placeholders: tuple[Placeholder, ...] = ()

    def encode(self, texts: Sequence[str]) -> Int[np.ndarray, "b l"]:
        """The ids, int32 [b, length]; what does not fit is cut (see `truncated`)."""
        rows = [self.row([i for token in self.tokens(text) for i in token.ids][: self.length - 2]) for text in texts]
        return np.array(rows, np.int32).reshape(len(texts), self.length)

    def row(self, ids: Sequence[int]) -> list[int]:
        """At most `length` - 2 ids between BOS and EOS, padded."""
        return [self.bos, *ids, self.eos, *[self.pad] * (self.length - 2 - len(ids))]

    def truncated(self, texts: Sequence[str]) -> list[str]:
        """For each text the end of it that `encode` cuts off, as the user wrote it; "" where all fits."""
        starts = [[token.start for token in self.tokens(text) for _ in token.ids] for text in texts]
        kept = self.length - 2
        return ["" if len(s) <= kept else text[s[kept] :] for text, s in zip(texts, starts, strict=True)]

    def tokens(self, text: str) -> list[Token]:
        """All tokens of a text, without BOS, EOS and pads."""
        tokens, end = [], 0
        for match, ids in _placed(text, self.placeholders):
            tokens += [*self._words(text[end : match.start()], end), Token(ids, match.start())]
            end = match.end()
        return tokens + self._words(text[end:], end)

    def _words(self, text: str, start: int) -> list[Token]:
        encoding = self.backend.encode(text)
        return [Token((i,), start + first) for i, (first, _) in zip(encoding.ids, encoding.offsets, strict=True)]

    @property
    def comma(self) -> int | None:
        """The id of a comma on its own."""
        return self.backend.token_to_id("," + WORD_END)


def with_placeholders(tokenizer: Tokenizer, counts: Mapping[str, int], first: int) -> Tokenizer:
    """The tokenizer that reads each of the given words as as many consecutive ids as the word has vectors.

    A placeholder is found in any case and only as a whole word: "cat-toy" is not in "cat-toys". It goes before the
    vocabulary: a placeholder "cat" takes the word over.

    Args:
        counts: for each word its number of vectors.
        first: the first new id: the rows that the text encoder's embedding table has so far.

    Raises:
        UserError: a word is empty or is a placeholder already, or has no vectors or more than fit in one chunk.
    """
    placeholders = list(tokenizer.placeholders)
    for word, count in counts.items():
        if not word.strip():
            raise UserError("a textual inversion needs a word that stands for it in prompts")
        if word.lower() in {known.word.lower() for known in placeholders}:
            raise UserError(f"there are two textual inversions for the word {word!r}")
        if not 0 < count <= tokenizer.length - 2:
            raise UserError(f"textual inversion {word!r} has {count} vectors; 1 to {tokenizer.length - 2} fit a prompt")
        placeholders.append(Placeholder(word, tuple(range(first, first + count))))
        first += count
    return tokenizer._replace(placeholders=tuple(placeholders))


def _placed(text: str, placeholders: Sequence[Placeholder]) -> Iterator[tuple[re.Match[str], tuple[int, ...]]]:
    """Pattern of the placeholders in a text, the longest word first."""
    if placeholders:
        words = sorted(placeholders, key=lambda known: -len(known.word))
        for match in re.finditer("|".join(f"({_whole(known.word)})" for known in words), text, re.IGNORECASE):
            yield match, words[(match.lastindex or 1) - 1].ids


def _whole(word: str) -> str:
    before = r"(?<!\w)" if re.match(r"\w", word[0]) else ""
    return before + re.escape(word) + (r"(?!\w)" if re.match(r"\w", word[-1]) else "")


def load_tokenizer(folder: str | Path, length: int | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint's folder; `length` overrides the folder's `model_max_length`.

    Words that were added to it are placeholders. The padding token is the folder's own: Stable Diffusion 1 pads with
    EOS, OpenCLIP's models with "!", which is id 0.

    Raises:
        UserError: a file is missing or is not a CLIP tokenizer's.
    """
    folder = Path(folder)
    vocab, merges = _vocabulary(folder)
    config: dict[str, Any] = {}
    for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        config |= read_json(path) if path.exists() else {}
    bos, eos, pad = (_special(config, name, BOS if name == "bos_token" else EOS, folder) for name in SPECIALS)
    for token in (bos, eos, pad):
        if token not in vocab:
            raise UserError(f"the vocabulary in {folder} has no token {token[:SHOWN]!r}")
    said = config.get("model_max_length", LENGTH) if length is None else length
    if isinstance(said, bool) or not isinstance(said, int | float) or not said > 2:
        raise UserError(f"the tokenizer {folder} is for texts of {said!r} tokens; they have 3 at least")
    added = {token: number for token, number in read_added(folder).items() if token not in (bos, eos, pad)}
    return Tokenizer(
        backend=make_backend(vocab, merges, [bos, eos, pad]),
        bos=vocab[bos],
        eos=vocab[eos],
        pad=vocab[pad],
        length=length or int(min(said, LENGTH)),
        vocab_size=max(*vocab.values(), *added.values()) + 1,
        placeholders=tuple(Placeholder(word, ids) for word, ids in joined(added).items()),
    )


def make_backend(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], specials: Sequence[str]) -> Backend:
    """CLIP's normalisation, splitting and byte-pair encoding."""
    model = BPE(vocab=dict(vocab), merges=list(merges), end_of_word_suffix=WORD_END, continuing_subword_prefix="")
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in dict.fromkeys(specials)])
    return backend


def _vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    if (folder / "vocab.json").exists() or not (folder / "tokenizer.json").exists():
        lines = read_text(folder / "merges.txt").splitlines()
        vocab: Any = read_json(folder / "vocab.json")
        pairs: Any = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    else:  # what transformers 5 writes
        model = read_json(folder / "tokenizer.json").get("model")
        vocab, pairs = (model.get("vocab"), model.get("merges", [])) if isinstance(model, dict) else (None, [])
    if not isinstance(vocab, dict) or not is_numbered(vocab):
        raise UserError(f"{folder} holds no CLIP tokenizer: there is no vocabulary of numbered tokens")
    return vocab, [_merge(pair, vocab, folder) for pair in (pairs if isinstance(pairs, list) else [pairs])]


def is_numbered(vocab: Mapping[str, Any]) -> bool:
    """Tell whether every token has a number of its own, and there is one at least."""
    numbers = set(vocab.values()) if all(type(number) is int for number in vocab.values()) else set()
    return 0 < len(vocab) == len(numbers) and min(numbers) >= 0 and max(numbers) < MAX_TOKENS


def _merge(pair: Any, vocab: Mapping[str, int], folder: Path) -> tuple[str, str]:
    parts = pair.split(" ") if isinstance(pair, str) else pair
    whole = isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) for part in parts)
    if not whole or any(token not in vocab for token in (*parts, "".join(parts))):
        said = " ".join(map(str, parts)) if isinstance(parts, list) else str(pair)
        raise UserError(
            f"{folder} does not hold a CLIP tokenizer: the merge {said[:SHOWN]!r} does not fit the vocabulary"
        )
    return parts[0], parts[1]


def _special(config: Mapping[str, Any], name: str, default: str, folder: Path) -> str:
    said = config.get(name)
    token = said.get("content") if isinstance(said, dict) else default if said is None else said
    if not isinstance(token, str):
        raise UserError(f"{name} of the tokenizer {folder} is no text: {str(token)[:SHOWN]!r}")
    return token
