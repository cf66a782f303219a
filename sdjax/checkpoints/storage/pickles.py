"""PyTorch's files of tensors (`.ckpt`, `.pt`, `.pth`, `.bin`), read without PyTorch; nothing in them is run.

There are two formats (pytorch/torch/serialization.py): since 1.6 an archive, a zip file whose entries are stored as
they are; before it a few pickles, and behind them the tensors' bytes.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdjax.checkpoints.storage.machine import Name, as_dict, run
from sdjax.checkpoints.storage.stored import DTYPES, MAX_RANK, StoredTensor, is_size, span
from sdjax.core.errors import UserError

MAX_PICKLE = 2**24  # bytes; the largest that are published have 2 million. Of each, 80 may be made
ARCHIVE = b"PK\x03\x04"
MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a pickle of a number, 0x1950a86a20f9469cfc6c
PROTOCOL = 1001
BROKEN = (
    *(ValueError, TypeError, IndexError, KeyError, AttributeError, EOFError, OverflowError, NotImplementedError),
    *(struct.error, zipfile.BadZipFile),
)
_NAMES = {"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Bool": "bool"}
_NAMES |= {"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"}
STORAGES = {f"torch.{kind}Storage": DTYPES[name] for kind, name in _NAMES.items()}
STORAGES["torch.storage.UntypedStorage"] = DTYPES["uint8"]
DICTIONARIES = ("collections.OrderedDict", "torch.nn.modules.container.ParameterDict")
PARAMETERS = ("torch._utils._rebuild_parameter", "torch.nn.parameter.Parameter")
SETS = ("builtins.set", "__builtin__.set")
EMPTY_BYTES = ("builtins.bytes", "__builtin__.bytes")
SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
NUMBERS = {code: np.dtype(code) for code in ("f8", "f4", "f2", "i8", "i4", "b1")}


class Storage(NamedTuple):
    """Elements in the file that tensors share; `start` in bytes from its beginning."""

    dtype: np.dtype
    count: int
    start: int


def load_pickle(path: Path) -> dict[Any, Any]:
    """The dictionary that a file holds: tensors, plain containers, numbers and text.

    Raises:
        UserError: the file is missing, corrupt, or holds something else; the message names what it would run.
    """
    try:
        with path.open("rb") as file:
            is_archive = file.read(len(ARCHIVE)) == ARCHIVE
        content = (_read_archive if is_archive else _read_legacy)(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except BROKEN as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is corrupt or holds more than weights; it is not loaded: {said}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not tensors by name")
    return content


class _Reader:
    """Constructors of what a file holds; its storages are at known places."""

    def __init__(self, path: Path, places: Mapping[str, tuple[int, int]]) -> None:
        """Take the start and the size in bytes of each storage, by its key."""
        self.path, self.places = path, places
        self.constructors: dict[str, Callable[..., Any]] = {
            "torch._utils._rebuild_tensor": self.tensor,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_tensor_v3": self.typed,
            **dict.fromkeys(PARAMETERS, lambda data, *_: data),
            **dict.fromkeys(DICTIONARIES, lambda pairs=(): as_dict(pairs)),
            "torch.Size": lambda sizes=(): tuple(sizes),
            "torch.device": lambda *where: str(where),
            "numpy.dtype": lambda code, *_: NUMBERS[code],
            "_codecs.encode": _encoded,
            **dict.fromkeys(SETS, lambda items=(): tuple(items)),
            **dict.fromkeys(EMPTY_BYTES, lambda: b""),
            **dict.fromkeys(SCALARS, _number),
        }

    def storage(self, said: Any) -> Storage:
        """Elements outside of the pickle, which it names."""
        kind, name, key, _, count, *view = said
        if kind != "storage" or not isinstance(name, Name) or any(part is not None for part in view):
            raise ValueError("it keeps something else than storages outside of its pickle")
        if name.name not in STORAGES:
            raise ValueError(f"it holds a {name}, which is not read")
        dtype, (start, size) = STORAGES[name.name], self.places[key]
        if not is_size(count) or count * dtype.itemsize > size:
            raise ValueError(f"a storage claims {count} elements in {size} bytes")
        return Storage(dtype, count, start)

    def tensor(self, storage: Storage, offset: int, shape: Any, strides: Any, *_: Any) -> StoredTensor:
        """A tensor of some elements of a storage."""
        shape, strides = tuple(shape), tuple(strides)
        if not all(map(is_size, (offset, *shape, *strides))) or len(shape) != len(strides) or len(shape) > MAX_RANK:
            raise ValueError("a tensor's sizes are none")
        length = span(shape, strides)
        if max(math.prod(shape), offset + length if length else 0) > storage.count:
            raise ValueError(f"a tensor claims more than the {storage.count} elements that are stored")
        start = storage.start + offset * storage.dtype.itemsize
        return StoredTensor(self.path, storage.dtype, shape, start, None if _is_ordered(shape, strides) else strides)

    def typed(
        self, storage: Storage, offset: int, shape: Any, strides: Any, grad: bool, hooks: Any, dtype: Name, *_: Any
    ) -> StoredTensor:
        """A tensor whose storage has no type."""
        kind = DTYPES.get(dtype.name.removeprefix("torch."))
        if kind is None:
            raise ValueError(f"it holds a tensor of {dtype}, which is not read")
        count = storage.count * storage.dtype.itemsize // kind.itemsize
        return self.tensor(Storage(kind, count, storage.start), offset, shape, strides)


def _read_archive(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entries = archive.infolist()
        by_name = {entry.filename: entry for entry in entries}
        top = next((name.removesuffix("data.pkl") for name in by_name if name.endswith("/data.pkl")), None)
        if top is None or len(by_name) < len(entries):
            raise ValueError("it has no data.pkl" if top is None else "an entry is there twice")
        order = by_name.get(f"{top}byteorder")
        if order is not None and _content(file, order, 16) != b"little":
            raise ValueError("it is of a machine with another order of bytes")
        places = {
            name.removeprefix(f"{top}data/"): (_start(file, entry), entry.file_size)
            for name, entry in by_name.items()
            if name.startswith(f"{top}data/")
        }
        reader = _Reader(path, places)
        return run(io.BytesIO(_content(file, by_name[f"{top}data.pkl"])), reader.constructors, reader.storage)


def _start(file: Any, entry: zipfile.ZipInfo) -> int:
    """The place of an entry's bytes, which are stored as they are, so that it claims no more than it has."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
        raise ValueError(f"its entry {entry.filename[:80]!r} is compressed or encrypted")
    file.seek(entry.header_offset)
    header = file.read(30)
    name, extra = struct.unpack("<HH", header[26:30])
    start = entry.header_offset + 30 + name + extra
    file.seek(0, io.SEEK_END)
    if not header.startswith(ARCHIVE) or start + entry.file_size > file.tell():
        raise ValueError(f"its entry {entry.filename[:80]!r} is not where it should be")
    return start


def _content(file: Any, entry: zipfile.ZipInfo, most: int = MAX_PICKLE) -> bytes:
    if entry.file_size > most:
        raise ValueError(f"its entry {entry.filename[:80]!r} has {entry.file_size} bytes")
    file.seek(_start(file, entry))
    return file.read(entry.file_size)


def _read_legacy(path: Path) -> Any:
    with path.open("rb") as file:
        size = path.stat().st_size
        pickles = io.BytesIO(file.read(min(size, MAX_PICKLE)))
        if pickles.read(len(MAGIC)) != MAGIC or run(pickles, {}) != PROTOCOL:
            raise ValueError("it is no file of PyTorch")
        system, begin = run(pickles, {}), pickles.tell()
        if system.get("little_endian") is not True:
            raise ValueError("it is of a machine with another order of bytes")
        anywhere, seen = _Reader(path, defaultdict(lambda: (0, size))), {}

        def storage(said: Any) -> Storage:
            return seen.setdefault(said[2], anywhere.storage(said))

        run(pickles, anywhere.constructors, storage)  # which storages there are; their places follow
        places, at = {}, 0
        for key in run(pickles, {}):
            at = file.seek(at or pickles.tell())
            (count,), taken = struct.unpack("<q", file.read(8)), seen[key].count * seen[key].dtype.itemsize
            if count != seen[key].count or at + 8 + taken > size:
                raise ValueError("it is truncated")
            places[key], at = (at + 8, taken), at + 8 + taken
        pickles.seek(begin)
        reader = _Reader(path, places)
        return run(pickles, reader.constructors, reader.storage)


def _is_ordered(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Tell whether elements lie in the order of the axes, without gaps."""
    wanted = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return all(n == 1 or have == want for n, have, want in zip(shape, strides, wanted, strict=True)) or 0 in shape


def _encoded(text: str, encoding: str) -> bytes:
    """Bytes, which pickles of Python 2's protocol keep as text."""
    if encoding != "latin1":
        raise ValueError(f"it encodes as {encoding[:80]!r}")
    return text.encode(encoding)


def _number(dtype: np.dtype, data: bytes) -> Any:
    """One of NumPy's numbers."""
    if not isinstance(dtype, np.dtype) or len(data) != dtype.itemsize:
        raise ValueError("it holds a number of NumPy's of another form")
    return np.frombuffer(data, dtype).item()
