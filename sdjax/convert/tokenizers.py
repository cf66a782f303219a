"""The tokenizers of a checkpoint: CLIP's and BERT's, found, written, and made ready."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from sdjax.convert.components import TOKENIZERS, Checkpoint
from sdjax.core.errors import UserError
from sdjax.data.tokenizers import Tokenizer, load_tokenizer, with_placeholders
from sdjax.data.word_pieces import read_vocabulary, write_vocabulary

TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
VOCABULARIES = (("vocab.json", "merges.txt"), ("tokenizer.json",))
BERT = "bert"


def find_tokenizer(path: Path) -> Path:
    """`path` itself, where it holds a tokenizer of CLIP's.

    Raises:
        UserError: it does not.
    """
    if not any(all((path / file).is_file() for file in files) for files in VOCABULARIES):
        raise UserError(f"{path} holds no tokenizer: neither vocab.json and merges.txt nor tokenizer.json")
    return path


def write_tokenizer(encoder: str, source: Path, target: Path) -> None:
    """Writes the tokenizer of a text encoder into a new folder.

    Raises:
        UserError: `source` holds none.
    """
    if encoder == BERT:
        vocabulary = read_vocabulary(source)
        target.mkdir()
        write_vocabulary(target, vocabulary)
        return
    find_tokenizer(source)
    target.mkdir()
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def check_text_encoders(checkpoint: Checkpoint) -> list[str]:
    """The names of CLIP's text encoders in a checkpoint of prompts.

    Raises:
        UserError: there is none, or one lacks its tokenizer.
    """
    encoders = [name for name in TOKENIZERS if name in checkpoint.components]
    if not encoders:
        raise UserError("the checkpoint has no text encoder")
    for name in encoders:
        if name not in checkpoint.tokenizers:
            raise UserError(f"the checkpoint has a {name} without its {TOKENIZERS[name]}")
    return encoders


def tokenizers_of(checkpoint: Checkpoint) -> tuple[Tokenizer, ...]:
    """The tokenizers of CLIP's text encoders, in their order, which read the checkpoint's placeholders.

    Raises:
        UserError: as `check_text_encoders`; or one cannot be read, or has more tokens than its text encoder.
    """
    found = []
    for name in check_text_encoders(checkpoint):
        folder, config = checkpoint.tokenizers[name], checkpoint.components[name].config
        tokenizer = load_tokenizer(folder, config.max_length)
        first = config.vocab_size - sum(checkpoint.placeholders.values())
        if tokenizer.vocab_size > first:
            raise UserError(f"{folder} has {tokenizer.vocab_size} tokens, the text encoder beside it {first}")
        found.append(with_placeholders(tokenizer, checkpoint.placeholders, first))
    return tuple(found)


def with_word_pieces(checkpoint: Checkpoint, folder: str | Path) -> Checkpoint:
    """The checkpoint with BERT's vocabulary, for a model of words that is stored without.

    Raises:
        UserError: the model reads no words, the folder holds no vocabulary, or a larger one than the model knows.
    """
    folder, kind = Path(folder).expanduser(), checkpoint.conditioning
    if kind != "text_bert":
        problem = "has a tokenizer of its own" if kind == "text" else "reads no words"
        raise UserError(f"tokenizer {str(folder)!r}: a model of {kind} {problem}")
    count = len(read_vocabulary(folder))
    known = checkpoint.components[BERT].config.vocab_size
    if count > known:
        raise UserError(f"tokenizer {str(folder)!r} has {count} tokens; the model knows {known}")
    return dataclasses.replace(checkpoint, tokenizers={BERT: folder})
