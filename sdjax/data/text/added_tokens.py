"""Words added to a tokenizer after its training, as textual inversion does, in the files where transformers keeps them.

A word of several vectors is as many tokens: `<cat>`, `<cat>_1`, `<cat>_2` (diffusers, loaders/textual_inversion.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdjax.core.errors import UserError
from sdjax.core.untrusted import read_json

CONFIG, ADDED, WHOLE = "tokenizer_config.json", "added_tokens.json", "tokenizer.json"
DECODER = "added_tokens_decoder"
# How a token that is no special one is found in a text.
FOUND = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": False}
MAX_TOKENS = 2**20  # more than any text encoder has
MAX_ADDED = 10_000  # which are looked for in every prompt
SHOWN = 80


def read_added(folder: Path) -> dict[str, int]:
    """The id of each added token, special ones included.

    Raises:
        UserError: a file is no JSON, or lists something else.
    """
    config, added, whole = (_read(folder / name) for name in (CONFIG, ADDED, WHOLE))
    decoder, listed = config.get(DECODER, {}), whole.get("added_tokens", [])
    if not isinstance(decoder, dict) or not isinstance(listed, list):
        raise UserError(f"{DECODER} or added_tokens of the tokenizer {folder} are no mapping or list")
    tokens = [
        (_field(entry, "content"), int(number) if re.fullmatch("[0-9]{1,9}", number) else -1)
        for number, entry in decoder.items()
    ]
    tokens += [*added.items(), *((_field(entry, "content"), _field(entry, "id")) for entry in listed)]
    if len(tokens) > MAX_ADDED:
        raise UserError(f"the tokenizer {folder} lists {len(tokens)} added tokens; at most {MAX_ADDED} are read")
    for token, number in tokens:
        if not isinstance(token, str) or not token.strip() or type(number) is not int or not 0 <= number < MAX_TOKENS:
            raise UserError(f"the tokenizer {folder} lists as an added token {str((token, number))[:SHOWN]}")
    return dict(tokens)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _field(entry: Any, name: str) -> Any:
    return entry.get(name) if isinstance(entry, dict) else None


def joined(added: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The ids that each word stands for, those of the tokens that continue it after its own."""
    words = {}
    for word, number in added.items():
        words[word] = [number]
        while (more := f"{word}_{len(words[word])}") in added:
            words[word].append(added[more])
    return {word: tuple(numbers) for word, numbers in words.items()}


def apart(words: Iterable[tuple[str, Sequence[int]]]) -> dict[str, int]:
    """The inverse of `joined`: a token for each id of a word."""
    return {f"{word}_{i}" if i else word: number for word, numbers in words for i, number in enumerate(numbers)}


def write_added(folder: Path, added: Mapping[str, int]) -> None:
    """Add tokens to a tokenizer's folder, wherever it lists such."""
    config, whole = _read(folder / CONFIG), _read(folder / WHOLE)
    if DECODER in config:
        entries = {str(number): {"content": token, **FOUND} for token, number in added.items()}
        _write(folder / CONFIG, {**config, DECODER: {**config[DECODER], **entries}})
    if whole:
        entries = [{"id": number, "content": token, **FOUND} for token, number in added.items()]
        _write(folder / WHOLE, {**whole, "added_tokens": [*whole.get("added_tokens", []), *entries]})
    else:
        _write(folder / ADDED, {**_read(folder / ADDED), **added})


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
