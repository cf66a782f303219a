"""The weights of a network: which file or shards hold them, of which precision, safetensors before pickles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from sdjax.checkpoints.mapping import Writable
from sdjax.checkpoints.storage.pickles import load_pickle
from sdjax.checkpoints.storage.safetensors import open_safetensors, read_sharded
from sdjax.checkpoints.storage.signatures import format_of
from sdjax.checkpoints.storage.stored import StoredTensor
from sdjax.core.errors import UserError

SAFETENSORS, SUFFIXES = ".safetensors", (".ckpt", ".pt", ".pth", ".bin")
PACKED = ("8bit", "4bit")  # variants of bitsandbytes; DeepFloyd IF has a T5 of the first
PICKLED = {"model": "pytorch_model"}  # transformers gives its pickles another name
TIMES = 8  # times its size that the tensors of a pickle may claim: several may share what is stored


class Weights(NamedTuple):
    """A file's content.

    Attributes:
        tensors: by key; each is read when it is made an array.
        facts: what the file says of itself, e.g. {"modelspec.prediction_type": "v"} or {"global_step": "875000"}.
        path: the file.
    """

    tensors: Mapping[str, Writable]
    facts: Mapping[str, str]
    path: Path


Source: TypeAlias = str | Path | Weights
"""A file's path, or what was read of it."""


def read_file(source: Source) -> Weights:
    """The tensors of a safetensors file, or of one of PyTorch's; not read a second time.

    Raises:
        UserError: the file is missing, corrupt or of another kind.
    """
    if isinstance(source, Weights):
        return source
    path = Path(source)
    return Weights(*(open_safetensors if _is_safetensors(path) else read_pickle)(path), path)


def read_groups(path: Path) -> dict[str, Any]:
    """The tensors of a file by name, and of a pickle also its mappings, each by its name with the tensors in it.

    Raises:
        UserError: as `read_file`.
    """
    if _is_safetensors(path):
        return dict(open_safetensors(path)[0])
    content = load_pickle(path)
    named = {str(name): _tensors(group, path) for name, group in content.items() if isinstance(group, dict)}
    return _tensors(content, path) | {name: tensors for name, tensors in named.items() if tensors}


def _is_safetensors(path: Path) -> bool:
    """Tell the format by the file's beginning, and by its suffix where that is damaged."""
    if path.suffix not in (SAFETENSORS, *SUFFIXES):
        raise UserError(f"{path} is none of the files that are read: {SAFETENSORS}, {', '.join(SUFFIXES)}")
    found = format_of(path) or ("safetensors" if path.suffix == SAFETENSORS else "pickle")
    if found == "pickle" and path.suffix == SAFETENSORS:
        raise UserError(f"{path} is a pickle under the name of a safetensors file; call it {path.stem}.ckpt")
    return found == "safetensors"


def candidates(stem: str, variant: str | None) -> Iterator[str]:
    """Names that a component's weights may have, the best first: files, and indices (`....json`) of shards.

    The file of the variant asked for comes first, then the plain one, then the half-precision one; pickles only where
    there is no safetensors file.

    Raises:
        UserError: the variant is one whose weights are packed integers.
    """
    if variant in PACKED:
        raise UserError(f"variant {variant!r}: weights packed by bitsandbytes are not read; leave it out or say fp16")
    infixes = dict.fromkeys((*((f".{variant}",) if variant else ()), "", ".fp16"))
    for name, suffix in ((stem, "safetensors"), (PICKLED.get(stem, stem), "bin")):
        for infix in infixes:
            yield f"{name}{infix}.{suffix}"
            yield f"{name}.{suffix}.index{infix}.json"
            yield f"{name}{infix}.{suffix}.index.json"


def find_weights(folder: Path, stem: str, variant: str | None) -> Mapping[str, Writable]:
    """The tensors of a component's folder, of the first of its `candidates` that is there.

    Raises:
        UserError: there is none, or it is corrupt.
    """
    found = next((folder / name for name in candidates(stem, variant) if (folder / name).exists()), None)
    if found is None:
        raise UserError(f"{folder} holds no {stem}.safetensors, {stem}.fp16.safetensors, index of shards or .bin file")
    if found.suffix == ".json":
        return read_sharded(found, lambda path: read_file(path).tensors)
    return read_file(found).tensors


def read_pickle(path: str | Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file by name, and its integers (`global_step`) as text.

    Raises:
        UserError: the file is missing, corrupt, or holds more than tensors and containers.
    """
    path = Path(path)
    content = load_pickle(path)
    state = content.get("state_dict", content)
    if not isinstance(state, dict):
        raise UserError(f"state_dict in {path} is a {type(state).__name__}, not tensors by name")
    tensors = _tensors(state, path)
    if not tensors:
        raise UserError(f"{path} holds no tensors")
    return tensors, {str(key): str(value) for key, value in content.items() if type(value) is int}


def _tensors(content: Mapping[Any, Any], path: Path) -> dict[str, StoredTensor]:
    """The tensors among the values of a mapping."""
    named = {str(name): value for name, value in content.items() if isinstance(value, StoredTensor)}
    if sum(tensor.count * tensor.dtype.itemsize for tensor in named.values()) > TIMES * path.stat().st_size:
        raise UserError(f"{path} is not loaded: its tensors claim more than {TIMES} times its size")
    return named
