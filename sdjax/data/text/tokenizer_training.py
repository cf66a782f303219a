"""Tokenizers learned from texts: CLIP's byte-level BPE, BERT's word pieces and T5's unigrams."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tokenizers import BertWordPieceTokenizer, trainers

from sdjax.core.errors import UserError
from sdjax.core.files import write_text
from sdjax.data.text.sentencepiece import Unigrams
from sdjax.data.text.t5_tokenizer import SPECIALS, UNKNOWN, T5Tokenizer, unigram_backend, write_t5_tokenizer
from sdjax.data.text.tokenizers import BOS, EOS, LENGTH, WORD_END, Tokenizer, load_tokenizer, make_backend


def train_tokenizer(texts: Iterable[str], folder: str | Path, vocab_size: int = 2048) -> Tokenizer:
    """Learns the merges of a byte-level BPE from `texts` and writes a CLIP tokenizer's four files into `folder`.

    As in CLIP, ids are: 256 bytes, the same with `</w>`, the merges in the order learnt, BOS, EOS. So any text has an
    encoding. The vocabulary is smaller than `vocab_size` when the texts hold too few different words.

    Raises:
        UserError: `vocab_size` leaves no room for a merge.
    """
    units = _units()
    room = vocab_size - len(units) - 2
    if room < 1:
        raise UserError(f"vocab_size {vocab_size} is too small: bytes and specials alone take {vocab_size - room}")
    merges = _learn_merges(texts, room)
    tokens = [*units, *("".join(pair) for pair in merges), BOS, EOS]
    # Two different pairs may join to the same token, which then has one id.
    _write(Path(folder), {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges)
    return load_tokenizer(folder)


def _learn_merges(texts: Iterable[str], count: int) -> list[tuple[str, str]]:
    learner = make_backend({}, [], [])
    # The trainer settles ties between pairs by their ids, and numbers characters in the order of a hash table unless it
    # is given them beforehand: so the same texts give the same merges in every process.
    units = _units()
    trainer = trainers.BpeTrainer(
        vocab_size=len(units) + count, special_tokens=units, end_of_word_suffix=WORD_END, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    return [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]


def _write(folder: Path, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
    specials = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "do_lower_case": True, **specials}
    write_text(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    write_text(folder / "merges.txt", "\n".join(lines) + "\n")
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write_text(folder / "special_tokens_map.json", json.dumps(specials, indent=2) + "\n")


def train_word_pieces(texts: Iterable[str], folder: Path, vocab_size: int) -> None:
    """Writes `vocab.txt` into a folder, learned from texts."""
    backend = BertWordPieceTokenizer(lowercase=True)
    backend.train_from_iterator(texts, vocab_size=vocab_size, show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save_model(str(folder))


def train_unigrams(texts: Iterable[str], folder: Path, vocab_size: int) -> None:
    """Writes a T5 tokenizer's two files into a folder, its pieces and their probabilities learned from texts.

    It has no sentinels and replaces no characters. The vocabulary is smaller than `vocab_size` when the texts hold too
    few different words.
    """
    specials = [(token, 0.0) for token in SPECIALS]
    learner = unigram_backend(Unigrams(specials, b""), 1, folder)
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIALS), unk_token=SPECIALS[UNKNOWN], show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    pieces = _same_in_every_process(json.loads(learner.to_str())["model"]["vocab"][len(specials) :])
    write_t5_tokenizer(T5Tokenizer(unigram_backend(Unigrams([*specials, *pieces], b""), 1, folder), 1), folder)


def _same_in_every_process(pieces: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Learned pieces without what the order of a hash table decides.

    That are the last bits of a score, and which of the characters that were not learned is a ten-thousandth less
    probable than which: to what is nearly the least one score is given.
    """
    least = min(score for _, score in pieces) + 0.1
    rounded = [(piece, round(max(score, least), 6)) for piece, score in pieces]
    return sorted(rounded, key=lambda pair: (-pair[1], pair[0]))


def _units() -> list[str]:
    """The alphabet of every text: a printable character for each byte (GPT-2's table), then the same ending a word.

    In the order of CLIP's vocabulary: the bytes that are printable themselves come first.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    return characters + [character + WORD_END for character in characters]
