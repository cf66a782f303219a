"""Small files that anybody may have written, and one reader of JSON for all of them: bounded, errors in one line.

Python's own reader takes what others refuse or read in another way: a key twice, UTF-16, half a surrogate pair, NaN,
lists within lists to the end of the stack. What is made of a file here takes at most 32 times its bytes.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from sdjax.core.errors import UserError

MAX_BYTES = 2**25  # of a file; the largest that are published, tokenizers, have a few million
MAX_YAML = 2**17  # bytes, which take a second; a model's config has 3,000
MAX_DEPTH = 32
MAX_DIGITS = 40  # transformers writes 10**30 where there is no limit
SHOWN = 80
# What PyYAML raises for a value that does not fit its tag, beside its own errors.
BROKEN_YAML = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError)
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def check_ordinary(path: str | Path) -> int:
    """The size of a file in bytes.

    Raises:
        UserError: it is missing or no ordinary file: a pipe would be waited for, and a device has no end.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # a name with a null character is a ValueError
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"cannot read {path}: it is no ordinary file")
    return found.st_size


def read_bytes(path: str | Path, most: int = MAX_BYTES) -> bytes:
    """The content of a file.

    Raises:
        UserError: as `check_ordinary`; or it has more than `most` bytes.
    """
    size = check_ordinary(path)
    if size > most:
        raise UserError(f"{path} has {size} bytes; such files have at most {most}")
    try:
        with open(path, "rb") as file:
            return file.read(most)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def read_text(path: str | Path, most: int = MAX_BYTES) -> str:
    """The content of a file in UTF-8, with the mark at its beginning that some editors write or without.

    Raises:
        UserError: as `read_bytes`; or it is not UTF-8.
    """
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: {error}") from error


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        UserError: as `read_bytes` and `parse_json`; or it holds something else.
    """
    content = parse_json(read_bytes(path), path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def parse_json(data: bytes, place: object) -> Any:
    """The value that JSON in UTF-8 stands for. Infinity is read, as diffusers writes it; NaN is not.

    Args:
        place: of the data, for messages.

    Raises:
        UserError: it is not JSON, has a key twice or half a surrogate pair, or is nested too deeply.
    """
    try:
        text = data.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_unique, parse_int=_integer, parse_constant=_constant)
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # fails where one stands alone
        _check_depth(value)
    except RecursionError as error:
        raise UserError(f"{place} is not JSON that is read: it is nested more than {MAX_DEPTH} levels deep") from error
    except ValueError as error:
        raise UserError(f"{place} is not JSON: {error}") from error
    return value


def read_yaml(path: str | Path) -> Any:
    """The value of a YAML file without aliases, of which a few lines can stand for any number of values.

    Raises:
        UserError: as `read_text`; or it is not YAML, has aliases, or more than MAX_YAML bytes.
    """
    text = read_text(path, MAX_YAML)
    try:
        return yaml.load(text, _WithoutAliases)  # a SafeLoader
    except (*BROKEN_YAML, yaml.YAMLError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from error


class _WithoutAliases(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases, which are not read")
        return super().compose_node(parent, index)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (again, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {again[:SHOWN]!r} is there twice")
    return found


def _integer(digits: str) -> int | float:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits) if digits != "-0" else -0.0  # which is no integer


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no value")
    return float(name)


def _check_depth(value: Any) -> None:
    level = [[value]]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for outer in level for inner in _containers(outer)]
    if level:
        raise RecursionError


def _containers(outer: Any) -> list[Any]:
    return [one for one in (outer.values() if isinstance(outer, dict) else outer) if isinstance(one, dict | list)]
