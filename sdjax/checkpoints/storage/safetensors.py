"""Safetensors files, read defensively and written atomically.

The format (huggingface/safetensors, README): eight bytes with the header's length, little-endian; the header, JSON from
names to {"dtype", "shape", "data_offsets"}; then the data, without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from sdjax.checkpoints.mapping import Writable, finite
from sdjax.checkpoints.storage import stored
from sdjax.checkpoints.storage.stored import MAX_RANK, MAX_SIZE, StoredTensor, is_size
from sdjax.core.errors import UserError
from sdjax.core.files import atomic_write, recover, write_text
from sdjax.core.untrusted import parse_json, read_json

NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
NAMES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
NAMES |= {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
DTYPES = {code: stored.DTYPES[name] for code, name in NAMES.items()}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # what the reference reader accepts
SMALL_HEADER = 2**18
PIECE = 2**24
METADATA = {"format": "pt", "writer": "sdjax"}


def read_safetensors(path: str | Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name; only the header is read. As `open_safetensors`."""
    return open_safetensors(path)[0]


def open_safetensors(path: str | Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file by name, and its metadata; only the header is read.

    Raises:
        UserError: the file is missing, truncated, or its header does not describe it.
    """
    path = Path(path)
    header, start = _header(path)
    size = path.stat().st_size - start
    tensors: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (first, last) = _entry(entry, name, path)
        if last > size:
            raise UserError(f"{path} is truncated: {name} ends at byte {start + last} of {start + size}")
        tensors[name] = StoredTensor(path, dtype, shape, start + first)
        spans.append((first, last))
    end = 0
    for first, last in sorted(spans):  # with a gap or an overlap some tensor would not be where the header says
        if first != end:
            raise UserError(
                f"{path} has a corrupt header: its tensors overlap or leave a gap at byte {end} of the data"
            )
        end = last
    if end != size:
        raise UserError(f"{path} has {size - end} bytes after its last tensor")
    return tensors, header.get("__metadata__", {})


def data_section(path: Path) -> Iterator[bytes]:
    """The bytes after a file's header, in pieces; errors are those of `open_safetensors`."""
    _, start = _header(path)
    with path.open("rb") as file:
        file.seek(start)
        while piece := file.read(PIECE):
            yield piece


def read_weight_map(index: str | Path) -> dict[str, str]:
    """The file of each tensor, by an index of shards.

    Raises:
        UserError: the index is missing or corrupt, or names a file outside its folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index} has no weight_map from names to files")
    outside = [file for file in weight_map.values() if Path(file).name != file]
    if outside:
        raise UserError(f"{index} names a file outside its folder: {outside[0]}")
    return weight_map


def read_sharded(
    index: str | Path, read: Callable[[Path], Mapping[str, Writable]] = read_safetensors
) -> dict[str, Writable]:
    """The tensors of all files that an `....safetensors.index.json` names; `read` opens one of them.

    Raises:
        UserError: the index or a file is missing or corrupt, or a file lacks a tensor that the index says is there.
    """
    index = Path(index)
    weight_map = read_weight_map(index)
    files = {file: read(index.parent / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in files[file]:
            raise UserError(f"{index.parent / file} lacks {name}, which {index.name} says it holds")
    return {name: files[file][name] for name, file in weight_map.items()}


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, Writable],
    dtype: DTypeLike | None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes all tensors as `dtype`, one at a time, into a temporary sibling that then takes the name.

    A `dtype` of None keeps the type of each. `metadata` is what the file says of itself beside its format.

    Raises:
        UserError: as `check_target_file`, it cannot be written, or a value is not finite in `dtype`.
    """
    path, kind = Path(path), None if dtype is None else np.dtype(dtype)
    check_target_file(path)
    with atomic_write(path) as partial, partial.open("wb") as file:
        file.write(_packed_header(tensors, kind, {**(metadata or {}), **METADATA}))
        for name in sorted(tensors):
            file.write(finite(np.asarray(tensors[name]), kind, name).tobytes())


def check_target_file(path: Path) -> None:
    """Hold a file's name to being free or that of a file which `write_safetensors` wrote; a UserError otherwise."""
    recover(path.parent, {path.name})
    if path.exists() and _header(path)[0].get("__metadata__", {}).get("writer") != METADATA["writer"]:
        raise UserError(f"{path} exists and was not written by sdjax; it is left as it is")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Sorted and indented, as diffusers writes its own."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header and the place where the data begin."""
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            size = path.stat().st_size
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER
            # A header is held several times while it is parsed; no real one is much of its file, unless both are small.
            if length > min(MAX_HEADER, size - 8, max(SMALL_HEADER, size // 4)):
                raise UserError(f"{path} is truncated or no safetensors file: its header does not fit in {size} bytes")
            text = file.read(length)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    header: Any = parse_json(text, f"the header of {path}") if text.startswith(b"{") else {"__metadata__": None}
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path} has a corrupt header: it is no JSON object of tensors, and of metadata that are text")
    return header, 8 + length


def _entry(entry: Any, name: str, path: Path) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    try:
        code, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        natural = all(map(is_size, (*shape, first, last))) and len(shape) <= MAX_RANK
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} has a corrupt header: {name} lacks a dtype, a shape or two offsets") from error
    if not isinstance(code, str) or code not in DTYPES:
        raise UserError(f"{path} holds {name} as {code!r}; types that can be read: {', '.join(sorted(DTYPES))}")
    if (
        not natural
        or math.prod(n or 1 for n in shape) >= MAX_SIZE
        or last - first != math.prod(shape) * DTYPES[code].itemsize
    ):
        raise UserError(f"{path} has a corrupt header: {name} is {code} {list(shape)} in bytes {first} to {last}")
    return DTYPES[code], shape, (first, last)


def _packed_header(tensors: Mapping[str, Writable], dtype: np.dtype | None, metadata: Mapping[str, str]) -> bytes:
    entries, end = {"__metadata__": dict[str, Any](metadata)}, 0
    for name in sorted(tensors):
        kind, shape = dtype or tensors[name].dtype, list(tensors[name].shape)
        first, end = end, end + math.prod(shape) * kind.itemsize
        entries[name] = {"dtype": CODES[kind], "shape": shape, "data_offsets": [first, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    return struct.pack("<Q", len(text)) + text
